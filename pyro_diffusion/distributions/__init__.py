"""Diffusion models as Pyro distributions, and the densities at their data end."""

from pyro_diffusion.denoisers.fourier_density import FourierDensity
from pyro_diffusion.distributions import kl as _kl  # noqa: F401 (registers divergences)
from pyro_diffusion.distributions.argmax import ArgmaxCategorical, RelaxedArgmaxCategorical
from pyro_diffusion.distributions.autoregressive import Autoregressive, OrderAgnostic
from pyro_diffusion.distributions.basis_decoder import BasisDecoder
from pyro_diffusion.distributions.ctmc import DiffusionCTMC
from pyro_diffusion.distributions.decoders import (
    CategoricalDecoder,
    Decoder,
    NormalDecoder,
    QuantizedDecoder,
)
from pyro_diffusion.distributions.dequantization import Dequantization
from pyro_diffusion.distributions.diffusion import Diffusion
from pyro_diffusion.distributions.flow import ProbabilityFlow
from pyro_diffusion.distributions.objectives import (
    Bound,
    Objective,
    Weighted,
)
from pyro_diffusion.distributions.red_diff import RedDiff
from pyro_diffusion.distributions.regressions import (
    FlowMatching,
    Hybrid,
    MomentRegression,
    Simple,
)
from pyro_diffusion.distributions.sde import DiffusionSDE

__all__ = [
    "ArgmaxCategorical",
    "Autoregressive",
    "BasisDecoder",
    "Bound",
    "CategoricalDecoder",
    "Decoder",
    "Dequantization",
    "Diffusion",
    "DiffusionCTMC",
    "DiffusionSDE",
    "FlowMatching",
    "FourierDensity",
    "Hybrid",
    "MomentRegression",
    "NormalDecoder",
    "Objective",
    "OrderAgnostic",
    "ProbabilityFlow",
    "QuantizedDecoder",
    "RedDiff",
    "RelaxedArgmaxCategorical",
    "Simple",
    "Weighted",
]
