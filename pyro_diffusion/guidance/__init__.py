"""Denoisers bent towards observations."""

from pyro_diffusion.guidance.amortized_twist import AmortizedTwist
from pyro_diffusion.guidance.base import GuidedDenoiser, Twisted
from pyro_diffusion.guidance.calibrated_covariance import CalibratedCovariance
from pyro_diffusion.guidance.classifier import (
    ClassifierGuidance,
    SimilarityGuidance,
)
from pyro_diffusion.guidance.classifier_free import ClassifierFreeGuidance
from pyro_diffusion.guidance.covariances import MMPS, TMPD, DiffPIR, PiGDM
from pyro_diffusion.guidance.data_covariance import DataCovariance
from pyro_diffusion.guidance.plug_in import DPSStep, PlugIn
from pyro_diffusion.guidance.replacement import Replacement
from pyro_diffusion.guidance.sampled import SampledGuidance
from pyro_diffusion.guidance.substitution import SubstitutionGuidance

__all__ = [
    "MMPS",
    "TMPD",
    "AmortizedTwist",
    "CalibratedCovariance",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "DPSStep",
    "DataCovariance",
    "DiffPIR",
    "GuidedDenoiser",
    "PiGDM",
    "PlugIn",
    "Replacement",
    "SampledGuidance",
    "SimilarityGuidance",
    "SubstitutionGuidance",
    "Twisted",
]
