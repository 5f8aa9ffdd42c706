"""Helpers beside ``pyro.optim``: averages of a module's weights."""

from .ema import EMA

__all__ = ["EMA"]
