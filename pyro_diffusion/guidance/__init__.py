"""Denoisers bent towards observations, and the likelihood read out of a Pyro program."""

from pyro_diffusion.guidance.base import GuidedDenoiser, Twisted
from pyro_diffusion.guidance.classifier import (
    ClassifierGuidance,
    NoiseAwareGuidance,
    SimilarityGuidance,
)
from pyro_diffusion.guidance.classifier_free import ClassifierFreeGuidance
from pyro_diffusion.guidance.daps import DAPS, DAPSCoefficients
from pyro_diffusion.guidance.data_covariance import DataCovariance
from pyro_diffusion.guidance.deviance import deviance_residual
from pyro_diffusion.guidance.gaussian_conditioning import (
    MMPS,
    TMPD,
    DiffPIR,
    GaussianConditioning,
    PiGDM,
)
from pyro_diffusion.guidance.krylov import KrylovSolution, conjugate_gradients, gmres
from pyro_diffusion.guidance.linearization import LinearizedChain, LinearizedProgram
from pyro_diffusion.guidance.plug_in import DPSStep, PlugIn
from pyro_diffusion.guidance.program import ProgramLikelihood, Whitened
from pyro_diffusion.guidance.replacement import Replacement
from pyro_diffusion.guidance.sampled import SampledGuidance
from pyro_diffusion.guidance.substitution import SubstitutionGuidance

__all__ = [
    "DAPS",
    "MMPS",
    "TMPD",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "DAPSCoefficients",
    "DPSStep",
    "DataCovariance",
    "DiffPIR",
    "GaussianConditioning",
    "GuidedDenoiser",
    "KrylovSolution",
    "LinearizedChain",
    "LinearizedProgram",
    "NoiseAwareGuidance",
    "PiGDM",
    "PlugIn",
    "ProgramLikelihood",
    "Replacement",
    "SampledGuidance",
    "SimilarityGuidance",
    "SubstitutionGuidance",
    "Twisted",
    "Whitened",
    "conjugate_gradients",
    "deviance_residual",
    "gmres",
]
