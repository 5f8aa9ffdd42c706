"""Diffusion models as Pyro distributions, and the densities at their data end."""

from pyro_diffusion.distributions.decoders import (
    CategoricalDecoder,
    Decoder,
    NormalDecoder,
    QuantizedDecoder,
    default_decoder,
)
from pyro_diffusion.distributions.dequantization import Dequantization
from pyro_diffusion.distributions.diffusion import Diffusion
from pyro_diffusion.distributions.discretized import DiscretizedNormal
from pyro_diffusion.distributions.objectives import (
    Bound,
    Hybrid,
    Objective,
    Simple,
    Weighted,
    divergence,
)

__all__ = [
    "Bound",
    "CategoricalDecoder",
    "Decoder",
    "Dequantization",
    "Diffusion",
    "DiscretizedNormal",
    "Hybrid",
    "NormalDecoder",
    "Objective",
    "QuantizedDecoder",
    "Simple",
    "Weighted",
    "default_decoder",
    "divergence",
]
