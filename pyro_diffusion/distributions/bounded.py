"""Models whose log_prob is an unbiased estimate of an evidence lower bound, from one evaluation per datum."""

import math
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.base import DenoisedDistribution, broadcast
from pyro_diffusion.distributions.decoders import Decoder, check_decoder, default_decoder
from pyro_diffusion.distributions.linear_use import check_linear_use
from pyro_diffusion.distributions.objectives import Bound, Objective, check_objective
from pyro_diffusion.processes import Ability, SeededNoise, draw, drawing_from
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.processes.global_batch import Shard, scoring_noise
from pyro_diffusion.processes.noise import NoiseSource
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import (
    Shape,
    check_event_shape,
    check_expands,
    check_finite,
    check_tensor,
)

__all__ = ["BoundedDistribution"]


class BoundedDistribution(DenoisedDistribution):
    r"""A latent path from a prior to data: its bound has a prior, a reverse and a decoder's term.

    .. math:: -\log p(x) \le KL(q(x_{t_K} | x) \| p(x_{t_K})) + \text{reverse}
        + \mathbb E_q[-\log p(x | x_{t_0})].

    The reverse term is a sum over steps (a chain) or an integral over time (an SDE). :meth:`log_prob`
    evaluates the network once per datum, at low-discrepancy positions :math:`(u + i/B) \bmod 1` over the
    batch (in an order that spreads each row and column of a batch of several dimensions): a share of them is
    for the decoder's term, the rest is spread evenly along the path, and each is weighted by its inverse
    probability.
    A datum that is scored under several contexts (data of shape (N,), a context of shape (C, 1), as of an
    enumerated latent) is scored at one level with one draw of noise for all of them; plates, such as that of
    particles, have noise of their own.

    A subclass gives the two costs at a position (``_costs``), and the path's measure (``_span``).

    Args:
        denoiser: posterior p(x_0 | x_t).
        event_shape: shape of one datum.
        times: increasing times, the first that of the decoder and the last that of the prior.
        decoder: p(x | x_{t_0}); by default normal for Gaussian processes, categorical otherwise.
        objective: what :meth:`log_prob` estimates; the bound by default.
        context: tensors for the denoiser.
        validate_args: whether to check arguments and values.
    """

    _arguments: ClassVar[tuple[str, ...]] = (
        *DenoisedDistribution._arguments,
        *("decoder", "objective"),
    )

    def __init__(
        self,
        denoiser: Denoiser,
        event_shape: Shape,
        *,
        times: Tensor,
        decoder: Decoder | None,
        objective: Objective | None,
        context: dict[str, Tensor] | None,
        validate_args: bool | None,
    ) -> None:
        super().__init__(denoiser, event_shape, context=context, validate_args=validate_args)
        self.times = times
        self.decoder = check_decoder(decoder or default_decoder(denoiser.process), denoiser.process)
        self.objective = Bound() if objective is None else check_objective(objective, denoiser)
        if self._validate_args:
            denoiser.process.check_grid(self.times)

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers, or integers in range, as the decoder has it."""
        return self.decoder.support(len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """An unbiased estimate of the bound in nats (of the objective, if that is not the bound).

        Args:
            value: data, sample + batch + event.

        Returns:
            One number per datum, deterministic for this instance and differentiable in value.

        Raises:
            ValueError: for data of a wrong shape or outside the support, and where Pyro would exponentiate
                the estimate: a latent enumerated in the model, particle weights, a Markov chain, a mixture;
                or subtract it, as the density of a guide's latent in an ELBO.
        """
        check_linear_use(self)
        if self._given_batch.numel() > 1:  # noise of a row must not depend on the row's context
            require(
                *(self.denoiser.process, Ability.INDEPENDENT),
                argument="context",
                by=f"one of batch shape {tuple(self._given_batch)}",
                instead="no context",
            )
        x0, batch = self._encoded(value)
        x0 = self._once_per_datum(x0, value)
        share = max(self._fair_share, self.objective.decoder_share)
        noise, place = self._noise_and_places(x0, x0.shape[: len(batch)])
        with drawing_from(noise):
            position = (place - share) / (1 - share)
            decoding, reverse = self._costs(value, x0, position)
        # What is known of the decoder's term beforehand is added in full, not drawn: less noise, same mean.
        start = self._levels(x0).at(0)
        known = self.objective.decoder_baseline(self.decoder, start, self.event_shape)
        drawn = torch.where(
            position < 0, (decoding - known) / share, reverse * (self._span / (1 - share))
        )
        prior = self._prior_term(x0)
        total = -(prior + known + drawn).expand(batch)
        if self._validate_args and not bool(total.detach().isfinite().all()):
            self._check_prior(prior)
            self._check_outcome(total)
        return total

    def prior_terms(self, value: Tensor) -> Tensor:
        """KL(q(x_{t_K} | x) || p(x_{t_K})) per datum, exact (nats), sample + batch."""
        term = self._prior_term(self._encoded(value)[0])
        if self._validate_args:
            self._check_prior(term)
        return term

    def decoder_terms(self, value: Tensor) -> Tensor:
        """-log p(x | x_{t_0}) per datum (nats), from a fresh draw of x_{t_0}, sample + batch."""
        x0, batch = self._encoded(value)
        return self._costs(value, x0, x0.new_full(batch, -1.0, dtype=self._time_dtype(x0)))[0]

    def reverse_terms(self, value: Tensor, position: Tensor) -> Tensor:
        """The whole reverse term per datum (nats), from one evaluation at a position, sample + batch.

        Args:
            value: data, sample + batch + event.
            position: where along the path, in [0, 1), one per datum. Unbiased if it is uniform there.

        Raises:
            ValueError: for data of a wrong shape or outside the support, or positions outside [0, 1).
        """
        x0, batch = self._encoded(value)
        check_expands("position", check_tensor("position", position), batch)
        if self._validate_args and not bool(((position >= 0) & (position < 1)).all()):
            raise ValueError(
                f"position: got values from {float(position.min()):g} to {float(position.max()):g}, expected "
                "positions in [0, 1)"
            )
        position = position.to(self._time_dtype(x0)).expand(batch)
        return self._span * self._costs(value, x0, position)[1]

    def encode(self, value: Tensor) -> Tensor:
        """Data as x_0, checked and broadcast to this distribution's batch shape."""
        return self._encoded(value)[0]

    def _decoded(self, x: Tensor) -> Tensor:
        """Data drawn from the decoder at the end of a path."""
        self._check_outcome(x)
        decoded = self.decode(x)
        base = per_coordinate(decoded)
        for name in ("loc", "probs"):  # torch would draw integers from NaN
            if torch.is_tensor(getattr(base, name, None)):
                self._check_outcome(getattr(base, name))
        return draw(decoded)

    def decode(self, x: Tensor) -> TorchDistribution:
        """The distribution of data given the last state x_{t_0}, batch + event (one network evaluation)."""
        process = self.denoiser.process
        if self._validate_args:
            check_event_shape("x", x, self.event_shape)
            check_finite("x", x)
        start = self._levels(x).at(0)
        posterior = self.posterior(x, start)
        return self.decoder(posterior, start, process)

    def _first_guess(self, sample_shape: Shape) -> Tensor:
        x = self._prior_draw(sample_shape)
        levels = self._levels(x)
        posterior = self.posterior(x, levels.at(-1))
        return self.decoder(posterior, levels.at(0), self.denoiser.process).sample()

    @property
    def _fair_share(self) -> float:
        """The decoder's share of the evaluations were all terms alike."""
        return 0.0

    @property
    def _span(self) -> float:
        """The whole path's measure: the reverse term is this times its mean over positions in [0, 1)."""
        return 1.0

    def _costs(self, value: Tensor, x0: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's cost where a position is negative, and the reverse cost where it is in [0, 1).

        Only one is meant for each datum; the other is finite and to be discarded.
        """
        raise NotImplementedError

    def _prior_term(self, x0: Tensor) -> Tensor:
        process = self.denoiser.process
        dtype = x0.dtype if x0.is_floating_point() else self.dtype
        end = self._levels(x0).at(-1)
        prior = process.prior(self.event_shape, dtype=dtype, device=x0.device)
        prior = prior.expand(x0.shape[: x0.dim() - len(self.event_shape)])
        return self.objective.prior_term(process, x0, end, prior)

    def _check_prior(self, term: Tensor) -> None:
        """Refuse a prior that leaves out states which the process ends in."""
        if not bool(term.detach().isfinite().all()):
            process = self.denoiser.process
            prior = per_coordinate(process.prior(self.event_shape))
            raise ValueError(
                f"prior: got {type(prior).__name__} at t = 1 of {type(process).__name__}, from which x_1 of "
                "the data diverges by NaN or infinitely, expected one with a density wherever x_1 may be"
            )

    def _encoded(self, value: Tensor) -> tuple[Tensor, torch.Size]:
        check_tensor("value", value)
        if self._validate_args:
            check_event_shape("value", value, self.event_shape)
            self.decoder.check(value)
        shape = broadcast(
            "value", {"value": value.shape, "distribution": self.batch_shape + self.event_shape}
        )
        own = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        x0 = self.decoder.encode(value, self.dtype or own).expand(shape)
        return x0, shape[: len(shape) - len(self.event_shape)]

    def _once_per_datum(self, x0: Tensor, value: Tensor) -> Tensor:
        """x_0 with size 1 along the batch dimensions in which the context varies and the data do not.

        There one datum is scored under several contexts, such as the classes of an enumerated latent. Their
        differences are what matters, and one level and noise for all of them leaves least noise in these.
        Not along plates: contexts that particles drew are to be averaged over.
        """
        batch = x0.shape[: x0.dim() - len(self.event_shape)]
        index = [slice(None)] * len(batch)
        for dim in range(-len(self._given_batch), 0):
            place = dim - len(self.event_shape)
            alone = value.dim() < -place or value.shape[place] == 1
            if alone and self._given_batch[dim] > 1 and dim not in self._plates:
                index[dim] = slice(0, 1)
        return x0[tuple(index)]

    def _noise_and_places(self, x0: Tensor, batch: torch.Size) -> tuple[NoiseSource, Tensor]:
        """What to score a batch with, and low-discrepancy places in [0, 1), one for each of its data."""
        shard = self._shard if self._shard is not None and self._shard.spans(batch) else None
        noise = scoring_noise(self._seed, self._shard, batch, x0.device)
        # Rows of a global batch have noise each, but one offset.
        shared = noise if shard is None else SeededNoise(self._seed)
        offset = shared.uniform((), torch.empty((), dtype=self._time_dtype(x0), device=x0.device))
        return noise, (offset + _spread(batch, x0.device, shard)) % 1

    def _levels(self, x: Tensor) -> Level:
        process, dtype = self.denoiser.process, self._time_dtype(x)
        process.check_precision(dtype, self.times)
        return process.levels(self.times, dtype, x.device)

    def _time_dtype(self, x0: Tensor) -> torch.dtype:
        return x0.dtype if x0.is_floating_point() else self.dtype or self.times.dtype


def _spread(batch: torch.Size, device: torch.device, shard: Shard | None) -> Tensor:
    """The numbers i/B of a batch, each once, so that every slice of it is spread evenly over [0, 1), too.

    Of a shard they are its part of the numbers of the whole batch.

    Slices are the particles or the classes of an enumerated latent: in plain order, each would get a narrow
    range of positions. Numbered by multiples of the golden section, any run of consecutive ones is spread.
    """
    whole = batch if shard is None else (*batch[:-1], shard.size)
    count = int(math.prod(whole))  # a tensor where torch.jit traces
    own = torch.arange(count, device=device) if shard is None else shard.index(batch, device)
    index = own.reshape(batch)
    if sum(size > 1 for size in whole) > 1:
        step = round(count * (math.sqrt(5) - 1) / 2)
        while math.gcd(step, count) > 1:
            step += 1
        index = index * step % count
    return index / count
