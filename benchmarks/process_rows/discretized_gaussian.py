"""Jumps to neighbours on a scale."""

from process_rows import Row
from process_rows._symbols import SYMBOLS, symbols_row
from pyro_diffusion.processes import DiscretizedGaussian
from pyro_diffusion.schedules import Rectified


def row_discretized_gaussian(draws: int) -> Row:
    process = DiscretizedGaussian(Rectified.full(), SYMBOLS, width=0.7)
    return symbols_row("discretized Gaussian", process, draws)
