"""Beside ``pyro.optim``: one optimizer for all parameters, Amos, and averages of a module's weights."""

from .amos import Amos
from .ema import EMA
from .joint import JointOptim

__all__ = ["EMA", "Amos", "JointOptim"]
