"""The loop around a Pyro program: minibatches, averages, validation, checkpoints.

Stock ``SVI`` trains every model of this package as well; :class:`~pyro_diffusion.train.Trainer` is what one
writes around it, once; :func:`~pyro_diffusion.train.fit_amortized` is a recipe on top of it.
"""

from pyro_diffusion.train.amortized import fit_amortized
from pyro_diffusion.train.trainer import Trainer
from pyro_diffusion.train.truncated import fit_truncated

__all__ = ["Trainer", "fit_amortized", "fit_truncated"]
