"""Destruction of symbols by any jump process: neighbours on a scale, graphs, tables of one's own."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.precision import full_precision
from pyro_diffusion.processes.categorical import CategoricalProcess
from pyro_diffusion.schedules import Level, Schedule
from pyro_diffusion.validation import check_finite, check_number, check_positive_int, check_tensor

__all__ = ["DiscretizedGaussian", "TransitionMatrix"]

# Probabilities below are rounding errors of sums of eigenvectors in float64.
ROUNDING = 1e-14


class _Modes(NamedTuple):
    """Eigenvectors of a generator and the rates at which they decay: G = vectors diag(-rates) inverse."""

    vectors: Tensor
    rates: Tensor
    inverse: Tensor


class TransitionMatrix(CategoricalProcess):
    r"""Each symbol jumps by itself with the rates of a matrix G; time runs as :math:`-\log\alpha_t`.

    .. math::
        q(x_t = j | x_0 = i) = M(\alpha_t)_{ij}, \qquad M(a) = e^{-\log(a)\, G}, \qquad
        q(x_t | x_s) = M(\alpha_t / \alpha_s)_{x_s \cdot} .

    All M commute, so marginal, transition, bridge, reverse kernel and the continuous-time bound are those of
    :class:`CategoricalProcess`, exact, with the rows and columns of M in place of replacement by noise. That
    is the case :math:`G = 1 \pi^T - I`. M is computed from the eigenvectors of G in float64, at O(K^2) a
    symbol; probabilities below 1e-14 count as impossible.

    Args:
        schedule: ``alpha(t)``; a mode of G with eigenvalue :math:`-r` has decayed to :math:`\alpha_t^r`.
        states: number of symbols that data may take, 0 ... states - 1.
        generator: G, (K, K) with K >= states: rates of jumps from row to column off the diagonal; what is on
            the diagonal is replaced by minus the sum of its row. To give a doubly stochastic matrix P of one
            jump, pass :math:`P - I`.
        event_dim: number of rightmost dimensions that make one datum.

    Attributes:
        noise: the distribution that data, uniform over their symbols, end in.

    Raises:
        ValueError: for negative rates, none at all, another shape, or a matrix without a well-conditioned
            basis of eigenvectors.

    Example:
        Letters that turn into their neighbours on a circle.

        >>> from pyro_diffusion.schedules import Rectified
        >>> step = torch.eye(5, dtype=torch.float64).roll(1, dims=0)
        >>> process = TransitionMatrix(Rectified.full(), states=5, generator=(step + step.T) / 2)
        >>> process.marginal(torch.tensor([0, 1]), 0.1).event_shape
        torch.Size([2])

    References:
        Austin et al. (D3PM), arXiv 2107.03006; Campbell et al., arXiv 2205.14987.
    """

    generator: Tensor

    def __init__(
        self, schedule: Schedule, states: int, generator: Tensor, event_dim: int = 1
    ) -> None:
        check_positive_int("states", states, at_least=2)
        generator = _checked(generator, states)
        modes = _decomposed(generator)
        uniform = (torch.arange(len(generator)) < states).to(generator) / states
        limit = _spread(modes, uniform, torch.zeros_like(uniform[:1]))
        super().__init__(schedule, states, (limit / limit.sum()).clamp(min=0), event_dim)
        self.register_buffer("generator", generator)

    def _modes(self) -> _Modes:
        """Eigenvectors, kept until the generator changes."""
        matrix = self.generator
        version = None if matrix.is_inference() else matrix._version
        kept = self._cached("modes")
        if kept is not None and kept[0] is matrix and kept[1] == version:
            modes: _Modes = kept[2]
            return modes
        with torch.no_grad():
            modes = _decomposed(_with_diagonal(matrix.double()))
        self._cache("modes", (matrix, version, modes))
        return modes

    def _rows(self, x: Tensor, survival: Tensor) -> Tensor:
        vectors, rates, inverse = self._modes()
        return _combined(vectors[x], rates, inverse, survival)

    def _columns(self, x: Tensor, survival: Tensor) -> Tensor:
        vectors, rates, inverse = self._modes()
        return _combined(inverse.T[x], rates, vectors.T, survival)

    def _spread(self, weights: Tensor, survival: Tensor) -> Tensor:
        return _spread(self._modes(), weights, survival)

    def _inflow(self, x: Tensor, t: Level) -> Tensor:
        del t
        stays = torch.nn.functional.one_hot(x, len(self.noise))
        return self.generator.T[x] * (1 - stays)


class DiscretizedGaussian(TransitionMatrix):
    r"""Ordinal data: a symbol jumps to others at rates that fall with their distance like a normal density.

    .. math:: G_{ij} \propto e^{-(i - j)^2 / (2\,\text{width}^2)}, \quad i \ne j,

    scaled so that the slowest mode, much like the symbol's own value, has decayed to :math:`\alpha_t`. G is
    symmetric: everything ends uniform. It is the kernel of D3PM's discretized Gaussian, in matrices that
    commute.

    Args:
        schedule: ``alpha(t)`` is what is left of the slowest mode.
        states: number of symbols.
        width: standard deviation of a jump, in symbols.
        event_dim: number of rightmost dimensions that make one datum.

    References:
        Austin et al. (D3PM), arXiv 2107.03006, appendix A.2.3; Campbell et al., arXiv 2205.14987.
    """

    def __init__(
        self, schedule: Schedule, states: int, width: float = 1.0, event_dim: int = 1
    ) -> None:
        check_positive_int("states", states, at_least=2)
        self_width = check_number("width", width, above=0)
        place = torch.arange(states, dtype=torch.float64)
        gap = (place[:, None] - place).abs()
        # Relative to a jump to a neighbour: narrow kernels do not underflow. The diagonal is set apart.
        excess = (gap.square() - 1).clamp(min=0)
        rates = torch.exp(-0.5 * excess / self_width / self_width)
        generator = _with_diagonal(rates)
        slowest = -torch.linalg.eigvalsh(generator)[-2]
        super().__init__(schedule, states, generator / slowest, event_dim)
        self.width = self_width


def _checked(generator: Tensor, states: int) -> Tensor:
    generator = check_tensor("generator", generator).detach().double()
    check_finite("generator", generator)
    count = len(generator) if generator.dim() else 0
    if generator.shape != (count, count) or count < states:
        raise ValueError(
            f"generator: got shape {tuple(generator.shape)}, expected a square matrix over at least {states} "
            "symbols"
        )
    matrix = _with_diagonal(generator)
    rates = matrix - torch.diag(matrix.diagonal())
    if bool((rates < 0).any()) or not bool((rates > 0).any()):
        raise ValueError(
            f"generator: got rates from {float(rates.min()):g} to {float(rates.max()):g} off the diagonal, "
            "expected rates >= 0, some of them positive"
        )
    return matrix


def _with_diagonal(generator: Tensor) -> Tensor:
    """The matrix with rows that sum to zero."""
    rates = generator - torch.diag(generator.diagonal())
    return rates - torch.diag(rates.sum(-1))


def _decomposed(generator: Tensor) -> _Modes:
    """Eigenvectors and rates of decay, real where they can be.

    Raises:
        ValueError: for a generator that they do not give back.
    """
    scale = float(generator.abs().max())
    if torch.equal(generator, generator.T):
        values, vectors = torch.linalg.eigh(generator)
        inverse = vectors.T.contiguous()
    else:
        values, vectors = torch.linalg.eig(generator)
        if not bool((values.imag.abs() > 1e-12 * scale).any()):
            values, vectors = values.real, vectors.real
        inverse, _ = torch.linalg.inv_ex(vectors)
    rates = torch.where(values.abs() < 1e-12 * scale, torch.zeros_like(values), -values)
    error = (vectors * -rates @ inverse - generator).abs().max()
    if not float(error) < 1e-9 * scale:
        raise ValueError(
            "generator: got a matrix without a well-conditioned basis of eigenvectors, expected a "
            "diagonalizable one, such as a symmetric or reversible one"
        )
    return _Modes(vectors, rates, inverse)


def _spread(modes: _Modes, weights: Tensor, survival: Tensor) -> Tensor:
    """Weights of any sign times M."""
    with full_precision(weights):
        inward = weights.to(modes.vectors.dtype) @ modes.vectors
        out = (inward * _decay(modes.rates, survival)) @ modes.inverse
    return (out.real if out.is_complex() else out).to(weights.dtype)


def _combined(start: Tensor, rates: Tensor, end: Tensor, survival: Tensor) -> Tensor:
    """Probabilities from two of M's factors."""
    with full_precision(survival):
        out = (start * _decay(rates, survival)) @ end
    out = out.real if out.is_complex() else out
    return torch.where(out > ROUNDING, out, 0.0).to(survival.dtype)


def _decay(rates: Tensor, survival: Tensor) -> Tensor:
    """What is left of every mode, on a last dimension."""
    survival = survival.double()
    decay = torch.exp(rates * survival.clamp(min=torch.finfo(torch.float64).tiny).log())
    return torch.where(survival > 0, decay, (rates == 0).to(decay.dtype))
