"""Replacement by any symbol."""

from process_rows import Row
from process_rows._symbol_claims import claim
from process_rows._symbols import SYMBOLS, symbols_row
from pyro_diffusion.processes import Uniform
from pyro_diffusion.schedules import Rectified


def row_uniform(draws: int) -> Row:
    process = Uniform(Rectified.full(), SYMBOLS)
    row = symbols_row("uniform", process, draws)
    claim(row, process, draws)
    return row
