"""Diffusion models as Pyro distributions and variational guides."""

__version__ = "0.1.0"
