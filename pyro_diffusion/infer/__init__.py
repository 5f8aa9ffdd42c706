"""Diffusions inside Pyro's inference: the chain as model and guide."""

from pyro_diffusion.infer.ddpm import DDPM
from pyro_diffusion.infer.reparam import ChainReparam, forward_chain, reverse_chain

__all__ = ["DDPM", "ChainReparam", "forward_chain", "reverse_chain"]
