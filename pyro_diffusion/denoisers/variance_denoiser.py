"""A denoiser's mean under another variance: a fixed one, a measured one, or a network of its own."""

from collections.abc import Callable

import torch
from pyro.distributions import Delta, Normal, TorchDistribution
from torch import Tensor, nn

from pyro_diffusion.denoisers.analytic import require_tweedie
from pyro_diffusion.denoisers.base import Denoiser, NetworkDenoiser, check_outputs
from pyro_diffusion.denoisers.variance_heads import HeadNormal, NoiseHead
from pyro_diffusion.denoisers.variances import Variance
from pyro_diffusion.schedules import Level

__all__ = ["VarianceDenoiser"]


class VarianceDenoiser(NetworkDenoiser):
    r"""The mean of a denoiser with a variance of your choice: :math:`\mathcal N(\hat x_0, v)`.

    ===================================  =======================================================
    ``variance``                         reverse kernel
    ===================================  =======================================================
    ``None``                             point mass: DDPM's :math:`\tilde\beta`
    ``unit_variance``                    DDPM's :math:`\beta` (variance-preserving data)
    ``analytic_variance(...)``           Analytic-DPM; so does ``residual_variance(...)``
    ``NPR()``, ``SN()``, with a network  Extended Analytic-DPM, per coordinate
    another :class:`Variance`            as it says; ``LearnedVariance`` heads train with the bound
    ===================================  =======================================================

    Nothing else changes: it is a denoiser as any other, under the same reverse kernel. The head's network
    takes :math:`x_t/\sqrt{\alpha^2+\sigma^2}` and the log-SNR, and returns one number per coordinate. To
    train it on a frozen mean call ``requires_grad_(False)`` on the base; such a base stays in ``eval()``
    mode.

    Args:
        denoiser: any denoiser under a Gaussian process.
        variance: None, a function of a :class:`~pyro_diffusion.schedules.Level`, or a :class:`Variance`.
        network: ``network(x, log_snr, **context)`` for a variance that has a head.
        show_noise: whether the network also gets ``noise``, the estimate eps_hat of x's shape: it says how
            far x_t is from what the mean takes it for.

    Raises:
        ValueError: for a process that is not Gaussian, an unknown variance, or a head and no network (or the
            other way round).

    Example:
        >>> from pyro_diffusion.denoisers import NPR, GaussianDenoiser
        >>> from pyro_diffusion.nn import MLP
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> base = GaussianDenoiser(MLP(2), GaussianProcess(Cosine())).requires_grad_(False)
        >>> VarianceDenoiser(base, NPR(), MLP(2))(torch.zeros(5, 2), 0.5).variance.shape
        torch.Size([5, 2])

    References:
        Bao et al., arXiv 2201.06503 and arXiv 2206.07309.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        variance: Variance | Callable[[Level], Tensor] | None = None,
        network: nn.Module | None = None,
        show_noise: bool = False,
    ) -> None:
        process = require_tweedie(denoiser)
        outputs = variance.outputs if isinstance(variance, Variance) else 0
        if not (variance is None or callable(variance)) or outputs > 1:
            raise ValueError(
                f"variance: got {variance!r}, expected None, a function of the level or a Variance of at "
                "most one output"
            )
        if (network is None) != (outputs == 0):
            raise ValueError(
                f"network: got {type(network).__name__} for a variance of {outputs} output(s), expected "
                f"{'none' if outputs == 0 else 'a network'}"
            )
        super().__init__(nn.Identity() if network is None else network, process)
        self.denoiser, self.variance, self.show_noise = denoiser, variance, bool(show_noise)
        self.train(self.training)

    @property
    def point_mass(self) -> bool:  # type: ignore[override]
        """Whether there is no variance."""
        return self.variance is None

    def context_event_dim(self, name: str, value: Tensor) -> int:
        """How many rightmost dimensions of a context tensor belong to one datum: as the base has it."""
        if name == "noise" and self.show_noise:
            return self.process.event_dim
        return self.denoiser.context_event_dim(name, value)

    def train(self, mode: bool = True) -> "VarianceDenoiser":
        """Training mode for all but a frozen base, whose dropout would blur what is being fitted."""
        super().train(mode)
        if not any(p.requires_grad for p in self.denoiser.parameters()):
            self.denoiser.eval()
        return self

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0, batch and event shape of xt."""
        level, event_dim = self.process.level(t, xt, state="xt"), self.process.event_dim
        mean = self.denoiser(xt, level, **context).mean
        if self.variance is None:
            return Delta(mean, event_dim=event_dim, validate_args=False)
        if not isinstance(self.variance, Variance):
            scale = self.variance(level).sqrt()
            return Normal(mean, scale, validate_args=False).to_event(event_dim)
        head, noise = None, (xt - level.alpha * mean) / level.sigma
        if self.variance.outputs:
            shown = {"noise": noise.detach()} if self.show_noise else {}
            x = xt / torch.hypot(level.alpha, level.sigma)
            out = self.network_output(x, level.clock, {**context, **shown})
            head = check_outputs(out, xt, 1)[..., 0]
        if head is None or not isinstance(self.variance, NoiseHead):
            scale = self.variance(head, level).sqrt()
            return Normal(mean, scale, validate_args=False).to_event(event_dim)
        scale = self.variance(head, level, noise).sqrt()
        moment = self.variance.moment(head, level, noise)
        return HeadNormal(mean, scale, moment, noise, self.variance).to_event(event_dim)
