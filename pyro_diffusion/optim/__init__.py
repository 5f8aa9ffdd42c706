"""Beside ``pyro.optim``: one optimizer for all parameters, and averages of a module's weights."""

from .ema import EMA
from .joint import JointOptim

__all__ = ["EMA", "JointOptim"]
