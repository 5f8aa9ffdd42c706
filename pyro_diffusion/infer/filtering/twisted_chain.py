"""A reverse chain under twists, as the model and the guide of a particle filter."""

import math
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.smcfilter import SMCFailed
from torch import Tensor

from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import GuidedDenoiser, Twisted
from pyro_diffusion.guidance.proposal import told, told_at_last
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.processes.conditioned_normal import ConditionedNormal
from pyro_diffusion.schedules.base import Grid, table_row
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["Proposal", "Target", "TwistedChain"]

# Twists are raised by what gives a particle this share of the mean: one that a twist misjudges can come back.
SPARED = 0.01


class TwistedChain:
    """What model and guide share: one guided evaluation at a state gives its twist and the next two kernels.

    A diffusion of more batch dimensions than the likelihood's is that many chains of the same posterior. The
    likelihood is the target's; the guided denoiser may know another, which makes its twist. Kernels are
    kept in the filter's state as the tensors that define them, under keys such as ``"prior.loc"``, so that
    they are resampled with the particles they belong to.
    """

    def __init__(
        self, diffusion: Diffusion, guided: GuidedDenoiser, likelihood: Likelihood
    ) -> None:
        self.diffusion, self.guided, self.likelihood = diffusion, guided, likelihood
        self.process = diffusion.denoiser.process
        self.process.check_density()
        self.device = diffusion.device or diffusion.times.device
        prior = self.process.prior(
            diffusion.event_shape, dtype=diffusion.dtype, device=diffusion.device
        )
        self.prior = prior.expand(diffusion.batch_shape)
        self._like = self.prior.sample()
        self.renew()
        # Data that have observations of their own are filtered side by side.
        batch = diffusion.batch_shape
        chains = batch[: len(batch) - len(likelihood.batch_shape)]
        self.filters = batch if likelihood.factorized else chains

    def repeated(self, count: int) -> "TwistedChain":
        """As many chains of the same posterior, side by side."""
        several = self.diffusion.expand((count, *self.diffusion.batch_shape))
        return TwistedChain(several, self.guided, self.likelihood)

    def check_path(self, path: Sequence[Tensor]) -> None:
        """Refuse what is no path: a state at every time, all alike, and the data at its end."""
        count, shape = len(self.diffusion.times) + 1, self._like.shape
        shapes = {tuple(x.shape) for x in path[:-1]}
        if len(path) != count or shapes != {tuple(shape)}:
            raise ValueError(
                f"path: got {len(path)} states of shapes {sorted(shapes)}, expected {count} of shape "
                f"{tuple(shape)}, from noise to data, as a sweep returns them"
            )

    def renew(self) -> None:
        """Evaluate the schedule as it is now: it may have been trained or loaded since."""
        with torch.inference_mode(False), torch.no_grad():
            self.grid = Grid(*self.diffusion._levels(self._like))
            early, late = (
                Grid(*(v[part] for v in self.grid)) for part in (slice(-1), slice(1, None))
            )
            self.coefficients = self.process.coefficients(early, late)

    def encoded(self, x: Tensor) -> Tensor:
        """Data as the likelihood takes them."""
        own = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        return self.diffusion.decoder.encode(x, self.diffusion.dtype or own)

    def evaluate(self, state: Any, x: Tensor, stage: int) -> Tensor:
        """Keep the kernels that leave a state at t_stage, and return its log-twist: one evaluation."""
        level = self.grid.row(stage)
        x, context = self.diffusion.with_context(x)
        twisted = self.guided.twisted(x, level, **context)
        kernels = self._kernels(x, twisted, stage)
        source = self.process if stage > 0 else self.diffusion.decoder
        for name, kernel in kernels.items():
            for key in [key for key in state if key.startswith(f"{name}.")]:
                del state[key]
            tensors = source.kernel_tensors(self._per_particle(kernel, x))
            for key, tensor in tensors.items():
                state[f"{name}.{key}"] = tensor.contiguous()
        return twisted.log_twist

    def _kernels(self, x: Tensor, twisted: Twisted, stage: int) -> dict[str, TorchDistribution]:
        """The kernels that leave a state at t_stage: the chain's own and the proposal."""
        readings, both = twisted.readings, (twisted.prior, twisted.posterior)
        if stage > 0:
            row: Any = table_row(self.coefficients, stage - 1)
            own, guided = (self.process.combine(x, posterior, row) for posterior in both)
            if readings is not None and readings.fit(guided):
                guided = told(guided, readings, row.x0)
            followed = self.guided.follow(own, self.grid.row(stage - 1))
        else:
            decoder, level = self.diffusion.decoder, self.grid.row(stage)
            own, guided = (decoder(posterior, level, self.process) for posterior in both)
            if readings is not None and decoder.keeps_x0 and readings.fit(own):
                guided = told_at_last(own, readings)
            followed = self.guided.follow(own, None) if decoder.keeps_x0 else None
        return {"prior": own, "posterior": guided if followed is None else followed}

    def per_filter(self, log_prob: Tensor) -> Tensor:
        """One number a particle and filter, (N,) + filters, in double precision."""
        shape = (len(log_prob), *self.filters, -1)
        return log_prob.to(torch.float64).reshape(shape).sum(-1)

    def _per_particle(self, kernel: TorchDistribution, x: Tensor) -> TorchDistribution:
        """A kernel at the full batch shape of the states: a filter resamples by the leading dimension."""
        batch = x.shape[: x.dim() - self.process.event_dim]
        return kernel if kernel.batch_shape == batch else kernel.expand(batch)

    def kernel(self, state: Any, name: str, stage: int) -> TorchDistribution:
        """The kernel to t_stage (below 0, to the data) that :meth:`evaluate` kept, as it was resampled."""
        prefix = f"{name}."
        tensors = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if stage >= 0:
            return self.process.kernel_from(tensors)
        return self.diffusion.decoder.kernel_from(tensors, self.process.event_dim)

    def join(self, state: Any, x: Tensor, place: int) -> Tensor:
        """Log-density of x after each particle, divided by the particle's twist, (N,) + filters.

        Args:
            state: the filter's.
            x: the state that comes next.
            place: its place in the path, 0 at t_K.
        """
        kernel = self.kernel(state, "prior", self.diffusion.steps - place)
        return self.per_filter(kernel.log_prob(x)) - self.per_filter(state["log_twist"])


