"""The discrete chain as a Pyro distribution over data."""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.base import kept_uniform
from pyro_diffusion.distributions.bounded import BoundedDistribution
from pyro_diffusion.distributions.decoders import Decoder
from pyro_diffusion.distributions.objectives import DecoderStep, Objective, ReverseStep
from pyro_diffusion.distributions.shape_runs import shapes_only
from pyro_diffusion.processes import draw
from pyro_diffusion.samplers import Ancestral, Sampler, simulate
from pyro_diffusion.samplers.base import check_sampler
from pyro_diffusion.validation import Shape, check_expands, check_positive_int, check_tensor

__all__ = ["Diffusion"]


class Diffusion(BoundedDistribution):
    r"""A diffusion model's distribution of data: its chain as a hierarchical variational autoencoder.

    On a grid :math:`0 \le t_0 < \dots < t_K \le 1` the model is
    :math:`p(x_{t_K}) \prod_j p(x_{t_{j-1}} | x_{t_j})\, p(x | x_{t_0})` and its evidence lower bound

    .. math::
        \log p(x) \ge \mathbb E_q \log p(x | x_{t_0}) - KL(q(x_{t_K} | x) \| p(x_{t_K}))
        - \sum_{j=1}^K \mathbb E_q KL(q(x_{t_{j-1}} | x_{t_j}, x) \| p(x_{t_{j-1}} | x_{t_j})).

    ``log_prob`` is an *unbiased estimate of this bound* from one network evaluation per datum: one of the
    K + 1 terms is drawn per datum, at low-discrepancy positions :math:`(u + i/B) \bmod 1` over the batch,
    and weighted by its inverse probability. Its randomness is drawn once per instance: an instance scores a
    value alike however often it is asked, while a model that builds the distribution afresh each run (the
    normal way) trains on fresh noise. With another ``objective`` it is that objective, not a bound.

    The estimate is right wherever it enters linearly, as in every ELBO. Exponentiated it is no bound any
    more: a latent enumerated in the model, weights of particles, Markov chains and mixtures are refused by
    ``log_prob``, as far as Pyro lets it see them (a ``logsumexp`` of your own it does not). The unfolded
    chain (:class:`~pyro_diffusion.infer.ChainReparam`), :class:`ProbabilityFlow` and latents enumerated in
    the guide are right.

    :meth:`sample` follows the same grid with any sampler and draws from the decoder; it is not
    reparameterized.

    The network is trained only if Pyro sees it: call ``pyro.module("denoiser", denoiser)`` in the model,
    or make it an attribute of a ``PyroModule`` model.
    Of a network made of Pyro modules, parameters and random weights (``PyroSample``) are taken where the
    distribution is built: inside the model, and outside of its plates if there are random ones.

    Args:
        denoiser: posterior p(x_0 | x_t).
        event_shape: shape of one datum; its length is the process's ``event_dim``.
        steps: number K of reverse steps on a uniform grid. Ignored when ``times`` is given.
        times: the grid itself, K + 1 increasing times.
        decoder: p(x | x_{t_0}); by default normal for Gaussian processes, categorical otherwise.
        sampler: used by :meth:`sample`; ancestral by default.
        objective: what ``log_prob`` estimates; the bound by default.
        progress: whether sampling shows a progress bar.
        context: tensors for the denoiser (labels, observations); their batch shapes broadcast into this
            distribution's.
        validate_args: whether to check arguments and values; Pyro's global setting by default.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:
        >>> from pyro_diffusion.denoisers import GaussianDenoiser
        >>> from pyro_diffusion.nn import MLP
        >>> from pyro_diffusion.processes import GaussianProcess, draw
        >>> from pyro_diffusion.schedules import Cosine
        >>> denoiser = GaussianDenoiser(MLP(2), GaussianProcess(Cosine()))
        >>> diffusion = Diffusion(denoiser, event_shape=(2,), steps=50)
        >>> diffusion.log_prob(torch.zeros(7, 2)).shape
        torch.Size([7])
        >>> diffusion.sample((3,)).shape
        torch.Size([3, 2])

    References:
        Ho et al., arXiv 2006.11239; Kingma et al., arXiv 2107.00630 (bound and low-discrepancy times).
    """

    _arguments: ClassVar[tuple[str, ...]] = (
        *BoundedDistribution._arguments,
        *("times", "sampler", "progress"),
    )
    _shown: ClassVar[tuple[str, ...]] = ("steps",)

    def __init__(
        self,
        denoiser: Denoiser,
        event_shape: Shape,
        steps: int = 1000,
        *,
        times: Tensor | None = None,
        decoder: Decoder | None = None,
        sampler: Sampler | None = None,
        objective: Objective | None = None,
        progress: bool = False,
        context: dict[str, Tensor] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if times is None:
            times = kept_uniform(check_positive_int("steps", steps), torch.get_default_dtype())
        self.sampler = Ancestral() if sampler is None else check_sampler(sampler)
        self.progress = progress
        super().__init__(
            denoiser,
            event_shape,
            times=times,
            decoder=decoder,
            objective=objective,
            context=context,
            validate_args=validate_args,
        )

    @property
    def steps(self) -> int:
        """Number K of reverse steps; the chain has K + 1 latent variables and as many network evaluations."""
        return len(self.times) - 1

    def replace(self, **changes: Any) -> Self:
        """A new instance with some constructor arguments changed (``times``, ``sampler``, ...)."""
        if "steps" in changes:
            changes = {"times": None, **changes}
        return super().replace(**changes)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Data from the model, sample + batch + event, through the sampler and the decoder."""
        if shapes_only():
            return self._example(sample_shape)
        with torch.no_grad():
            x = self._prior_draw(sample_shape)
            x, context = self.with_context(x)
            times = self.times.to(self._time_dtype(x))
            x = simulate(self.denoiser, times, x, self.sampler, context, self.progress)
            return self._decoded(x)

    def bound_terms(self, value: Tensor, index: Tensor | int) -> Tensor:
        """One term of minus the objective per datum, from a fresh draw of its noise (nats).

        Args:
            value: data, sample + batch + event.
            index: term to estimate, a number or one per datum: 0 for the decoder, j = 1 ... K for the step
                from t_j to t_{j-1}; the number K + 1 for the prior.

        Returns:
            Unbiased estimates (the prior's is exact), sample + batch. The sum over all K + 2 indices is
            minus the bound.

        Raises:
            ValueError: for data of a wrong shape or outside the support, or an index out of range.
        """
        x0, batch = self._encoded(value)
        if isinstance(index, int) and index == self.steps + 1:
            return self._prior_term(x0)
        if isinstance(index, Tensor):
            check_expands("index", check_tensor("index", index), batch)
        elif isinstance(index, bool) or not 0 <= index <= self.steps:
            raise ValueError(
                f"index: got {index}, expected terms 0 to {self.steps} (or the number {self.steps + 1}, for "
                "the prior)"
            )
        index = torch.as_tensor(index, device=x0.device).expand(batch)
        if index.is_floating_point():
            raise ValueError(f"index: got dtype {index.dtype}, expected integers")
        index = index.long()
        if self._validate_args and not bool(((index >= 0) & (index <= self.steps)).all()):
            raise ValueError(
                f"index: got values from {int(index.min())} to {int(index.max())}, expected terms 0 to "
                f"{self.steps} (or the number {self.steps + 1}, for the prior)"
            )
        decoding, step = self._terms(value, x0, index)
        return torch.where(index == 0, decoding, step)

    @property
    def _fair_share(self) -> float:
        return 1 / (self.steps + 1)

    @property
    def _span(self) -> float:
        return self.steps

    def _costs(self, value: Tensor, x0: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        reverse = (position * self.steps).floor()
        return self._terms(value, x0, 1 + reverse.clamp(-1, self.steps - 1).long())

    def _terms(self, value: Tensor, x0: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Both uses of the network's output at t_index: as the decoder's term and as the reverse step's.

        Only one is meant for each datum; the other is finite and to be discarded.
        """
        process = self.denoiser.process
        # Three levels for each datum: that of its state, and the ends of its step.
        which = torch.stack([index, index.clamp(min=1), (index - 1).clamp(min=0)])
        levels = self._levels(x0).at(which)
        t, late, early = map(levels.at, range(3))
        xt = draw(process.marginal(x0, t))
        posterior = self.posterior(xt, t)
        last = DecoderStep(process, x0, xt, posterior, t, self.steps, self.decoder, value)
        step = ReverseStep(process, x0, xt, posterior, early, late, self.steps)
        return self.objective.decoder_term(last), self.objective.reverse_term(step)
