"""Checkpoints: nested states and modules in one safetensors file.

A checkpoint holds everything in a single file that is replaced in one step, so that tensors,
numbers and description belong together whenever the process is killed, however many processes read
and write. Tensors are stored the safetensors way; the rest is JSON in the metadata of the file.
Loading runs no code from the file.

A *model* is more than its weights: :func:`save_model` writes a denoiser, or a distribution of one, with
everything that defines it, and :func:`load_model` builds it again.
"""

from pyro_diffusion.checkpoint.files import CheckpointError
from pyro_diffusion.checkpoint.models import load_model, save_model
from pyro_diffusion.checkpoint.registry import register
from pyro_diffusion.checkpoint.saving import load, load_module, save, save_module

__all__ = [
    "CheckpointError",
    "load",
    "load_model",
    "load_module",
    "register",
    "save",
    "save_model",
    "save_module",
]
