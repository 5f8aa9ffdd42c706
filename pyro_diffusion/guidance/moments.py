r"""Mean and covariance of x_0 given x_t as the draws of a chain have them, found before any observation."""

from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.decoders import NormalDecoder
from pyro_diffusion.guidance.kept import Kept
from pyro_diffusion.guidance.linear_estimate import LinearEstimate
from pyro_diffusion.likelihoods.run import isolated
from pyro_diffusion.precision import matmul
from pyro_diffusion.processes import draw, drawing_from
from pyro_diffusion.processes.noise import SeededNoise
from pyro_diffusion.samplers import Ancestral, simulate
from pyro_diffusion.schedules import Level
from pyro_diffusion.schedules.base import Row
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["Moments", "measured"]

DRAWS, KNOTS = 512, 33  # of the chain; levels, those of the chain if it has no more
FOLDS = 8  # the linear estimate of an eighth of the draws is made of the others, or it would look too good
SEED = 0
AT_ONCE = 2**18  # numbers in the data of one evaluation
# A network may be sure of a state and wrong: w is never below this share of the mean squared error at its
# level, and errors are not taken to be less than a tenth of what the network says they are.
LEAST_SHARE, LEAST_SCALE = 0.05, 0.1


class Along(NamedTuple):
    r"""A symmetric matrix :math:`U \text{diag}(g)\,U^T + g_\perp (I - U U^T)`.

    Attributes:
        vectors: U, (n, r), orthonormal columns.
        gains: g, (r,).
        rest: :math:`g_\perp`, without effect if r = n.
    """

    vectors: Tensor
    gains: Tensor
    rest: Tensor

    def times(self, v: Tensor, event_dim: int) -> Tensor:
        """The product with data, of any leading dimensions + event."""
        flat = v.reshape(*v.shape[: v.dim() - event_dim], -1)
        vectors, gains, rest = (x.to(v) for x in self)
        inside = matmul(matmul(flat, vectors) * (gains - rest), vectors.mT)
        return (rest * flat + inside).reshape(v.shape)


class Knot(NamedTuple):
    r"""What was found at one level; :math:`w(x_t)` is the denoiser's variance, or what stands in for it.

    Attributes:
        floor: what is added to the denoiser's variance, a number.
        trust: G, the weight of the denoiser's mean against that of the linear estimate, by direction.
        bias: mean of the whitened errors, event.
        scale: s, their standard deviations, event.
        correlation: R, theirs.
    """

    floor: Tensor
    trust: Along
    bias: Tensor
    scale: Tensor
    correlation: Along


class Moments(NamedTuple):
    r"""Mean m and covariance V of x_0 given x_t, for a chain of any denoiser.

    .. math::
        m(x_t) &= \bar x(x_t) + G\,(\hat x_0(x_t) - \bar x(x_t)) + \sqrt{w(x_t)}\,b, \\
        V(x_t) &= \text{diag}(s \sqrt{w(x_t)})\, R\, \text{diag}(s \sqrt{w(x_t)}),

    where :math:`w(x_t)` is the denoiser's own variance and a floor of the level, and with the linear estimate
    :math:`\bar x(x_t)` of mean and covariance of the draws. G is diagonal in their principal components, from
    0, where the network's mean is noise, to 1.

    Attributes:
        estimate: of the draws' covariance C.
        mean: of the draws, event.
        clocks: increasing noise levels, (knots,).
        knots: what was found at each.
    """

    estimate: LinearEstimate
    mean: Tensor
    clocks: Tensor
    knots: tuple[Knot, ...]

    def nearest(self, level: Level) -> Tensor | int:
        """The knot of a level; where times of the data disagree, a tensor of the clock's shape."""
        if isinstance(level, Row):
            of_grid: list[Any] = level.grid.table(self._places)
            return int(of_grid[level.place])
        places = self._nearest(level.clock)
        first = places.flatten()[0]
        return int(first) if bool((places == first).all()) else places

    def _places(self, grid: Level) -> list[int]:
        return [int(v) for v in self._nearest(grid.clock).reshape(-1).tolist()]

    def _nearest(self, clock: Tensor) -> Tensor:
        clocks = self.clocks.to(clock)
        middles = 0.5 * (clocks[1:] + clocks[:-1])
        return torch.bucketize(clock.detach().contiguous(), middles)

    def spread(self, variance: Tensor | None, level: Level, floor: Tensor) -> Tensor:
        r""":math:`\sqrt w`, never 0: the denoiser's variance and a floor; for a point mass of data alike in
        all directions, :math:`(1/c + \alpha^2/\sigma^2)^{-1}` in its place.
        """
        if variance is None:
            snr = level.noise_to_signal.square().reciprocal()
            variance = 1 / (1 / self.estimate.values.mean().to(snr) + snr)
        return (variance + floor).clamp(min=torch.finfo(variance.dtype).tiny).sqrt()

    def linear(self, xt: Tensor, level: Level, event_dim: int) -> Tensor:
        """The linear estimate of x_0."""
        mean = self.mean.to(xt)
        pull = (xt - level.alpha * mean) * (level.alpha / level.sigma.square())
        return mean + self.estimate.times(pull, level, event_dim)


