"""Denoisers bent towards observations."""

from pyro_diffusion.guidance.base import GuidedDenoiser, Twisted
from pyro_diffusion.guidance.classifier import (
    ClassifierGuidance,
    NoiseAwareGuidance,
    SimilarityGuidance,
)
from pyro_diffusion.guidance.classifier_free import ClassifierFreeGuidance
from pyro_diffusion.guidance.daps import DAPS, DAPSCoefficients
from pyro_diffusion.guidance.data_covariance import DataCovariance
from pyro_diffusion.guidance.gaussian_conditioning import (
    MMPS,
    TMPD,
    DiffPIR,
    GaussianConditioning,
    PiGDM,
)
from pyro_diffusion.guidance.krylov import KrylovSolution, conjugate_gradients, gmres
from pyro_diffusion.guidance.linearized_denoiser import LinearizedChain
from pyro_diffusion.guidance.plug_in import DPSStep, PlugIn
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
    "NoiseAwareGuidance",
    "PiGDM",
    "PlugIn",
    "Replacement",
    "SampledGuidance",
    "SimilarityGuidance",
    "SubstitutionGuidance",
    "Twisted",
    "conjugate_gradients",
    "gmres",
]
