"""A density on a line, an interval or a circle whose Fourier series is a squared modulus."""

import functools
import math
from typing import Any, ClassVar, Literal, get_args

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from pyro_diffusion.precision import at_least_single
from pyro_diffusion.validation import (
    Shape,
    check_broadcast,
    check_finite,
    check_number,
    check_tensor,
)

__all__ = ["Domain", "FourierDensity", "check_domain"]

Domain = Literal["line", "interval", "circle"]


class FourierDensity(TorchDistribution):
    r"""A density with as many modes as its N frequencies allow, and an exact distribution function.

    On :math:`u \in [-1, 1]`, for any complex numbers :math:`a_0 \dots a_N`,

    .. math:: p(u) = \frac{1}{2 c_0} \Big| \sum_k a_k e^{-ik\pi u} \Big|^2
              = \frac12 + \sum_{n=1}^N \operatorname{Re}\Big(\frac{c_n}{c_0} e^{in\pi u}\Big), \qquad
              c_n = \sum_k a_k \bar a_{k+n},

    which is never negative and needs no constraint. Its distribution function is the integral of the series,
    term by term. The value is :math:`x = \text{loc} + \text{scale} \cdot h(u)`:

    ========== ========================= =====================================================
    domain     h(u)                      values
    ========== ========================= =====================================================
    "line"     :math:`\tanh^{-1} u`      all real numbers; tails fall like exp(-2 \|x\| / scale)
    "interval" u                         loc - scale to loc + scale
    "circle"   u, of period 2            all real numbers, modulo 2 scale; draws in the interval
    ========== ========================= =====================================================

    Mean and variance are exact, too: linear in the :math:`c_n` (not on a circle, where there are none).

    Args:
        coefficients: real and imaginary parts of :math:`a`, batch + (N + 1, 2). Neither their length nor
            their common phase changes the density.
        loc: location, broadcasts to the batch.
        scale: positive, likewise; :math:`\pi` for angles in radians.
        domain: "line", "interval" or "circle".
        validate_args: whether to check arguments and values.

    Raises:
        ValueError: for coefficients of another shape, not finite or all zero, another domain, and a location
            or scale that does not fit.

    Example:
        >>> density = FourierDensity(torch.tensor([[1.0, 0.0], [0.0, 0.5], [-0.5, 0.0]]), scale=2.0)
        >>> x = density.rsample((5,))
        >>> bool(torch.allclose(density.icdf(density.cdf(x)), x, atol=1e-3))
        True

    References:
        De la Fuente, Singh and Ballé, Fourier Basis Density Model, arXiv 2402.15345.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "coefficients": constraints.independent(constraints.real, 2),
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    has_rsample = True

    def __init__(
        self,
        coefficients: Tensor,
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        domain: Domain = "line",
        validate_args: bool | None = None,
    ) -> None:
        shape = check_tensor("coefficients", coefficients).shape
        if len(shape) < 2 or shape[-1] != 2 or coefficients.numel() == 0:
            raise ValueError(f"coefficients: got shape {tuple(shape)}, expected batch + (N + 1, 2)")
        self.domain = check_domain(domain)
        batch, dtype = shape[:-2], at_least_single(coefficients.dtype)
        for name, value in (("loc", loc), ("scale", scale)):
            if isinstance(value, Tensor):
                check_broadcast(name, check_tensor(name, value).shape, batch)
                batch = torch.broadcast_shapes(batch, value.shape)
                dtype = torch.promote_types(dtype, value.dtype)
            else:
                check_number(name, value)
        self.coefficients = coefficients.to(dtype)
        self.loc, self.scale = (
            torch.as_tensor(value, dtype=dtype, device=coefficients.device)
            for value in (loc, scale)
        )
        super().__init__(batch, torch.Size(), validate_args=validate_args)
        if self._validate_args:
            for name in ("coefficients", "loc", "scale"):
                check_finite(name, getattr(self, name))
            if not bool((self.coefficients != 0).any(-1).any(-1).all()):
                raise ValueError("coefficients: got only zeros, expected one that is not")

    @property
    def support(self) -> constraints.Constraint:
        """All numbers, or the interval."""
        if self.domain == "interval":
            return constraints.interval(self.loc - self.scale, self.loc + self.scale)
        return constraints.real

    @property
    def degree(self) -> int:
        """The largest frequency N."""
        return self.coefficients.shape[-2] - 1

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "FourierDensity":
        """The same distribution at a larger batch shape."""
        new = self._get_checked_instance(FourierDensity, _instance)
        new.domain = self.domain
        new.coefficients = self.coefficients.expand(*batch_shape, *self.coefficients.shape[-2:])
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        super(FourierDensity, new).__init__(
            torch.Size(batch_shape), torch.Size(), validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, exact; very low, not infinite, where the series touches zero."""
        if self._validate_args:
            check_broadcast("value", check_tensor("value", value).shape, self.batch_shape)
            self._validate_sample(value)
        z = (value - self.loc) / self.scale
        out = self._log_density(z.tanh() if self.domain == "line" else z) - self.scale.log()
        if self.domain == "line":  # log of 1 - tanh(z)^2, at any z
            far = z.abs()
            out = out + 2 * (math.log(2) - far - torch.nn.functional.softplus(-2 * far))
        return out

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function, exact; on a circle from loc - scale on."""
        z = (value - self.loc) / self.scale
        if self.domain == "line":
            return self._cdf(z.tanh())
        return self._cdf(self._wrapped(z) if self.domain == "circle" else z.clamp(-1, 1))

    def icdf(self, value: Tensor) -> Tensor:
        """Quantiles by bisection, to rounding; first derivatives are those of the implicit function."""
        with torch.no_grad():
            low = torch.full_like(value.expand(self._extended(value)), -1.0)
            high = -low
            for _ in range(24 if value.dtype.itemsize <= 4 else 53):
                middle = (low + high) / 2
                below = self._cdf(middle) < value
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            u = (low + high) / 2
            slope = self._log_density(u).exp()
        # dx/dp = 1/density, dx/da = -dP/da / density: those of Newton's step, without its value.
        step = value - self._cdf(u)
        u = u + (step - step.detach()) / slope.clamp(min=torch.finfo(slope.dtype).tiny ** 0.5)
        return self.loc + self.scale * (u.atanh() if self.domain == "line" else u)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draw values, with gradients in all parameters."""
        shape = self._extended_shape(sample_shape)
        like = self.coefficients
        least = torch.finfo(like.dtype).eps
        return self.icdf(torch.rand(shape, dtype=like.dtype, device=like.device).clamp(min=least))

    @property
    def mean(self) -> Tensor:
        """Exact; refused on a circle."""
        return self.loc + self.scale * self._moments()[0]

    @property
    def variance(self) -> Tensor:
        """Exact; refused on a circle."""
        first, second = self._moments()
        return self.scale.square() * (second - first.square()).clamp(min=0)

    def roughness(self) -> Tensor:
        r""":math:`\int_{-1}^1 p'(u)^2 du = \sum_n (\pi n)^2 |c_n / c_0|^2`, batch shape.

        Times a rate, the energy of a prior on smooth densities: ``pyro.factor("smooth", -rate * roughness)``.
        """
        series = self._series.abs().square()
        return (series * (math.pi * self._frequencies()).square()).sum(-1).expand(self.batch_shape)

    def _frequencies(self) -> Tensor:
        count = self.degree + 1
        return torch.arange(
            1, count, dtype=self.coefficients.dtype, device=self.coefficients.device
        )

    @lazy_property
    def _series(self) -> Tensor:
        """c_n / c_0 for n = 1 ... N."""
        a = torch.view_as_complex(self.coefficients.contiguous())
        a = a / a.abs().amax(-1, keepdim=True)
        spectrum = torch.fft.fft(a, 2 * self.degree + 2).abs().square().to(a.dtype)
        c = torch.fft.ifft(spectrum).conj()
        return c[..., 1 : self.degree + 1] / c[..., :1].real

    def _log_density(self, u: Tensor) -> Tensor:
        """log p(u) on [-1, 1], from the squared modulus: nothing cancels."""
        a = self.coefficients / self.coefficients.abs().amax((-2, -1), keepdim=True)
        k = torch.arange(self.degree + 1, dtype=a.dtype, device=a.device)
        angle = math.pi * k * u.unsqueeze(-1)
        cos, sin = angle.cos(), angle.sin()
        real = (a[..., 0] * cos + a[..., 1] * sin).sum(-1)
        imag = (a[..., 1] * cos - a[..., 0] * sin).sum(-1)
        square = (real.square() + imag.square()).clamp(min=torch.finfo(a.dtype).tiny)
        return square.log() - (2 * a.square().sum((-2, -1))).log()

    def _cdf(self, u: Tensor) -> Tensor:
        n, c = self._frequencies(), self._series
        angle = math.pi * n * u.unsqueeze(-1)
        # Re c (e^{i angle} - (-1)^n) / (i pi n)
        sign = 1 - 2 * (n % 2)
        terms = (c.real * angle.sin() + c.imag * (angle.cos() - sign)) / (math.pi * n)
        return (0.5 * (u + 1) + terms.sum(-1)).clamp(0, 1)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """E h and E h^2."""
        if self.domain == "circle":
            raise NotImplementedError(
                "FourierDensity.mean: there is none on a circle; average sines and cosines of draws"
            )
        c = self._series
        base, sines, cosines = (c.real.new_tensor(m) for m in _moments(self.domain, self.degree))
        first = -(c.imag * sines).sum(-1)
        second = base + (c.real * cosines).sum(-1)
        return first, second

    def _wrapped(self, z: Tensor) -> Tensor:
        return torch.remainder(z + 1, 2) - 1

    def _extended(self, value: Tensor) -> torch.Size:
        return torch.broadcast_shapes(value.shape, self.batch_shape)