def measured(
    denoiser: Denoiser, times: tuple[float, ...], like: Tensor, sums: tuple[float, ...] = ()
) -> Moments:
    r"""Moments of x_0 given x_t on draws of the denoiser's own chain; made once for its present parameters.

    512 paths of the chain, and the denoiser once more at 33 of its levels (at all if there are fewer): 512
    (steps + 33) evaluations for a datum, about as many as 512 particles take. They use a generator of their
    own: global seeds are untouched, and the outcome is always the same.

    Args:
        denoiser: any, under a process with Tweedie's formula; without context.
        times: of the chain, increasing.
        like: a datum's shape, dtype and device.
        sums: the ``weight_sums`` of the denoiser.
    """
    key = (like.shape, like.dtype, like.device, times)
    return _known.get(denoiser, sums, key, lambda: _measure(denoiser, like.new_tensor(times), like))


_known = Kept[Moments]()


def _measure(denoiser: Denoiser, times: Tensor, like: Tensor) -> Moments:
    """Draw paths, and compare what the denoiser says along them with where they end."""
    process, count = denoiser.process, len(times)
    kept = torch.linspace(0, count - 1, min(count, KNOTS)).round().int().tolist()
    states: dict[int, list[Tensor]] = {j: [] for j in kept}

    def keep(j: int, x: Tensor) -> None:
        if j in states:
            states[j].append(x)

    with drawing_from(SeededNoise(SEED)), isolated(), torch.inference_mode(False), torch.no_grad():
        start = draw(process.prior(like.shape, dtype=like.dtype, device=like.device), (DRAWS,))
        ends = []
        for rows in start.split(max(AT_ONCE // like.numel(), 1)):
            x = simulate(denoiser, times, rows, Ancestral(), callback=keep)
            last = process.level(times[0], x)
            posterior = denoiser(x, last)
            if isinstance(per_coordinate(posterior), Delta):  # the chain's data are wider
                posterior = NormalDecoder()(posterior, last, process)
            ends.append(draw(posterior))
        x0 = torch.cat(ends)
        levels = process.levels(times, like.dtype, like.device)
        clocks = levels.clock.flatten()[kept].flip(0)
        found, parts = _of_draws(x0, clocks), x0.chunk(FOLDS)
        others = [
            _of_draws(torch.cat([*parts[:i], *parts[i + 1 :]]), clocks) for i in range(len(parts))
        ]
        knots = []
        for j in reversed(kept):
            level, xt = levels.at(j), torch.cat(states[j]).chunk(FOLDS)
            said = [denoiser(x, level) for x in states[j]]
            mean = torch.cat([part.mean for part in said])
            point = isinstance(per_coordinate(said[0]), Delta)
            variance = None if point else torch.cat([part.variance for part in said])
            folds = zip(others, xt, strict=True)
            linear = torch.cat([own.linear(x, level, process.event_dim) for own, x in folds])
            floor = LEAST_SHARE * (x0 - mean).square().mean()
            root = found.spread(variance, level, floor).expand_as(x0)
            knots.append(_knot(x0, mean, root, linear, found.estimate.vectors, floor))
    return found._replace(knots=tuple(knots))


def _of_draws(x0: Tensor, clocks: Tensor) -> Moments:
    """What the linear estimate needs."""
    return Moments(LinearEstimate.of_draws(_flat(x0)).to(x0), x0.mean(0), clocks, ())


def _flat(x: Tensor) -> Tensor:
    """Data as rows, scalars too."""
    return x.reshape(len(x), -1)


def _knot(
    x0: Tensor, mean: Tensor, root: Tensor, linear: Tensor, vectors: Tensor, floor: Tensor
) -> Knot:
    """Trust by regression along each principal component, then the errors' covariance."""
    gap, error = (_flat(v - linear) for v in (mean, x0))
    inner, outer = (v @ vectors for v in (gap, error))
    trust = _share((inner * outer).sum(0), inner.square().sum(0))
    products = (gap * error).sum() - (inner * outer).sum()
    squares = gap.square().sum() - inner.square().sum()
    weights = Along(vectors, trust, _share(products, squares))
    best = _flat(linear) + weights.times(gap, 1)
    errors = (_flat(x0) - best) / _flat(root)
    bias, scale = errors.mean(0), errors.std(0).clamp(min=LEAST_SCALE)
    found = LinearEstimate.of_draws((errors - bias) / scale).to(x0)
    correlation = Along(found.vectors, found.values, found.rest)
    event = x0.shape[1:]
    return Knot(floor, weights, bias.reshape(event), scale.reshape(event), correlation)


def _share(products: Tensor, squares: Tensor) -> Tensor:
    tiny = torch.finfo(squares.dtype).tiny
    return torch.where(squares > tiny, products / squares.clamp(min=tiny), 1.0).clamp(0, 1)
