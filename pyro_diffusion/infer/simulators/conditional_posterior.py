"""A conditional diffusion as a posterior of a vector of latents given data."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TransformedDistribution
from pyro.distributions.transforms import AffineTransform
from torch import Tensor, nn

from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser
from pyro_diffusion.distributions import Diffusion, ProbabilityFlow
from pyro_diffusion.distributions.objectives import Objective
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.infer.simulators.bounded_prediction import BoundedPrediction
from pyro_diffusion.infer.simulators.linear_regression import (
    MOST,
    Column,
    LinearlyRegressed,
    regressed,
)
from pyro_diffusion.infer.simulators.standardized import Familiar, Standardized
from pyro_diffusion.nn import ConditionalMLP
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear

__all__ = [
    "ConditionalPosterior",
    "FlowPosterior",
    "MakeDenoiser",
    "check_denoiser",
    "check_summary",
    "default_denoiser",
    "encoded_size",
    "flow_posterior",
    "focused_times",
    "observed_diffusion",
]

STEPS, CENTRE, WIDTH = 1000, 3.0, 4.0  # of the chain in training: log-SNRs
CONTEXT = "y"
NEAR = 1e-3  # of standardized data: other than by rounding, or by a scale that was taken anew

MakeDenoiser = Callable[[int, int], Denoiser]


def default_denoiser(latent_size: int, features: int) -> Denoiser:
    """A perceptron on latents and summary, under log-SNRs from 12 to -8."""
    network = ConditionalMLP(latent_size, features)
    return GaussianDenoiser(network, GaussianProcess(LogLinear(12.0, -8.0)))


class ConditionalPosterior(nn.Module):
    """What is learned: scales of latents and data, the summary, and the denoiser given it.

    Args:
        latent_size: length of the vector of unconstrained latents.
        observed: the shape of each observed site, and which logarithm is taken, see ``Standardized``.
        summary: a module from standardized data to vectors; None for the data themselves.
        make_denoiser: a function of the sizes of latents and summary.
        bounded: which of the latents lie in an interval. The default denoiser sees data, without a summary,
            beside what a regression of these latents on them predicts.

    Raises:
        ValueError: for a summary or a denoiser of another kind.
    """

    count: Tensor
    focus: Tensor

    def __init__(
        self,
        latent_size: int,
        observed: Sequence[tuple[torch.Size, int]],
        summary: nn.Module | None,
        make_denoiser: MakeDenoiser,
        bounded: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.latents = Standardized((latent_size,))
        self.observed = nn.ModuleList(Standardized(*each) for each in observed)
        size = sum(shape.numel() for shape, _ in observed)
        self.familiar = Familiar(size)
        self.summary = summary
        if summary is not None:
            zeros = [each.loc.new_zeros((2, *each.loc.shape)) for each in self._sites]
            with torch.no_grad():
                size = check_summary(summary(*zeros), 2).shape[1]
        plain = summary is None and make_denoiser is default_denoiser
        # what is added is regressed on in turn, which has limits: none where it would be too many
        few = latent_size <= MOST and size + len(bounded) <= MOST
        self.prediction = BoundedPrediction(bounded if plain and few else (), size)
        size += self.prediction.size
        self.denoiser = make_denoiser(latent_size, size)
        check_denoiser(self.denoiser)
        if plain:
            self.denoiser = regressed(self.denoiser, latent_size, [Column.VALUE] * size)
        # simulations that the scales were taken from
        self.register_buffer("count", torch.tensor(0))
        # the only data that it is to be asked about, standardized; NaN if about any
        self.register_buffer("focus", torch.full((self.familiar.loc.numel(),), math.nan))

    @property
    def _sites(self) -> list[Standardized]:
        return list(self.observed)  # type: ignore[arg-type]

    @property
    def latent_size(self) -> int:
        """Length of the vector of unconstrained latents."""
        return self.latents.loc.numel()

    def fit_scales(self, latents: Tensor, data: Sequence[Tensor]) -> None:
        """Take all scales from simulations: (n, latent size), and (n,) + the shape of each observed site."""
        self.latents.fit(latents)
        for site, x in zip(self._sites, data, strict=True):
            site.fit(x)
        rows = self.rows(data, latents.shape[:1])
        self.familiar.fit(rows)
        self.prediction.fit(latents, rows)
        if isinstance(self.denoiser, LinearlyRegressed):
            self.denoiser.fit(self.latents(latents), self._predicted(rows))
        self.count.fill_(len(latents))

    def standardized(self, data: Sequence[Tensor]) -> list[Tensor]:
        """Data on the scale of the simulations."""
        return [site(x) for site, x in zip(self._sites, data, strict=True)]

    def rows(self, data: Sequence[Tensor], batch: torch.Size) -> Tensor:
        """Standardized data as vectors, batch + (size,)."""
        return torch.cat([x.reshape(*batch, -1) for x in self.standardized(data)], -1)

    def focus_on(self, data: Sequence[Tensor]) -> None:
        """Be trained for these data alone, one observation."""
        self.focus.copy_(self.rows(data, torch.Size()))

    def is_other(self, rows: Tensor) -> Tensor:
        """Whether it was trained for other data alone, of standardized rows (..., size) -> (...)."""
        far = (rows - self.focus).abs() > NEAR * (1 + self.focus.abs())
        return far.any(-1)

    def context(self, data: Sequence[Tensor], batch: torch.Size) -> Tensor:
        """The summary of data, batch + (features,)."""
        if self.summary is None:
            return self._predicted(self.rows(data, batch))
        flat = [
            x.reshape(-1, *site.loc.shape)
            for x, site in zip(self.standardized(data), self._sites, strict=True)
        ]
        return check_summary(self.summary(*flat), len(flat[0])).reshape(*batch, -1)

    def _predicted(self, rows: Tensor) -> Tensor:
        """Standardized data, and what they predict of bounded latents, batch + (features,)."""
        if not self.prediction.size:
            return rows
        return torch.cat([rows, self.prediction(rows, self.latents)], -1)

    def diffusion(self, context: Tensor, objective: Objective | None) -> Diffusion:
        """How standardized latents are distributed; simulated ones are observed under it."""
        return observed_diffusion(self.denoiser, self.latent_size, context, objective)

    def flow(self, context: Tensor, solver: ODESolver) -> "FlowPosterior":
        """The posterior of unconstrained latents, by the probability flow."""
        return flow_posterior(self.denoiser, self.latents, context, solver)


def observed_diffusion(
    denoiser: Denoiser, size: int, context: Tensor, objective: Objective | None
) -> Diffusion:
    """The distribution of standardized latents under which simulated ones are observed."""
    times = focused_times(denoiser.process)
    return Diffusion(
        denoiser, (size,), times=times, objective=objective, context={CONTEXT: context}
    )


def flow_posterior(
    denoiser: Denoiser, scale: Standardized, context: Tensor, solver: ODESolver
) -> "FlowPosterior":
    """The distribution of unconstrained latents, by the probability flow of standardized ones."""
    size = scale.loc.numel()
    flow = ProbabilityFlow(denoiser, (size,), solver=solver, context={CONTEXT: context})
    return FlowPosterior(flow, [AffineTransform(scale.loc, scale.scale, event_dim=1)])


def check_denoiser(denoiser: Any) -> None:
    """Refuse what a function for denoisers returned, if it is none."""
    if not isinstance(denoiser, Denoiser):
        raise ValueError(
            f"denoiser: got a function that returned {type(denoiser).__name__}, expected a Denoiser"
        )


def focused_times(process: Any) -> Tensor:
    """Steps even in the process's clock within about `WIDTH` of `CENTRE`, and growing beyond it."""
    high, low = (math.asinh((end - CENTRE) / WIDTH) for end in process.finite_clock_ends())
    place = torch.linspace(high, low, STEPS + 1, dtype=torch.float64)
    times: Tensor = process.level_of_clock(CENTRE + WIDTH * torch.sinh(place)).t.flatten()
    times[0], times[-1] = 0.0, 1.0
    return times.to(torch.get_default_dtype())


def check_summary(out: Any, count: int) -> Tensor:
    """What a summary returned of so many data, if it is (count, features)."""
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != count:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"summary: got {shape} for {count} data, expected ({count}, features)")
    return out


def encoded_size(module: nn.Module, *shapes: Sequence[int]) -> int:
    """Features that a module returns of data of these shapes, with as many arguments."""
    dtype = next((p.dtype for p in module.parameters()), torch.get_default_dtype())
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    zeros = [torch.zeros(2, *shape, dtype=dtype, device=device) for shape in shapes]
    with torch.no_grad():
        return check_summary(module(*zeros), 2).shape[1]


class FlowPosterior(TransformedDistribution):
    """A flow whose draws are constants for autograd, and whose density follows only the value's graph."""

    has_rsample: ClassVar[bool] = False

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, batch shape."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and value.requires_grad):
            out: Tensor = super().log_prob(value)
        return out
