"""Networks of images under a process of coordinates in a basis."""

import torch
from torch import Tensor, nn

from pyro_diffusion.denoisers.gaussian import GaussianDenoiser
from pyro_diffusion.denoisers.parameterizations import Coefficients, Parameterization
from pyro_diffusion.denoisers.variances import Variance
from pyro_diffusion.processes import Basis, ForwardProcess
from pyro_diffusion.schedules import Level

__all__ = ["SpectralDenoiser"]


class SpectralDenoiser(GaussianDenoiser):
    r"""A :class:`GaussianDenoiser` of coordinates :math:`u = V^T x` whose network sees and returns data.

    .. math:: \hat u_0 = c_{skip}\,u_t + c_{out}\,V^T F(c_{in}\,V u_t, \lambda).

    The weights c_skip and c_out are those of every coordinate. The scale c_in is one number, the least of the
    coordinates': the network sees the state as it is, blurred and noisy, with no coordinate of unit variance
    above unit variance. (A scale for each would undo the blur and raise the noise instead.)

    A variance's head is per coordinate and is not turned; ``TimeVariance`` and the estimated variances are
    per coordinate or shared, as they are.

    Args:
        network: ``network(x, log_snr, **context)`` of data, as for :class:`GaussianDenoiser`.
        process: one with a basis, such as :class:`~pyro_diffusion.processes.Blurring`.
        parameterization: the meaning of the output; :class:`V` by default.
        variance: None for a point mass, or a :class:`Variance`.
        context_event_dims: see :class:`NetworkDenoiser`.

    Raises:
        ValueError: for a process without a basis, and as there.

    Example:
        >>> from pyro_diffusion.nn import UNet
        >>> from pyro_diffusion.processes import Basis, Blurring
        >>> from pyro_diffusion.schedules import Cosine
        >>> process = Blurring(Cosine(), Basis.dct((1, 8, 8)), sigma_max=4.0)
        >>> denoiser = SpectralDenoiser(UNet(1, width=8), process)
        >>> denoiser(torch.randn(2, 1, 8, 8), torch.tensor(0.5)).mean.shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        network: nn.Module,
        process: ForwardProcess,
        parameterization: Parameterization | None = None,
        variance: Variance | None = None,
        context_event_dims: dict[str, int] | None = None,
    ) -> None:
        super().__init__(network, process, parameterization, variance, context_event_dims)
        if not isinstance(getattr(process, "basis", None), Basis):
            raise ValueError(
                f"process: got {type(process).__name__}, which has no basis, expected a process such as "
                "SpectralGaussian or a GaussianDenoiser"
            )

    def network_output(self, x: Tensor, log_snr: Tensor, context: dict[str, Tensor]) -> Tensor:
        """Coordinates of the network's output at the data of coordinates x; arguments as in the base."""
        basis: Basis = self.process.basis  # type: ignore[assignment]
        out = super().network_output(basis.inverse(x), log_snr, context)
        if out.shape[: x.dim()] != x.shape:
            return out  # refused by its shape
        if out.dim() == x.dim():
            return basis(out)
        return torch.cat([basis(out[..., 0]).unsqueeze(-1), out[..., 1:]], -1)

    def _coefficients(self, level: Level) -> Coefficients:
        c = super()._coefficients(level)
        if c.c_in.dim() < self.process.event_dim:
            return c
        dims = tuple(range(-self.process.event_dim, 0))
        return c._replace(c_in=c.c_in.amin(dims, keepdim=True))
