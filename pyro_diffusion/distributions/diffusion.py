"""The discrete chain as a Pyro distribution over data."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.decoders import Decoder, check_decoder, default_decoder
from pyro_diffusion.distributions.objectives import Bound, Objective, check_objective, divergence
from pyro_diffusion.processes import GaussianProcess, draw
from pyro_diffusion.samplers import Ancestral, Sampler, check_sampler, simulate
from pyro_diffusion.schedules import Level, check_grid, uniform
from pyro_diffusion.validation import Shape, check_event_shape, check_positive_int

__all__ = ["Diffusion"]


class Diffusion(TorchDistribution):
    r"""A diffusion model's law of data: the discrete chain as a hierarchical variational autoencoder.

    On a grid :math:`0 \le t_0 < \dots < t_K \le 1` the model is
    :math:`p(x_{t_K}) \prod_j p(x_{t_{j-1}} | x_{t_j})\, p(x | x_{t_0})` and its evidence lower bound

    .. math::
        \log p(x) \ge \mathbb E_q \log p(x | x_{t_0}) - KL(q(x_{t_K} | x) \| p(x_{t_K}))
        - \sum_{j=1}^K \mathbb E_q KL(q(x_{t_{j-1}} | x_{t_j}, x) \| p(x_{t_{j-1}} | x_{t_j})).

    :meth:`log_prob` is an *unbiased estimate of this bound* from one network read per datum: one of the
    K + 1 terms is drawn per datum, at low-discrepancy positions :math:`(u + i/B) \bmod 1` over the batch,
    and weighted by its inverse probability. Its randomness is drawn once per instance: an instance scores a
    value alike however often it is asked, while a model that builds the distribution afresh each run (the
    normal way) trains on fresh noise. With another ``objective`` it is that objective, not a bound.

    :meth:`sample` walks the same grid with any sampler and draws from the decoder; it is not
    reparameterized.

    The network is trained only if Pyro sees it: call ``pyro.module("denoiser", denoiser)`` in the model,
    or make it an attribute of a ``PyroModule`` model.

    Args:
        denoiser: posterior p(x_0 | x_t).
        event_shape: shape of one datum; its length is the process's ``event_dim``.
        steps: number K of reverse steps on a uniform grid. Ignored when ``times`` is given.
        times: the grid itself, K + 1 increasing times.
        decoder: p(x | x_{t_0}); by default normal for Gaussian processes, categorical otherwise.
        sampler: used by :meth:`sample`; ancestral by default.
        objective: what :meth:`log_prob` estimates; the bound by default.
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
        >>> law = Diffusion(denoiser, event_shape=(2,), steps=50)
        >>> law.log_prob(torch.zeros(7, 2)).shape
        torch.Size([7])
        >>> law.sample((3,)).shape
        torch.Size([3, 2])

    References:
        Ho et al., arXiv 2006.11239; Kingma et al., arXiv 2107.00630 (bound and low-discrepancy times).
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

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
        if not isinstance(denoiser, Denoiser):
            raise ValueError(f"denoiser: got {type(denoiser).__name__}, expected a Denoiser")
        event_shape = torch.Size(_as_shape(event_shape))
        if len(event_shape) != denoiser.process.event_dim:
            raise ValueError(
                f"event_shape: got {tuple(event_shape)}, expected {denoiser.process.event_dim} "
                "dimension(s), the event_dim of the denoiser's process"
            )
        self.dtype, self.device = _home(denoiser)
        self.denoiser = denoiser
        if times is None:
            times = _uniform(check_positive_int("steps", steps), torch.get_default_dtype())
        self.times = times
        self.decoder = check_decoder(decoder or default_decoder(denoiser.process), denoiser.process)
        self.sampler = Ancestral() if sampler is None else check_sampler(sampler)
        self.objective = Bound() if objective is None else check_objective(objective)
        self.progress = progress
        self.context = {k: v for k, v in (context or {}).items() if v is not None}
        # From the host's generator, without touching the device.
        self._seed = int(torch.randint(2**62, (), device="cpu"))
        batch_shape = _broadcast("context", {k: self._context_batch(k) for k in self.context})
        super().__init__(batch_shape, event_shape, validate_args=validate_args)
        if self._validate_args:
            self._check_chain()

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers, or integers in range, as the decoder has it."""
        return self.decoder.support(len(self.event_shape))

    @property
    def steps(self) -> int:
        """Number K of reverse steps; the chain has K + 1 latent variables and reads the network as often."""
        return len(self.times) - 1

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "Diffusion":
        """The same distribution, with the same randomness, at a larger batch shape."""
        new = self._get_checked_instance(Diffusion, _instance)
        batch_shape = torch.Size(batch_shape)
        for name in _SHARED:
            setattr(new, name, getattr(self, name))
        new.context = {k: self._expand_context(k, batch_shape) for k in self.context}
        super(Diffusion, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def condition(self, **context: Tensor) -> "Diffusion":
        """The same model under another context, with fresh randomness."""
        return self.replace(context={**self.context, **context})

    def replace(self, **changes: Any) -> "Diffusion":
        """A new instance with some constructor arguments changed (``times``, ``sampler``, ...)."""
        names = ("times", "decoder", "sampler", "objective", "progress", "context")
        arguments = {name: getattr(self, name) for name in names}
        if "steps" in changes:
            arguments["times"] = None
        arguments = {"validate_args": self._validate_args, **arguments, **changes}
        return Diffusion(self.denoiser, self.event_shape, **arguments)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Data from the model, sample + batch + event, through the sampler and the decoder."""
        shape = self._extended_shape(torch.Size(sample_shape))
        batch = shape[: len(shape) - len(self.event_shape)]
        process = self.denoiser.process
        with torch.no_grad():
            prior = process.prior(self.event_shape, dtype=self.dtype, device=self.device)
            x = draw(prior.expand(batch))
            context = self.expanded_context(x)
            times = self.times.to(self._time_dtype(x))
            x = simulate(self.denoiser, times, x, self.sampler, context, self.progress)
            return self.decode(x).sample()

    def log_prob(self, value: Tensor) -> Tensor:
        """An unbiased estimate of the bound in nats (of the objective, if that is not the bound).

        Args:
            value: data, sample + batch + event.

        Returns:
            One number per datum, deterministic for this instance and differentiable in value.

        Raises:
            ValueError: for data of a wrong shape or outside the support.
        """
        x0, batch = self._encoded(value)
        count = batch.numel()
        share = max(1 / (self.steps + 1), self.objective.decoder_share)
        with self._own_randomness(x0.device):
            offset = torch.rand((), dtype=self._time_dtype(x0), device=x0.device)
            place = (offset + torch.arange(count, device=x0.device) / count) % 1
            reverse = ((place - share) / (1 - share) * self.steps).floor()
            index = 1 + reverse.clamp(-1, self.steps - 1).long().reshape(batch)
            decoding, step = self._terms(value, x0, index)
        # What is known of the decoder's term beforehand is added in full, not drawn: less noise, same mean.
        start = self._levels(x0).at(0)
        known = self.objective.baseline(self.decoder, start, self.event_shape)
        drawn = torch.where(
            index == 0, (decoding - known) / share, step * (self.steps / (1 - share))
        )
        return -(self._prior_divergence(x0) + known + drawn)

    def encode(self, value: Tensor) -> Tensor:
        """Data as x_0, checked and broadcast to this distribution's batch shape."""
        return self._encoded(value)[0]

    def decode(self, x: Tensor) -> TorchDistribution:
        """The law of data given the chain's last state x_{t_0}, batch + event (one network read)."""
        process = self.denoiser.process
        start = self._levels(x).at(0)
        posterior = self.denoiser(x, start, **self.expanded_context(x))
        return self.decoder(posterior, start, process)

    def expanded_context(self, xt: Tensor) -> dict[str, Tensor]:
        """The context at the batch shape of a state, batch + event."""
        batch = xt.shape[: xt.dim() - len(self.event_shape)]
        return {k: self._expand_context(k, batch) for k in self.context}

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
            return self._prior_divergence(x0)
        index = torch.as_tensor(index, device=x0.device).expand(batch)
        if self._validate_args and not bool(((index >= 0) & (index <= self.steps)).all()):
            raise ValueError(
                f"index: got values from {int(index.min())} to {int(index.max())}, expected terms 0 to "
                f"{self.steps} (or the number {self.steps + 1}, for the prior)"
            )
        decoding, step = self._terms(value, x0, index)
        return torch.where(index == 0, decoding, step)

    def _terms(self, value: Tensor, x0: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Both readings of the network at t_index: as the decoder's term and as the reverse step's.

        Only one is meant for each datum; the other is finite and to be discarded.
        """
        process = self.denoiser.process
        # Three levels for each datum: where it is read, and the ends of its step.
        which = torch.stack([index, index.clamp(min=1), (index - 1).clamp(min=0)])
        levels = self._levels(x0).at(which).unsqueeze(len(self.event_shape))
        t, late, early = map(Level._make, zip(*(v.unbind() for v in levels), strict=True))
        q = process.marginal(x0, t)
        xt = draw(q)
        posterior = self.denoiser(xt, t, **self.expanded_context(xt))
        decoding = self.objective.decoding(self.decoder, value, posterior, t, process, self.steps)
        step = self.objective(process, xt, x0, posterior, early, late, self.steps)
        return decoding, step

    def _prior_divergence(self, x0: Tensor) -> Tensor:
        process = self.denoiser.process
        dtype = x0.dtype if x0.is_floating_point() else self.dtype
        end = self._levels(x0).at(-1)
        prior = process.prior(self.event_shape, dtype=dtype, device=x0.device)
        return divergence(
            process.marginal(x0, end), prior.expand(x0.shape[: x0.dim() - len(self.event_shape)])
        )

    def _encoded(self, value: Tensor) -> tuple[Tensor, torch.Size]:
        if self._validate_args:
            check_event_shape("value", value, self.event_shape)
            self.decoder.check(value)
        shape = _broadcast(
            "value", {"value": value.shape, "distribution": self.batch_shape + self.event_shape}
        )
        own = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        x0 = self.decoder.encode(value, self.dtype or own).expand(shape)
        return x0, shape[: len(shape) - len(self.event_shape)]

    def _levels(self, x: Tensor) -> Level:
        schedule = self.denoiser.process.schedule
        return schedule.grid_levels(self.times, self._time_dtype(x), x.device)

    def _time_dtype(self, x0: Tensor) -> torch.dtype:
        return x0.dtype if x0.is_floating_point() else self.dtype or self.times.dtype

    @contextlib.contextmanager
    def _own_randomness(self, device: torch.device) -> Iterator[None]:
        """Draw from this instance's seed and leave the global generators as they were."""
        generators = [torch.default_generator]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            generators.append(torch.cuda.default_generators[index])
        elif device.type == "mps":
            generators.append(torch.mps._get_default_mps_generator())
        states = [generator.get_state() for generator in generators]
        for generator in generators:
            generator.manual_seed(self._seed)
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    def _context_event(self, name: str) -> torch.Size:
        value = self.context[name]
        return value.shape[value.dim() - self.denoiser.context_event_dim(name, value) :]

    def _context_batch(self, name: str) -> torch.Size:
        shape = self.context[name].shape
        return shape[: len(shape) - len(self._context_event(name))]

    def _expand_context(self, name: str, batch_shape: torch.Size) -> Tensor:
        return self.context[name].expand(batch_shape + self._context_event(name))

    def _check_chain(self) -> None:
        schedule = self.denoiser.process.schedule
        if not isinstance(self.times, Tensor):
            raise ValueError(f"times: got {type(self.times).__name__}, expected a tensor of times")
        if getattr(schedule, "_checked_grid", None) is self.times:
            return  # the grid of the run before
        # Beside the schedule's own tensors if it has any, else where they are: no wait for a device.
        times = self.times.to([*schedule.buffers(), *schedule.parameters(), self.times][0].device)
        check_grid(times, schedule)
        if isinstance(self.denoiser.process, GaussianProcess):
            log_snr = schedule.log_snr(times[[0, -1]])
            if not bool(torch.isfinite(log_snr).all()):
                raise ValueError(
                    f"schedule: got log-SNR {log_snr.tolist()} at the ends of the grid, expected finite "
                    "values (cut the schedule with log_snr_max and log_snr_min)"
                )
        if next(schedule.parameters(), None) is None:
            object.__setattr__(schedule, "_checked_grid", self.times)


@functools.lru_cache(maxsize=64)
def _uniform(steps: int, dtype: torch.dtype) -> Tensor:
    """One tensor for one number of steps: a model builds its distribution anew at every run."""
    return uniform(steps, dtype)


def _home(denoiser: Denoiser) -> tuple[torch.dtype | None, torch.device | None]:
    """Dtype and device of a denoiser's parameters, or else of its own buffers; None if it has neither."""
    like: list[Tensor] = [p for p in (next(denoiser.parameters(), None),) if p is not None]
    if not like:
        process = {id(buffer) for buffer in denoiser.process.buffers()}
        like = [b for b in denoiser.buffers() if b.is_floating_point() and id(b) not in process]
    if not like:
        return None, None
    # Times and data of a half-precision network stay in float32.
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in like), torch.float32)
    return dtype, like[0].device


def _as_shape(event_shape: object) -> tuple[int, ...]:
    if not isinstance(event_shape, tuple | list):
        raise ValueError(f"event_shape: got {event_shape!r}, expected a tuple of sizes")
    return tuple(event_shape)


def _broadcast(name: str, shapes: dict[str, torch.Size]) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError as error:
        got = ", ".join(f"{key} {tuple(shape)}" for key, shape in shapes.items())
        raise ValueError(
            f"{name}: got shapes {got}, expected shapes that broadcast together"
        ) from error


_SHARED = (
    *("denoiser", "times", "decoder", "sampler", "objective", "progress"),
    *("dtype", "device", "_seed"),
)
