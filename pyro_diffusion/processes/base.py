"""What a forward process is: a way to destroy data whose bridge is known."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_diffusion.processes.abilities import Ability, require
from pyro_diffusion.processes.levels import Rates, check_order
from pyro_diffusion.processes.scaled import ScaledProcess
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import (
    Shape,
    check_broadcast,
    check_sizes,
)

__all__ = ["ForwardProcess"]


class ForwardProcess(ScaledProcess):
    r"""A process :math:`q` that destroys data, t = 0 (data) to t = 1 (noise).

    Four conditionals define it, and a transition if it is Markov; each method returns a Pyro distribution
    whose batch shape is that of the state and whose event dimension is ``event_dim``. Times are floats or
    tensors of the state's batch shape, or :class:`~pyro_diffusion.schedules.Level` objects that a loop
    evaluated beforehand.

    ============================  =============================================================
    ``marginal(x0, t)``           :math:`q(x_t | x_0)`
    ``transition(xs, s, t)``      :math:`q(x_t | x_s)`, s < t, needs ``Ability.MARKOV``
    ``bridge(xt, x0, s, t)``      :math:`q(x_s | x_t, x_0)`, s < t
    ``reverse(xt, p, s, t)``      :math:`\int q(x_s | x_t, x_0)\, p(x_0 | x_t)\, dx_0`
    ``prior(event_shape)``        a distribution close to :math:`q(x_1)`
    ============================  =============================================================

    Args:
        schedule: signal and noise scales as functions of time. Code outside the process takes levels from
            ``level``, ``levels``, ``level_of_clock`` and ``rates`` instead.
        event_dim: number of rightmost dimensions that make one datum.

    Attributes:
        abilities: what methods may ask of the process, see :class:`Ability`.
        support: constraint on one coordinate of the data.

    **Implementing a process.** Scales of its own, say by coordinate, take one method, ``scales`` (see
    :class:`~pyro_diffusion.processes.scaled.ScaledProcess`), of a subclass of a process that has the rest:
    levels, rates and everything above the process follow, and it loses ``Ability.ISOTROPIC``, so that what
    needs one noise level refuses it. A new way to destroy data writes its algebra once, as the bridge is the
    reverse kernel of a point mass: :meth:`coefficients` (all that depends on times alone; loops call it once
    for all steps) and :meth:`combine`, beside :meth:`marginal`, :meth:`transition`, :meth:`prior` and
    :meth:`point_mass`. It says what data are (``support``) and what methods may ask of it (``abilities``, see
    :class:`Ability`); for particle filters, which tensors define a kernel (:meth:`kernel_tensors`,
    :meth:`kernel_from`).

    Example:
        A Gaussian process whose coordinates have their log-SNRs shifted against the schedule's.

        >>> from pyro_diffusion.processes import Ability, GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> class Shifted(GaussianProcess):
        ...     def __init__(self, schedule, shift):
        ...         super().__init__(schedule)
        ...         self.register_buffer("shift", shift)
        ...     def scales(self, level):
        ...         log_snr = level.clock + self.shift.to(level.clock)
        ...         alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        ...         return level._replace(log_snr=log_snr, alpha=alpha, sigma=sigma)
        >>> process = Shifted(Cosine(), torch.tensor([0.0, -2.0]))
        >>> process.level(torch.tensor([0.2, 0.4])).log_snr.shape
        torch.Size([2, 2])
        >>> Ability.ISOTROPIC in process.abilities
        False

    References:
        Sohl-Dickstein et al., arXiv 1503.03585; Ho et al., arXiv 2006.11239.
    """

    @property
    def support(self) -> constraints.Constraint:
        """Constraint on one coordinate of the data."""
        raise NotImplementedError

    def check_event(self, event_shape: Shape) -> torch.Size:
        """The shape of one datum, or a refusal.

        Raises:
            ValueError: for sizes below 1, or another number of dimensions than ``event_dim``.
        """
        sizes = check_sizes("event_shape", event_shape)
        if len(sizes) != self.event_dim:
            raise ValueError(
                f"event_shape: got {tuple(event_shape)}, expected {self.event_dim} "
                "dimension(s), the event_dim of the denoiser's process"
            )
        own = self.check_scales()
        if any(mine not in (1, size) for mine, size in zip(own, sizes, strict=True)):
            raise ValueError(
                f"event_shape: got {tuple(sizes)}, expected one that the scales of {type(self).__name__}, of "
                f"shape {tuple(own)}, broadcast to"
            )
        return sizes

    def check_precision(self, dtype: torch.dtype, times: Tensor) -> None:
        """Refuse a dtype in which the levels at a grid's ends are indistinguishable from data or noise.

        Asked by every model when it computes. It costs nothing unless the schedule reaches that far.

        Args:
            dtype: of the states.
            times: the grid.

        Raises:
            ValueError: naming the schedule, its ends and the range that works.
        """

    def check_density(self) -> None:
        """Refuse a process some of whose bridges have no density, as without noise.

        Asked by what scores states: bounds and weights of particles. Sampling does not need it.

        Raises:
            ValueError: naming what of the process is to blame.
        """

    def noised(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        """The distribution of loc + scale z with the noise z of real data, by default independent normals.

        Args:
            loc: batch + event.
            scale: broadcasts to it.
        """
        return Normal(loc, scale, validate_args=False).to_event(self.event_dim)

    def marginal(self, x0: Tensor, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given x_0."""
        raise NotImplementedError

    def transition(self, xs: Tensor, s: Tensor | Level, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given an earlier x_s, s < t.

        Raises:
            ValueError: for a process that is not Markov.
        """
        require(self, Ability.MARKOV, argument="process")
        raise NotImplementedError

    def prior(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        """The distribution that generation starts from, batch shape ()."""
        raise NotImplementedError

    def base_distribution(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        r"""What the probability flow starts from: :math:`x_1/\sqrt{\alpha_1^2+\sigma_1^2}` in distribution.

        Of the noise alone, as if none of the data were left at t = 1. Batch shape (); needs
        ``Ability.ODE``.
        """
        raise NotImplementedError

    def point_mass(self, x0: Tensor) -> TorchDistribution:
        """A posterior that is certain of x_0."""
        raise NotImplementedError

    def trial_data(self, shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        """Data to try a program on, the same at every call; the global generators are left alone.

        Standard normal numbers, taken to the ``support`` if that is smaller, or symbols, all equally likely.

        Args:
            shape: of the data, batch + event.
            dtype: of real data.

        Raises:
            NotImplementedError: for a support to which torch knows no transform.
        """
        support, generator = self.support, torch.Generator().manual_seed(0)
        if isinstance(support, constraints.integer_interval):
            low, high = int(support.lower_bound), int(support.upper_bound)
            return torch.randint(low, high + 1, shape, generator=generator, device="cpu")
        noise = torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
        data: Tensor = transform_to(support)(noise)
        return data

    def coefficients(self, s: Level, t: Level, eta: float = 1.0) -> Any:
        """Everything the bridge from t to s needs that depends on times alone (a named tuple of tensors)."""
        raise NotImplementedError

    def combine(
        self, xt: Tensor, posterior: TorchDistribution, coefficients: Any
    ) -> TorchDistribution:
        """The reverse kernel, given its coefficients broadcast against events."""
        raise NotImplementedError

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """The tensors that define a kernel which :meth:`combine` returned, each of batch + event (+ own).

        A particle filter keeps a kernel by its tensors, so as to resample it; :meth:`kernel_from` is the way
        back.
        """
        raise NotImplementedError

    def kernel_from(self, tensors: Mapping[str, Tensor]) -> TorchDistribution:
        """The kernel of such tensors, whose batch shape may be another by now."""
        raise NotImplementedError

    def divergence_rate(
        self, x0: Tensor, xt: Tensor, posterior: TorchDistribution, rates: Rates
    ) -> Tensor:
        """Divergence of the reverse process of x_0 from the posterior's, per unit of t (nats), batch shape.

        The limit of KL(bridge || reverse kernel) / (t - s) for s -> t, at a state x_t; its integral over t is
        the continuous-time bound's reverse term.

        Args:
            x0: data, batch + event.
            xt: a draw of q(x_t | x_0), likewise.
            posterior: p(x_0 | x_t), of the same batch and event shape.
            rates: the level of ``xt``, one per datum, and its slopes.
        """
        raise NotImplementedError

    def coordinate_log_likelihood(self, xt: Tensor, values: Tensor, t: Tensor | Level) -> Tensor:
        """log q(x_t,i | x_0,i = values_k) up to a constant in k, per coordinate; k is a new last dim."""
        raise NotImplementedError

    def reverse(
        self,
        xt: Tensor,
        posterior: TorchDistribution,
        s: Tensor | Level,
        t: Tensor | Level,
        eta: float = 1.0,
    ) -> TorchDistribution:
        """The bridge from t to s integrated over a posterior p(x_0 | x_t), s < t.

        Args:
            xt: state at t, batch + event.
            posterior: a distribution over x_0 of the same batch and event shape.
            s: earlier time(s), scalar or of the batch shape.
            t: later time(s).
            eta: the bridge's free parameter, 1 for the Markov process. Under a Gaussian process its variance,
                0 for the deterministic one (DDIM), which may also go from s to a later time; under a
                categorical one the share that the Markov bridge has, the rest is drawn from q(x_s | x_0).

        Raises:
            ValueError: for times outside [0, 1], s after t, or eta outside [0, 1].
        """
        early, late = self.level(s, xt, "s", "xt"), self.level(t, xt)
        if not isinstance(t, Level):
            check_broadcast("posterior", posterior.batch_shape + posterior.event_shape, xt.shape)
        if eta != 0 and not (isinstance(s, Level) or isinstance(t, Level)):
            check_order(early, late)
        return self.combine(xt, posterior, self.coefficients(early, late, eta))

    def bridge(
        self, xt: Tensor, x0: Tensor, s: Tensor | Level, t: Tensor | Level, eta: float = 1.0
    ) -> TorchDistribution:
        """The distribution of x_s given x_t and x_0, s < t: the reverse kernel of a point mass at x_0."""
        check_broadcast("x0", x0.shape, xt.shape)
        return self.reverse(xt, self.point_mass(x0), s, t, eta)
