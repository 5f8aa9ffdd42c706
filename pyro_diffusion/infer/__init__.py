"""Diffusions inside Pyro's inference: the chain as model and guide, posteriors of any program."""

from pyro_diffusion.infer.annealing.annealed_smc import AnnealedSMC
from pyro_diffusion.infer.auto_diffusion import AutoDiffusion
from pyro_diffusion.infer.autoguide import AutoGuidance, AutoTwistedSMC
from pyro_diffusion.infer.ddpm import DDPM
from pyro_diffusion.infer.density_ratio import DensityRatio
from pyro_diffusion.infer.filtering.particle_gibbs import ParticleGibbs
from pyro_diffusion.infer.filtering.twisted_smc import Particles, TwistedSMC
from pyro_diffusion.infer.path_elbo import PathELBO
from pyro_diffusion.infer.reparam import ChainReparam
from pyro_diffusion.infer.responsibilities import Responsibilities
from pyro_diffusion.infer.simulators.auto_amortized import AutoAmortized
from pyro_diffusion.infer.simulators.auto_ensemble import AutoEnsemble
from pyro_diffusion.infer.simulators.auto_joint import AutoJoint
from pyro_diffusion.infer.simulators.composed import ComposedPosterior
from pyro_diffusion.unreliable import UnreliableWarning

__all__ = [
    "DDPM",
    "AnnealedSMC",
    "AutoAmortized",
    "AutoDiffusion",
    "AutoEnsemble",
    "AutoGuidance",
    "AutoJoint",
    "AutoTwistedSMC",
    "ChainReparam",
    "ComposedPosterior",
    "DensityRatio",
    "ParticleGibbs",
    "Particles",
    "PathELBO",
    "Responsibilities",
    "TwistedSMC",
    "UnreliableWarning",
]
