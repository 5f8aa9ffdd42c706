"""Models that were trained elsewhere, as denoisers: one function for each library or convention.

Each takes a module, or reads it from a local folder of safetensors, and returns a
:class:`~pyro_diffusion.denoisers.Denoiser`, with a process and schedule that are exactly the foreign ones.
Nothing is downloaded and nothing is unpickled. ``save_diffusers`` is the way back.
"""

from pyro_diffusion.foreign.azula import from_azula
from pyro_diffusion.foreign.diffusers import from_diffusers, load_diffusers
from pyro_diffusion.foreign.edm import from_edm
from pyro_diffusion.foreign.masked_lm import from_masked_lm
from pyro_diffusion.foreign.saving import save_diffusers
from pyro_diffusion.foreign.score_sde import from_score_sde

__all__ = [
    "from_azula",
    "from_diffusers",
    "from_edm",
    "from_masked_lm",
    "from_score_sde",
    "load_diffusers",
    "save_diffusers",
]
