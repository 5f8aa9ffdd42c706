"""Gaussian processes in an orthonormal basis, with scales per coordinate: blur, whitening, soft masks."""

import math
from typing import Self

import torch
from torch import Tensor, nn

from pyro_diffusion.processes.bases import Basis
from pyro_diffusion.processes.gaussian import GaussianProcess
from pyro_diffusion.schedules import Level, Schedule
from pyro_diffusion.validation import (
    Shape,
    check_expands,
    check_finite,
    check_number,
    check_positive_int,
    check_sizes,
)

__all__ = ["Blurring", "LearnedSpectralGaussian", "SpectralGaussian"]

# Least increase of a learned curve, as a fraction of the mean increase.
FLOOR = 1e-2


class SpectralGaussian(GaussianProcess):
    r""":math:`u_t = \alpha_t u_0 + \sigma_t \epsilon` in coordinates :math:`u = V^T x`, each with its scales.

    States are *coordinates* in the basis, of the event shape of the data. Every formula of
    :class:`GaussianProcess` holds coordinate by coordinate with its own log-SNR :math:`\lambda_k(t)`, and the
    continuous bound's diffusion term is

    .. math:: \tfrac12 \int_0^1 \sum_k (-\lambda_k'(t))\, e^{\lambda_k(t)}\,
              \mathbb E\,(u_{0,k} - \hat u_{0,k})^2\, dt .

    For the exact denoiser it depends on the two ends of the :math:`\lambda_k` alone, not on the path between
    them; for an inexact one it depends on the path.

    Here :math:`\lambda_k(t) = \lambda(t) + \text{shift}_k`, split into two scales as the schedule does it. A
    positive shift keeps a coordinate longer. White noise is white in every orthonormal basis: without a shift
    this is :class:`GaussianProcess`.

    Three parts lead to data and back: :class:`~pyro_diffusion.denoisers.SpectralDenoiser` shows images to its
    network; :class:`~pyro_diffusion.distributions.BasisDecoder` makes data of the last coordinates (or, for
    real data, ``basis.transform`` around any view of the denoiser).

    Implementing a process: override ``scales``, see :class:`ForwardProcess`; ``self.basis`` has the
    frequencies.

    Args:
        schedule: the log-SNR :math:`\lambda(t)` that networks are told, and its split into two scales.
        basis: an orthonormal basis; its ``event_shape`` is that of the data.
        shift: nats of log-SNR by coordinate, of the event shape or one that broadcasts to it.

    Raises:
        ValueError: for another basis, or a shift that is not finite or does not fit; when called, for states
            of another event shape.

    Example:
        >>> from pyro_diffusion.schedules import Cosine
        >>> data = torch.randn(100, 1, 8, 8)
        >>> process = SpectralGaussian.whitening(Cosine(), Basis.principal(data))
        >>> process.marginal(process.basis(data), torch.rand(100)).event_shape
        torch.Size([1, 8, 8])

    References:
        Kingma et al., arXiv 2107.00630 (one coordinate); Sahoo et al., arXiv 2312.13236 (a log-SNR for each).
    """

    shift: Tensor | None

    def __init__(self, schedule: Schedule, basis: Basis, shift: Tensor | None = None) -> None:
        if not isinstance(basis, Basis):
            raise ValueError(
                f"basis: got {type(basis).__name__}, expected a Basis such as Basis.dct(event_shape)"
            )
        super().__init__(schedule, len(basis.event_shape))
        self.basis = basis
        if shift is not None:
            check_finite("shift", shift)
            check_expands("shift", shift, basis.event_shape)
            shift = shift.expand(basis.event_shape).clone()
        self.register_buffer("shift", shift)

    @classmethod
    def whitening(
        cls, schedule: Schedule, basis: Basis, variances: Tensor | None = None, floor: float = 1e-4
    ) -> Self:
        r"""Every coordinate meets its noise at the same time: :math:`\text{shift}_k = -\log v_k`.

        The signal-to-noise ratio :math:`v_k \alpha_k^2 / \sigma_k^2` of a coordinate of variance v_k is then
        that of the schedule, as if coordinates were scaled to unit variance.

        Args:
            schedule: as for the process.
            basis: one of known variances, such as ``Basis.principal(data)``, or any with the next argument.
            variances: of the coordinates, of the event shape or one that broadcasts to it; by default those
                of the basis.
            floor: least variance, as a share of the largest.

        Raises:
            ValueError: if no variances are known.
        """
        if variances is None:
            variances = getattr(basis, "variances", None)
        if variances is None:
            raise ValueError(
                "variances: got none, and a basis that knows none, expected a tensor or Basis.principal(data)"
            )
        check_finite("variances", variances)
        check_expands("variances", variances, basis.event_shape)
        largest = check_number("variances", float(variances.max()), above=0)
        least = check_number("floor", floor, above=0, at_most=1) * largest
        return cls(schedule, basis, shift=-variances.clamp(min=least).log())

    def scales(self, level: Level) -> Level:
        """The schedule's log-SNR, shifted by coordinate."""
        return level if self.shift is None else self._split(level, level.clock)

    def check_state(self, name: str, x: Tensor, values: bool = True) -> None:
        """Refuse what cannot be coordinates: as the base does, and another event shape.

        Raises:
            ValueError: naming the argument.
        """
        super().check_state(name, x, values)
        self._check_shape(name, x.shape[x.dim() - self.event_dim :])

    def check_event(self, event_shape: Shape) -> torch.Size:
        """The shape of one datum, or a refusal.

        Raises:
            ValueError: for another shape than the basis has.
        """
        sizes = check_sizes("event_shape", event_shape)
        self._check_shape("event_shape", sizes)
        return super().check_event(sizes)

    def _check_shape(self, name: str, event_shape: torch.Size) -> None:
        if event_shape != self.basis.event_shape:
            raise ValueError(
                f"{name}: got event shape {tuple(event_shape)}, expected "
                f"{tuple(self.basis.event_shape)}, that of the basis"
            )

    def _split(self, level: Level, log_snr: Tensor) -> Level:
        """The level of a log-SNR to which the shift is added, in the schedule's scaling."""
        if self.shift is not None:
            log_snr = log_snr + self.shift.to(log_snr)
        return self.schedule._level_of(level.t, log_snr)._replace(clock=level.clock)


