"""What the rows of other noises share: points of known weights, whose posterior is exact under any noise."""

import torch
from pyro.distributions import Categorical, Delta, MixtureSameFamily, TorchDistribution
from torch import Tensor
from torch.distributions import register_kl

from process_rows import STEPS, bound_gaps, frequencies
from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.denoisers.discrete import Quantized
from pyro_diffusion.distributions import Diffusion, ProbabilityFlow, QuantizedDecoder
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.processes import ForwardProcess, StudentTProcess
from pyro_diffusion.processes.multivariate_t import DiagonalStudentT
from pyro_diffusion.samplers import Sampler
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate

F64 = torch.float64
COUNT, END = 8, 1.8
PLACES = torch.linspace(-END, END, COUNT, dtype=F64).unsqueeze(-1)
WEIGHTS = torch.exp(-0.5 * PLACES[:, 0].square()) / torch.exp(-0.5 * PLACES.square()).sum()


class Points(Denoiser):
    """The posterior of COUNT evenly spaced numbers, or its mean."""

    def __init__(self, process: ForwardProcess, mean_only: bool = False) -> None:
        super().__init__(process)
        self.point_mass = mean_only

    def marginal(self, level: Level) -> TorchDistribution:
        """The mixture that x_t is drawn from."""
        parts = self.process.noised(level.alpha * PLACES, level.sigma)
        return MixtureSameFamily(Categorical(WEIGHTS), parts)

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0."""
        level = self.process.level(t, xt, state="xt")
        alpha, sigma = (v.unsqueeze(-2) if v.dim() else v for v in (level.alpha, level.sigma))
        evidence = self.process.noised(alpha * PLACES, sigma).log_prob(xt.unsqueeze(-2))
        logits = WEIGHTS.log() + evidence
        if self.point_mass:
            return Delta(logits.softmax(-1) @ PLACES, event_dim=1)
        return Quantized(logits.unsqueeze(-2), PLACES[:, 0]).to_event(1)


class ExactStudentT(StudentTProcess):
    """Its kernel for such a posterior is the mixture of the bridges of all points."""

    def combine(
        self, xt: Tensor, posterior: TorchDistribution, coefficients: tuple[Tensor, ...]
    ) -> TorchDistribution:
        """The reverse kernel."""
        base = per_coordinate(posterior)
        if not isinstance(base, Quantized):
            return super().combine(xt, posterior, coefficients)
        points = PLACES.expand(*xt.shape[:-1], COUNT, 1)
        wide = type(coefficients)(*(c.unsqueeze(-2) if c.dim() else c for c in coefficients))
        parts = super().combine(xt.unsqueeze(-2), self.point_mass(points), wide)
        return MixtureSameFamily(Categorical(logits=base.logits.squeeze(-2)), parts)


@register_kl(DiagonalStudentT, MixtureSameFamily)
def _divergence(p: DiagonalStudentT, q: MixtureSameFamily) -> Tensor:
    """Of one coordinate, by the trapezoidal rule in u with z = sinh(u)."""
    u = torch.linspace(-6.0, 6.0, 41, dtype=F64)
    standard = DiagonalStudentT(p.df, torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64), 1)
    weight = standard.log_prob(u.sinh().unsqueeze(-1)).exp() * u.cosh()
    weight = weight / weight.sum()
    x = p.loc + p.scale * u.sinh().reshape(-1, *(1,) * p.loc.dim())
    return (weight.reshape(-1, *(1,) * (p.loc.dim() - 1)) * (p.log_prob(x) - q.log_prob(x))).sum(0)


def bounds(process: ForwardProcess, draws: int) -> dict[str, tuple[float, float]]:
    """log p less the chain's bound, by number of steps."""
    x = torch.multinomial(WEIGHTS, draws, replacement=True).unsqueeze(-1)
    decoder = QuantizedDecoder(COUNT, -END, END)

    def view(denoiser: Denoiser, steps: int | None) -> Diffusion:
        assert steps is not None
        return Diffusion(denoiser, (1,), steps, decoder=decoder)

    return bound_gaps(view, (Points(process), WEIGHTS.log()[x[:, 0]]), x, steps=STEPS)


def sampled(process: ForwardProcess, samplers: dict[str, Sampler], draws: int) -> dict[str, float]:
    """Frequencies of the points among samples of 300 steps, as standard normal numbers."""
    decoder, denoiser = QuantizedDecoder(COUNT, -END, END), Points(process)
    view = Diffusion(denoiser, (1,), 300, decoder=decoder)
    count = (min(draws, 20_000),)
    return {
        name: frequencies(view.replace(sampler=sampler).sample(count), WEIGHTS)
        for name, sampler in samplers.items()
    }


def density(process: ForwardProcess, steps: int = 400) -> float:
    """Largest error of the flow's log-density, of the points blurred by the noise that is left at t = 0."""
    denoiser = Points(process, mean_only=True)
    level = process.level(torch.tensor(0.0, dtype=F64))
    blurred = denoiser.marginal(level)
    x = blurred.sample((100,))
    flow = ProbabilityFlow(denoiser, (1,), solver=ODESolver("rk4", steps=steps))
    wanted = blurred.log_prob(x) + level.alpha.log().sum()
    return float((flow.log_prob(x / level.alpha) - wanted).abs().max())
