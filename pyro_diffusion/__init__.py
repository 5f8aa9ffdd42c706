"""Diffusion models as Pyro distributions and variational guides.

The names of a first program are here:

- views of a trained denoiser: :class:`~pyro_diffusion.distributions.Diffusion`,
  :class:`~pyro_diffusion.distributions.DiffusionSDE`,
  :class:`~pyro_diffusion.distributions.ProbabilityFlow`;
- forward processes and schedules: :class:`~pyro_diffusion.processes.GaussianProcess`,
  :class:`~pyro_diffusion.processes.Absorbing`; :class:`~pyro_diffusion.schedules.Cosine`,
  :class:`~pyro_diffusion.schedules.LogLinear`;
- denoisers: :class:`~pyro_diffusion.denoisers.GaussianDenoiser` with
  :class:`~pyro_diffusion.denoisers.LearnedVariance`, :class:`~pyro_diffusion.denoisers.LevelsDenoiser` with
  :class:`~pyro_diffusion.distributions.QuantizedDecoder`,
  :class:`~pyro_diffusion.denoisers.CategoricalDenoiser`;
- networks and training: :class:`~pyro_diffusion.nn.MLP`, :class:`~pyro_diffusion.nn.UNet`,
  :class:`~pyro_diffusion.optim.EMA`, :class:`~pyro_diffusion.train.Trainer`;
- a sampler: :class:`~pyro_diffusion.samplers.DDIM`;
- posteriors under a diffusion prior: :class:`~pyro_diffusion.infer.AutoGuidance`,
  :class:`~pyro_diffusion.infer.AutoTwistedSMC`, :class:`~pyro_diffusion.infer.TwistedSMC`,
  :class:`~pyro_diffusion.infer.ChainReparam`, :class:`~pyro_diffusion.likelihoods.ProgramLikelihood`;
- evaluation: :func:`~pyro_diffusion.evaluate.log_likelihood`.

All others are in the submodules, which need no import of their own: ``pyro_diffusion.samplers.simulate``.
``evaluate`` and ``plotting``, which need ArviZ and matplotlib, are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyro_diffusion import (
    checkpoint,
    denoisers,
    distributions,
    dynamics,
    foreign,
    guidance,
    infer,
    likelihoods,
    nn,
    optim,
    processes,
    samplers,
    schedules,
    train,
)
from pyro_diffusion.denoisers import (
    CategoricalDenoiser,
    GaussianDenoiser,
    LearnedVariance,
    LevelsDenoiser,
)
from pyro_diffusion.distributions import (
    Diffusion,
    DiffusionSDE,
    ProbabilityFlow,
    QuantizedDecoder,
)
from pyro_diffusion.infer import AutoGuidance, AutoTwistedSMC, ChainReparam, TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.nn import MLP, UNet
from pyro_diffusion.optim import EMA
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.samplers import DDIM
from pyro_diffusion.schedules import Cosine, LogLinear
from pyro_diffusion.train import Trainer

if TYPE_CHECKING:
    from pyro_diffusion import evaluate, plotting
    from pyro_diffusion.evaluate import log_likelihood

__version__ = "0.2.0"

__all__ = [
    "DDIM",
    "EMA",
    "MLP",
    "Absorbing",
    "AutoGuidance",
    "AutoTwistedSMC",
    "CategoricalDenoiser",
    "ChainReparam",
    "Cosine",
    "Diffusion",
    "DiffusionSDE",
    "GaussianDenoiser",
    "GaussianProcess",
    "LearnedVariance",
    "LevelsDenoiser",
    "LogLinear",
    "ProbabilityFlow",
    "ProgramLikelihood",
    "QuantizedDecoder",
    "Trainer",
    "TwistedSMC",
    "UNet",
    "checkpoint",
    "denoisers",
    "distributions",
    "dynamics",
    "evaluate",
    "foreign",
    "guidance",
    "infer",
    "likelihoods",
    "log_likelihood",
    "nn",
    "optim",
    "plotting",
    "processes",
    "samplers",
    "schedules",
    "train",
]

if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name: str) -> Any:
        """What is imported when first used (PEP 562)."""
        if name in ("evaluate", "plotting"):
            return import_module(f"pyro_diffusion.{name}")
        if name == "log_likelihood":
            return import_module("pyro_diffusion.evaluate").log_likelihood
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
