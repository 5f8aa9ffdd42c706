"""Small networks to start from: any module with their call signature can take their place.

A network is called as ``network(x, log_snr, **context)`` with ``x`` of shape ``(N, *event)``,
``log_snr`` of shape ``(N,)`` and one tensor of shape ``(N, ...)`` for each named context. It
returns ``x.shape`` when its attribute ``outputs`` is 1, else ``x.shape + (outputs,)``.
"""

from .conditional_mlp import ConditionalMLP
from .context import LabelContext, TensorContext
from .mlp import MLP
from .tokens import DiT, SetTransformer
from .transformer import Transformer
from .unet import UNet

__all__ = [
    "MLP",
    "ConditionalMLP",
    "DiT",
    "LabelContext",
    "SetTransformer",
    "TensorContext",
    "Transformer",
    "UNet",
]