class Blurring(SpectralGaussian):
    r"""Blurring diffusion: heat dissipates what is fine while noise is added.

    A coordinate of frequency f is damped by :math:`d = (1 - d_{min})\,e^{-f \tau} + d_{min}`,

    .. math:: \alpha_k(t) = \alpha(t)\, d_k(t), \quad \sigma_k(t) = \sigma(t), \quad
              \tau(t) = \tfrac12 \sigma_B(t)^2, \quad \sigma_B(t) = \sigma_{max} \sin^2(\pi t / 2).

    :math:`\sigma_B` is the width of the blur in pixels. At t = 0 nothing is blurred: the data end is that of
    :class:`GaussianProcess`. Prefer networks that predict the data or v: noise predictions are divided by
    :math:`\alpha_k`, which d_min makes small.

    Args:
        schedule: scales of the unblurred process; :class:`~pyro_diffusion.schedules.Cosine` in the paper.
        basis: one with frequencies: ``Basis.dct(event_shape)`` or ``Basis.laplacian(adjacency)``.
        sigma_max: width of the blur at t = 1, in pixels, from 0 to 1e6; 20 in the paper.
        d_min: share of the signal that stays, in (0, 1].

    Raises:
        ValueError: for a basis without frequencies, or numbers outside: at ``d_min`` = 0 the log-SNR of what
            is blurred away would be minus infinity.

    Example:
        >>> from pyro_diffusion.schedules import Cosine
        >>> process = Blurring(Cosine(), Basis.dct((1, 8, 8)), sigma_max=4.0)
        >>> process.level(0.5).alpha.shape
        torch.Size([1, 8, 8])

    References:
        Hoogeboom & Salimans, Blurring diffusion models, arXiv 2209.05557, section 4 and appendix A;
        Rissanen et al., arXiv 2206.13397.
    """

    def __init__(
        self, schedule: Schedule, basis: Basis, sigma_max: float = 20.0, d_min: float = 1e-3
    ) -> None:
        super().__init__(schedule, basis)
        if basis.frequencies is None:
            raise ValueError(
                "basis: got one without frequencies, expected Basis.dct(event_shape) or "
                "Basis.laplacian(adjacency)"
            )
        self.sigma_max = check_number("sigma_max", sigma_max, at_least=0, at_most=1e6)
        self.d_min = check_number("d_min", d_min, above=0, at_most=1)

    def scales(self, level: Level) -> Level:
        """The schedule's signal, damped by coordinate."""
        assert self.basis.frequencies is not None
        blur = self.sigma_max * torch.sin(0.5 * math.pi * level.t).square()
        heat = torch.exp(-0.5 * self.basis.frequencies.to(level.t) * blur.square())
        damping = self.d_min + (1 - self.d_min) * heat
        return level._replace(
            log_snr=level.clock + 2 * damping.log(),
            alpha=level.alpha * damping,
            sigma=level.sigma.expand_as(damping),
        )


