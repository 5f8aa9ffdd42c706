"""Blur of two neighbouring pixels."""

from process_rows import Row
from process_rows._rotated import rotated_row
from pyro_diffusion.processes import Basis, Blurring
from pyro_diffusion.schedules import LogLinear


def row_blurring(draws: int) -> Row:
    process = Blurring(LogLinear(12.0, -12.0), Basis.dct((2,), dims=1), sigma_max=2.0)
    return rotated_row("Blurring", process, draws)