def check_domain(domain: object) -> Domain:
    """Refuse anything but one of the three.

    Raises:
        ValueError: naming what was found.
    """
    if domain not in get_args(Domain):
        raise ValueError(f"domain: got {domain!r}, expected 'line', 'interval' or 'circle'")
    return domain  # type: ignore[return-value]


@functools.cache
def _moments(domain: Domain, degree: int) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
    r"""Of u uniform: E h^2, and the integrals of h sin(n pi u) and h^2 cos(n pi u) over [-1, 1].

    On the interval 1/3, -2 (-1)^n / (pi n) and 4 (-1)^n / (pi n)^2; on the line by the trapezoidal rule in
    h, exact to rounding, as the integrands and all of their derivatives vanish at its ends.
    """
    n = torch.arange(1, degree + 1, dtype=torch.float64)
    if domain == "interval":
        sign = 1 - 2 * (n % 2)
        sines, cosines, base = -2 * sign / (math.pi * n), 4 * sign / (math.pi * n).square(), 1 / 3
    else:
        h = torch.linspace(-24, 24, 48_001, dtype=torch.float64)
        weight = (1 - h.tanh().square()) * (h[1] - h[0])
        angle = math.pi * n.unsqueeze(-1) * h.tanh()
        sines, cosines = angle.sin() @ (h * weight), angle.cos() @ (h.square() * weight)
        base = float((h.square() * weight).sum() / 2)
    return base, tuple(sines.tolist()), tuple(cosines.tolist())