class Proposal:
    """The guided chain, as the filter's guide."""

    def __init__(self, chain: TwistedChain) -> None:
        self.chain = chain

    def init(self, state: Any, stage: int) -> None:
        """Draw from the prior at t_K."""
        pyro.sample("x", self.chain.prior.expand_by((state._num_particles,)))

    def step(self, state: Any, stage: int) -> None:
        """Draw from the guided kernel, or at the end from the guided decoder."""
        pyro.sample("x", self.chain.kernel(state, "posterior", stage))


class Target:
    """The chain itself under twists, as the filter's model."""

    def __init__(self, chain: TwistedChain) -> None:
        self.chain = chain

    def init(self, state: Any, stage: int) -> None:
        """The prior at t_K, and its twist."""
        x = pyro.sample("x", self.chain.prior.expand_by((state._num_particles,)))
        log_twist = self.chain.evaluate(state, x, stage)
        self._weigh(state, x, self._spared(state._log_weights, log_twist))

    def step(self, state: Any, stage: int) -> None:
        """The chain's own kernel to t_stage and the twist there; below 0, the data and their likelihood."""
        kernel = self.chain.kernel(state, "prior", stage)
        x = pyro.sample("x", kernel)
        if stage >= 0:
            proposal = self.chain.kernel(state, "posterior", stage)
            base = torch.zeros_like(state._log_weights)
            if isinstance(per_coordinate(proposal), ConditionedNormal):
                base = state._log_weights - self.chain.per_filter(state["log_twist"])
                base = base + self.chain.per_filter(kernel.log_prob(x) - proposal.log_prob(x))
            log_twist = self.chain.evaluate(state, x, stage)
            self._weigh(state, x, self._spared(base, log_twist))
        else:
            self._weigh(state, x, self.chain.likelihood.log_prob(self.chain.encoded(x)))

    def _spared(self, base: Tensor, log_twist: Tensor) -> Tensor:
        """The twist, raised where base and twist leave a particle less than a share of their filter's mean.

        Where the proposal follows the twist the base is the weight without it: the two differ by hundreds of
        nats and cancel. Other proposals say nothing of the twist, and it is compared with its own mean: one
        that denies what the likelihood allows would let a single particle outweigh all in the end. Any
        positive twist that is a function of the particles leaves the evidence unbiased.
        """
        own = self.chain.per_filter(log_twist)
        mean = (base + own).logsumexp(0) - math.log(len(base))
        least = math.log(SPARED) + mean - base
        raised = torch.logaddexp(own, least.where(least < math.inf, -math.inf))
        # A twist that denies all particles says nothing.
        raised = raised.where(mean != -math.inf, 0.0)
        plates = len(self.chain.diffusion.batch_shape) + 1 - base.dim()
        return raised.reshape(*base.shape, *(1,) * plates)

    def _weigh(self, state: Any, x: Tensor, log_twist: Tensor) -> None:
        """The new twist in place of the old."""
        factor = log_twist - state.get("log_twist", 0.0)
        broken = ~(factor < math.inf)
        if bool(broken.any()):
            # Filters stand on their own: one that cannot be weighed has no weights.
            dims = [0, *range(1 + len(self.chain.filters), factor.dim())]
            broken = broken.amax(dims, keepdim=True)
            if bool(broken.all()):
                raise SMCFailed("NaN or an infinite density")
            factor = factor.masked_fill(broken, -math.inf)
            log_twist = log_twist.masked_fill(broken, 0.0)
        pyro.factor("twist", factor)
        state["x"], state["log_twist"] = x, log_twist
