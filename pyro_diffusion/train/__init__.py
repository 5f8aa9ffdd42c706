"""The loop around a Pyro program: minibatches, averages, validation, checkpoints.

Stock ``SVI`` trains every model of this package as well; :class:`~pyro_diffusion.train.Trainer` is what one
writes around it, once.
"""

from pyro_diffusion.train.trainer import Trainer

__all__ = ["Trainer"]
