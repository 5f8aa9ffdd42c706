"""The data end of a chain of coordinates in a basis."""

from collections.abc import Mapping

import torch
from pyro.distributions import Delta, Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.distributions.decoders import Decoder, NormalDecoder
from pyro_diffusion.processes import Basis, ForwardProcess
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["BasisDecoder"]


class BasisDecoder(Decoder):
    r"""Another decoder, of data whose coordinates :math:`u = V^T x` are the states.

    The posterior of the coordinates at t_0, of mean m and independent variances v, becomes one of the data
    with the same mean V m and the same variances :math:`\text{diag}(V\,\text{diag}(v)\,V^T)`, which the
    other decoder takes. Data are encoded by the other decoder, then taken to coordinates.

    Correlations of the data at t_0 are left out. That is still a proper distribution, hence a bound, and for
    integers of little noise at t_0 the same. For real data it costs
    :math:`\tfrac12 \log(\prod_i (V\,\text{diag}(v)\,V^T)_{ii} / \prod_k v_k)` nats where variances differ by
    coordinate; ``TransformedDistribution(view, [basis.transform])``, without this decoder, costs nothing.

    Args:
        basis: that of the process.
        decoder: of the data; normal by default, :class:`QuantizedDecoder` for integer images.

    Raises:
        ValueError: for what is no basis or no decoder.

    Example:
        >>> from pyro_diffusion.denoisers import SpectralDenoiser
        >>> from pyro_diffusion.distributions import Diffusion, QuantizedDecoder
        >>> from pyro_diffusion.nn import UNet
        >>> from pyro_diffusion.processes import Blurring
        >>> from pyro_diffusion.schedules import Cosine
        >>> basis = Basis.dct((1, 8, 8))
        >>> denoiser = SpectralDenoiser(UNet(1, width=8), Blurring(Cosine(), basis, sigma_max=4.0))
        >>> decoder = BasisDecoder(basis, QuantizedDecoder(17))
        >>> Diffusion(denoiser, (1, 8, 8), steps=3, decoder=decoder).sample((2,)).dtype
        torch.int64
    """

    def __init__(self, basis: Basis, decoder: Decoder | None = None) -> None:
        super().__init__()
        if not isinstance(basis, Basis):
            raise ValueError(f"basis: got {type(basis).__name__}, expected that of the process")
        self.basis, self.decoder = basis, NormalDecoder() if decoder is None else decoder
        if not isinstance(self.decoder, Decoder):
            raise ValueError(
                f"decoder: got {decoder!r}, expected a Decoder such as NormalDecoder()"
            )

    def check_process(self, process: ForwardProcess) -> None:
        """Refuse a process of other data, for the other decoder or of another event dimension.

        Raises:
            ValueError: naming what was found.
        """
        self.decoder.check_process(process)
        if process.event_dim != len(self.basis.event_shape):
            raise ValueError(
                f"decoder: got a basis of event shape {tuple(self.basis.event_shape)} for a process of "
                f"event_dim={process.event_dim}, expected as many dimensions"
            )

    def support(self, event_dim: int) -> constraints.Constraint:
        """That of the other decoder."""
        return self.decoder.support(event_dim)

    def check(self, value: Tensor) -> None:
        """Refuse data outside the support."""
        self.decoder.check(value)

    def encode(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Coordinates of the encoded data."""
        out: Tensor = self.basis(self.decoder.encode(value, dtype))
        return out

    def data_of(self, x0: Tensor) -> Tensor:
        """The other decoder's data of what has these coordinates."""
        return self.decoder.data_of(self.basis.inverse(x0))

    def forward(
        self, posterior: TorchDistribution, t: Level, process: ForwardProcess
    ) -> TorchDistribution:
        """The other decoder's distribution of data, from the data's own means and variances."""
        base, event_dim = per_coordinate(posterior), len(self.basis.event_shape)
        mean = self.basis.inverse(base.mean)
        if isinstance(base, Delta):
            of_data: TorchDistribution = Delta(mean, event_dim=event_dim, validate_args=False)
        else:
            scale = self.basis.marginal_variances(base.variance.expand_as(mean)).sqrt()
            of_data = Normal(mean, scale, validate_args=False).to_event(event_dim)
        out: TorchDistribution = self.decoder(of_data, self._level_of_data(t), process)
        return out

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """Those of the other decoder."""
        return self.decoder.kernel_tensors(kernel)

    def kernel_from(self, tensors: Mapping[str, Tensor], event_dim: int) -> TorchDistribution:
        """The other decoder's distribution of data."""
        return self.decoder.kernel_from(tensors, event_dim)

    def baseline(self, t: Level, event_shape: torch.Size) -> Tensor | float:
        """That of the other decoder, from the noise on the data."""
        return self.decoder.baseline(self._level_of_data(t), event_shape)

    def _level_of_data(self, t: Level) -> Level:
        """The level whose noise-to-signal ratios are those of the data's coordinates, alpha being 1."""
        variance, event = t.noise_to_signal.square(), self.basis.event_shape
        if variance.dim() < len(event) or variance.shape[-len(event) :].numel() == 1:
            return t  # the same for all coordinates, so for the data
        shape = torch.broadcast_shapes(variance.shape, event)
        variance = self.basis.marginal_variances(variance.expand(shape))
        return t._replace(
            log_snr=-variance.log(), alpha=torch.ones_like(variance), sigma=variance.sqrt()
        )
