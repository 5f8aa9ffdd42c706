"""A diffusion over a vector of which any coordinates may be given, and the conditionals that it holds."""

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Delta, Normal, TorchDistribution
from pyro.distributions.transforms import AffineTransform
from torch import Tensor, nn

from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser
from pyro_diffusion.distributions import Diffusion, ProbabilityFlow
from pyro_diffusion.distributions.decoders import NormalDecoder
from pyro_diffusion.distributions.objectives import Objective
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.infer.simulators.conditional_posterior import FlowPosterior, focused_times
from pyro_diffusion.infer.simulators.linear_part import LinearPart
from pyro_diffusion.infer.simulators.standardized import Familiar, Standardized
from pyro_diffusion.nn import SiteTransformer
from pyro_diffusion.processes import Ability, ForwardProcess, GaussianProcess
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level, LogLinear

__all__ = ["JointLaw", "MakeSiteDenoiser", "default_site_denoiser"]

ROWS = 2000  # simulations that are kept, to tell whether given values look like them

MakeSiteDenoiser = Callable[[int, Tensor | None], Denoiser]


def default_site_denoiser(size: int, graph: Tensor | None) -> Denoiser:
    """A transformer of four blocks of 32 with attention along the graph, under log-SNRs from 12 to -8."""
    network = SiteTransformer(size, width=32, heads=2, graph=graph)
    dims = {"given": 1, "conditioned": 1}
    return GaussianDenoiser(
        network, GaussianProcess(LogLinear(12.0, -8.0)), context_event_dims=dims
    )


def _check_process(process: ForwardProcess) -> None:
    """Refuse noise that is not normal, or differs by coordinate: those that are free would take others'."""
    needs = (Ability.TWEEDIE, Ability.ISOTROPIC, Ability.ODE)
    require(process, *needs, argument="denoiser", by="a joint distribution")


class _Known(Denoiser):
    """A denoiser with its linear part, that knows what is given; so its terms of any bound are 0."""

    point_mass = True

    def __init__(self, denoiser: Denoiser, linear: LinearPart) -> None:
        super().__init__(denoiser.process)
        self.denoiser, self.linear = denoiser, linear

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        _check_process(self.process)
        level = self.process.level(t, xt, state="xt")
        given, conditioned = context["given"], context["conditioned"]
        mean = self.denoiser(xt, level, given=given, conditioned=conditioned).mean
        mean = mean + self.linear(xt, level, given, conditioned)
        return Delta(torch.where(conditioned, given, mean), event_dim=1, validate_args=False)

    def context_event_dim(self, name: str, value: Tensor) -> int:
        return 1


class _Free(Denoiser):
    """The coordinates that are not given, alone: a denoiser of one conditional."""

    point_mass = True
    conditioned: Tensor
    free: Tensor

    def __init__(self, known: _Known, conditioned: Tensor) -> None:
        super().__init__(known.process)
        self.known = known
        self.register_buffer("conditioned", conditioned)
        self.register_buffer("free", (~conditioned).nonzero().squeeze(1))

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        level = self.process.level(t, xt, state="xt")
        shape = (*xt.shape[:-1], len(self.conditioned))
        given = context["given"].to(xt.dtype).expand(shape)
        whole = given.index_copy(-1, self.free, xt)
        out = self.known(whole, level, given=given, conditioned=self.conditioned.expand(shape))
        return Delta(out.mean.index_select(-1, self.free), event_dim=1, validate_args=False)

    def context_event_dim(self, name: str, value: Tensor) -> int:
        return 1


class _FreeDecoder(NormalDecoder):
    """Scores only what is not given, so that a bound is one of log q(free | given)."""

    def __init__(self, conditioned: Tensor) -> None:
        super().__init__()
        self._conditioned = conditioned

    def forward(
        self, posterior: TorchDistribution, t: Level, process: ForwardProcess
    ) -> TorchDistribution:
        scale = (-0.5 * t.log_snr).exp()
        own = Normal(posterior.mean, scale, validate_args=False)
        return own.mask(~self._conditioned).to_event(1)

    def baseline(self, t: Level, event_shape: torch.Size) -> Tensor | float:
        free = (~self._conditioned).sum(-1)
        return 0.5 * free * (math.log(2 * math.pi * math.e) - t.log_snr.mean())


class JointLaw(nn.Module):
    """What is learned of a vector: its scales, and a denoiser of each of its conditionals.

    Args:
        size: number of unconstrained coordinates, M.
        graph: (M, M) booleans, which are neighbours; None if all may be.
        make_denoiser: a function of both.
        rows: simulations of a state that is loaded.

    Raises:
        ValueError: for a denoiser of another kind.
    """

    count: Tensor
    rows: Tensor
    graph: Tensor | None

    def __init__(
        self, size: int, graph: Tensor | None, make_denoiser: MakeSiteDenoiser, rows: int = 0
    ) -> None:
        super().__init__()
        self.latents = Standardized((size,))
        denoiser = make_denoiser(size, graph)
        if not isinstance(denoiser, Denoiser) or not denoiser.point_mass:
            raise ValueError(
                f"denoiser: got a function that returned {type(denoiser).__name__}, expected a Denoiser with "
                "a point mass as posterior"
            )
        _check_process(denoiser.process)
        self.denoiser = _Known(denoiser, LinearPart(size))
        self.register_buffer("graph", graph)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("rows", torch.zeros(rows, size))

    # what SimulatedLatents asks of what it trains; there are no data beside the coordinates
    _sites: tuple[Standardized, ...] = ()

    @property
    def latent_size(self) -> int:
        """Number of unconstrained coordinates."""
        return self.latents.loc.numel()

    def fit_scales(self, latents: Tensor, data: Any = ()) -> None:
        """Take scales from simulations, (n, M), and keep some of them."""
        self.latents.fit(latents)
        self.denoiser.linear.fit(self.latents(latents), self.graph)
        self.rows = self.latents(latents[:ROWS])
        self.count.fill_(len(latents))

    def diffusion(
        self, values: Tensor, conditioned: Tensor, objective: Objective | None
    ) -> Diffusion:
        """How standardized values (N, M) are distributed given those of them that a mask (N, M) says."""
        _check_process(self.denoiser.process)
        return Diffusion(
            self.denoiser,
            (self.latent_size,),
            times=focused_times(self.denoiser.process),
            decoder=_FreeDecoder(conditioned),
            objective=objective,
            context={"given": values, "conditioned": conditioned},
        )

    def flow(self, given: Tensor, conditioned: Tensor, solver: ODESolver) -> FlowPosterior:
        """The law of the free coordinates, unconstrained, given those that a mask (M,) says.

        Args:
            given: standardized values, batch + (M,), of which the free ones are not looked at.
            conditioned: the mask.
            solver: of the probability flow.
        """
        denoiser, free = _Free(self.denoiser, conditioned), ~conditioned
        flow = ProbabilityFlow(
            denoiser, (int(free.sum()),), solver=solver, context={"given": given}
        )
        scale = AffineTransform(self.latents.loc[free], self.latents.scale[free], event_dim=1)
        return FlowPosterior(flow, [scale])

    def familiar(self, conditioned: Tensor) -> Familiar:
        """The distances from their mean of given coordinates in simulations."""
        own = Familiar(int(conditioned.sum())).to(self.rows)
        own.fit(self.rows[:, conditioned])
        return own
