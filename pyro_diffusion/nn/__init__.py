"""Small networks to start from: any module with their call signature can take their place.

A network is called as ``network(x, log_snr, **context)`` with ``x`` of shape ``(N, *event)``,
``log_snr`` of shape ``(N,)`` and one tensor of shape ``(N, ...)`` for each named context. It
returns ``x.shape`` when its attribute ``outputs`` is 1, else ``x.shape + (outputs,)``. Autoregressive
networks (:class:`MADE`, :class:`NADE`) are called as ``network(x, order, context)`` and know of no noise.

Encoders are of another kind: they summarize data (N, ...) as vectors (N, features).
"""

from .autoregressive import MADE
from .conditional_mlp import ConditionalMLP
from .context import LabelContext, TensorContext
from .image_encoder import ImageEncoder
from .mlp import MLP
from .nade import NADE
from .series import SeriesEncoder
from .sets import SetEncoder
from .site_transformer import SiteTransformer
from .tokens import DiT, SetTransformer
from .transformer import Transformer
from .unet import UNet

__all__ = [
    "MADE",
    "MLP",
    "NADE",
    "ConditionalMLP",
    "DiT",
    "ImageEncoder",
    "LabelContext",
    "SeriesEncoder",
    "SetEncoder",
    "SetTransformer",
    "SiteTransformer",
    "TensorContext",
    "Transformer",
    "UNet",
]
