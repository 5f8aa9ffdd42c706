r"""What a denoiser's derivative is worth at each noise level, by draws of its own chain."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.kept import Kept
from pyro_diffusion.guidance.linear_estimate import LinearEstimate
from pyro_diffusion.likelihoods.run import isolated
from pyro_diffusion.precision import matmul
from pyro_diffusion.processes import draw, drawing_from
from pyro_diffusion.processes.noise import SeededNoise
from pyro_diffusion.samplers import Ancestral, simulate
from pyro_diffusion.schedules import Level
from pyro_diffusion.schedules.base import Row

__all__ = ["Calibration", "calibrate", "calibrated"]

DRAWS, STEPS = 256, 32  # of the prior, for C
KNOTS, STATES, PROBES = (
    16,
    64,
    4,
)  # levels; states of x_t at each; directions in which V is found there
SEED = 0
AT_ONCE = 2**18  # numbers in the data of one evaluation

# What an exact denoiser passes at every level, but for one false alarm in some thousands of runs where every
# part of its data is met by some of the states: rare clusters far away are missed, and fail it.
ERRORS = 4.0  # standard errors that mean variance and mean squared error may differ by, beyond
SHARE = 0.5  # this share of either
NEGATIVE = 0.1  # most that negative eigenvalues may make up of all, by absolute value; 0 if exact
ASYMMETRY = 0.01  # largest norm of V - V^T over that of V + V^T; 0 if exact
SCALES = (0.1, 1.0)  # of the linear estimate, which no covariance exceeds on average


class Evidence(NamedTuple):
    """What was found at each level, (knots,).

    Attributes:
        variance: mean of :math:`z^T V z` over states and directions z.
        error: mean of :math:`(z^T (x_0 - \\hat x_0))^2`, its expectation for an exact denoiser.
        spread: standard error of their difference.
        negative: share of negative eigenvalues in V on the directions, by absolute value.
        asymmetry: :math:`|V - V^T| / |V + V^T|` there.
    """

    variance: Tensor
    error: Tensor
    spread: Tensor
    negative: Tensor
    asymmetry: Tensor

    @property
    def trusted(self) -> Tensor:
        """Whether V passes, (knots,)."""
        room = ERRORS * self.spread + SHARE * torch.minimum(self.variance.abs(), self.error)
        agrees = (self.variance - self.error).abs() <= room
        return agrees & (self.negative <= NEGATIVE) & (self.asymmetry <= ASYMMETRY)


class Calibration(NamedTuple):
    """What is known of a denoiser before any observation.

    Attributes:
        estimate: of its data's covariance.
        clocks: increasing noise levels, (knots,).
        evidence: found at each.
        trusted: whether the derivative is a covariance there, (knots,).
        scale: of the linear estimate where it is not, (knots,).
        differentiable: whether the denoiser's mean has a gradient at all.
    """

    estimate: LinearEstimate
    clocks: Tensor
    evidence: Evidence
    trusted: Tensor
    scale: Tensor
    differentiable: bool

    def trusts(self, level: Level) -> Tensor | bool:
        """Whether the derivative passed at both knots around a time; a tensor where times disagree.

        Its shape is that of ``level.clock``. A row of a grid waits for the device once for all rows.
        """
        if isinstance(level, Row):
            decisions: list[Any] = level.grid.table(self._decisions)
            return bool(decisions[level.place])
        trusted = self._passed(level.clock)
        every, some = bool(trusted.all()), bool(trusted.any())
        return every if every == some else trusted

    def scale_at(self, level: Level) -> Tensor | float:
        """The scale at a level, linear in the clock between knots, of the shape of its clock.

        A number at a row of a grid, which waits for the device once for all rows.
        """
        if isinstance(level, Row):
            rows: list[Any] = level.grid.table(self._scales)
            return float(rows[level.place])
        return self._interpolated(level.clock)

    def _decisions(self, grid: Level) -> list[bool]:
        return [bool(v) for v in self._passed(grid.clock).reshape(-1).tolist()]

    def _scales(self, grid: Level) -> list[float]:
        return [float(v) for v in self._interpolated(grid.clock).reshape(-1).tolist()]

    def _passed(self, clock: Tensor) -> Tensor:
        _, above = self._knots(clock)
        passed = self.trusted.to(clock.device)
        return passed[above] & passed[above - 1]

    def _interpolated(self, clock: Tensor) -> Tensor:
        knots, above = self._knots(clock)
        low, high = knots[above - 1], knots[above]
        part = ((clock.detach() - low) / (high - low)).clamp(0, 1)
        scale = self.scale.to(knots)
        return torch.lerp(scale[above - 1], scale[above], part)

    def _knots(self, clock: Tensor) -> tuple[Tensor, Tensor]:
        """The knots, and the place of the one above each time."""
        knots = self.clocks.to(clock)
        places = torch.bucketize(clock.detach().contiguous(), knots)
        return knots, places.clamp(1, len(knots) - 1)


def calibrate(denoiser: Denoiser, like: Tensor, context: dict[str, Tensor]) -> Calibration:
    r"""Draw from a denoiser's own chain, and compare :math:`V = (\sigma^2/\alpha) J^T` with its errors.

    For an exact denoiser V is the covariance of :math:`x_0 - \hat x_0` given x_t: on average over x_t its
    diagonal in any direction is the mean squared error, and it is symmetric and positive at every x_t. At
    each of 16 levels this is checked at 64 states in 4 directions, the principal components of the data
    first. The scale of the linear estimate is its share of the squared error at these states.

    About 13 000 evaluations for a datum and context, 8 000 of them for 256 draws of 32 steps. They
    use a generator of their own: global seeds are untouched, and the outcome is always the same.

    Args:
        denoiser: any, under a process with Tweedie's formula.
        like: a datum's shape, dtype and device.
        context: of one datum.
    """
    process = denoiser.process
    context = {name: value.expand(DRAWS, *value.shape) for name, value in context.items()}
    event, dtype, device = like.shape, like.dtype, like.device
    with drawing_from(SeededNoise(SEED)), isolated(), torch.inference_mode(False):
        with torch.no_grad():
            start = draw(process.prior(event, dtype=dtype, device=device), (DRAWS,))
            times = torch.linspace(0, 1, STEPS + 1, dtype=dtype, device=device)
            parts = []
            for rows in _batches(DRAWS, like):
                own = {name: value[rows] for name, value in context.items()}
                x = simulate(denoiser, times, start[rows], Ancestral(), own)
                parts.append(denoiser(x, process.level(times[0], x), **own).mean)
            x0 = torch.cat(parts)
        estimate = LinearEstimate.of_draws(x0.reshape(DRAWS, -1)).to(like)
        directions = _directions(estimate, like)
        low, high = sorted(process.finite_clock_ends())
        clocks = torch.linspace(low, high, KNOTS, dtype=torch.float64, device=device)
        levels = process.level_of_clock(clocks.to(dtype))
        few = {name: value[:STATES] for name, value in context.items()}
        found = [
            _found(denoiser, x0[:STATES], levels.at(k), directions, estimate, few)
            for k in range(KNOTS)
        ]
    evidence = Evidence(*(torch.stack(v) for v in zip(*(own for own, _ in found), strict=True)))
    scale = torch.tensor([own for _, own in found], dtype=torch.float64, device=device)
    known = bool(evidence.variance.isfinite().all())
    return Calibration(estimate, clocks, evidence, evidence.trusted, scale, known)


def _directions(estimate: LinearEstimate, like: Tensor) -> Tensor:
    """Orthonormal directions, (count,) + event: half of them principal components, the others random."""
    n = like.numel()
    count = min(PROBES, n)
    order = estimate.values.argsort(descending=True)
    leading = estimate.vectors[:, order[: count // 2]]
    generator = torch.Generator().manual_seed(SEED)
    size = (n, count - leading.shape[1])
    others = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    basis, _ = torch.linalg.qr(torch.cat([leading, others.to(leading)], 1))
    return basis.mT.reshape(count, *like.shape).to(like)


def _found(
    denoiser: Denoiser,
    x0: Tensor,
    level: Level,
    directions: Tensor,
    estimate: LinearEstimate,
    context: dict[str, Tensor],
) -> tuple[Evidence, float]:
    """The numbers of one level, and the scale of the estimate there."""
    products, squares, means = [], [], []
    flat = directions.reshape(len(directions), -1).double()
    for rows in _batches(len(x0), directions[0]):
        xt = draw(denoiser.process.marginal(x0[rows], level)).detach().requires_grad_()
        with torch.enable_grad():
            mean = denoiser(xt, level, **{k: v[rows] for k, v in context.items()}).mean
        means.append(mean.detach())
        if not mean.requires_grad:  # it never is asked for
            products.append(x0.new_full((len(xt), *(len(flat),) * 2), torch.nan).double())
        else:
            images = [
                level.tweedie
                * torch.autograd.grad(mean, xt, z.expand_as(mean), retain_graph=True)[0]
                for z in directions
            ]
            stacked = torch.stack(images, 1).reshape(len(xt), *flat.shape)
            products.append(matmul(stacked.double(), flat.mT))
        gap = (x0[rows] - means[-1]).reshape(len(xt), -1).double()
        squares.append(matmul(gap, flat.mT).square().mean(-1))
    evidence = _evidence(torch.cat(products), torch.cat(squares))
    return evidence, _scale(estimate, level, x0, torch.cat(means))


def _scale(estimate: LinearEstimate, level: Level, x0: Tensor, mean: Tensor) -> float:
    """The squared error of all states beside that of the linear estimate."""
    error = (x0 - mean).double().square().sum() / len(x0)
    share = float(error) / float(estimate.diagonal(level, x0.shape[1:]).sum())
    return min(max(share, SCALES[0]), SCALES[1]) if share == share else SCALES[1]


def _evidence(v: Tensor, error: Tensor) -> Evidence:
    """From z^T V z' and squared errors at the states."""
    variance = v.diagonal(dim1=-2, dim2=-1).mean(-1)
    symmetric, rest = v + v.mT, v - v.mT
    values = torch.linalg.eigvalsh(torch.where(symmetric.isfinite(), symmetric, 0.0))
    tiny = torch.finfo(torch.float64).tiny
    return Evidence(
        variance.mean(),
        error.mean(),
        (variance - error).std() / len(v) ** 0.5,
        values.clamp(max=0).abs().sum() / values.abs().sum().clamp(min=tiny),
        rest.norm() / symmetric.norm().clamp(min=tiny),
    )


def _batches(count: int, like: Tensor) -> list[slice]:
    """Data that are evaluated at once: no more than fit in some memory."""
    size = max(AT_ONCE // like.numel(), 1)
    return [slice(start, start + size) for start in range(0, count, size)]


_known = Kept[Calibration]()


def calibrated(
    denoiser: Denoiser, like: Tensor, context: dict[str, Tensor], sums: tuple[float, ...] = ()
) -> Calibration:
    """The calibration of a denoiser as it is now: made once, and anew after its parameters have changed.

    Arguments are those of :func:`calibrate`, and the :func:`weight_sums` of the denoiser.
    """
    rows = tuple((name, tuple(v.flatten().tolist())) for name, v in sorted(context.items()))
    key = (like.shape, like.dtype, like.device, rows)
    return _known.get(denoiser, sums, key, lambda: calibrate(denoiser, like, context))