class LearnedSpectralGaussian(SpectralGaussian):
    r"""A log-SNR curve of its own for every coordinate, learned between fixed ends.

    With s the share of the schedule's log-SNR that is gone, from 0 to 1,

    .. math:: \lambda_k = \lambda_{max} - (\lambda_{max} - \lambda_{min})\, h_k(s) + \text{shift}_k, \qquad
              h_k(s) = \sum_{j=1}^m c_{kj} \binom mj s^j (1 - s)^{m-j},

    a polynomial of degree m whose coefficients increase from 0 to 1 by positive (softmax) steps: every
    coordinate's log-SNR falls strictly whatever the parameters. They start at :math:`h_k(s) = s`, the
    schedule.

    The curves are trained with the denoiser by the bound, in discrete and in continuous time. An exact
    denoiser's continuous bound does not depend on them; an inexact one's does, and they learn a path between
    the ends on which it errs less.

    Args:
        schedule: one of finite ends.
        basis: an orthonormal basis.
        degree: m >= 1 of the polynomials.
        shift: as for :class:`SpectralGaussian`; the class method ``whitening`` gives that of whitening.

    Raises:
        ValueError: for infinite ends, a degree below 1, and as there.

    References:
        Sahoo et al., Diffusion models with learned adaptive noise, arXiv 2312.13236, section 4.
    """

    def __init__(
        self, schedule: Schedule, basis: Basis, shift: Tensor | None = None, degree: int = 8
    ) -> None:
        super().__init__(schedule, basis, shift)
        if not all(map(math.isfinite, self.clock_ends)):
            raise ValueError(
                f"schedule: got log-SNR ends {list(self.clock_ends)}, expected finite ends (cut the schedule "
                "with log_snr_max and log_snr_min)"
            )
        check_positive_int("degree", degree)
        self.steps = nn.Parameter(torch.zeros(degree, *basis.event_shape))

    def scales(self, level: Level) -> Level:
        """The learned log-SNR of every coordinate."""
        high, low = self.clock_ends
        s = (high - level.clock) / (high - low)
        steps, degree = self.steps.to(s), len(self.steps)
        heights = (FLOOR / degree + (1 - FLOOR) * steps.softmax(0)).cumsum(0)
        h = torch.zeros_like(s)
        for j, height in enumerate(heights, start=1):
            h = h + height * (math.comb(degree, j) * s**j * (1 - s) ** (degree - j))
        return self._split(level, high - (high - low) * h)
