"""Inverse heat dissipation: fresh noise at every step, and a reverse kernel that is wider than it.

Its bound is far below log p at many steps, and its ancestral samples are not the data: they are compared with
the distribution of the chain itself, which is known for normal data.
"""

from process_rows import Row
from process_rows._blurred import blurred, blurred_row, sampled
from pyro_diffusion.schedules import LogLinear


def row_heat_dissipation(draws: int) -> Row:
    process = blurred(LogLinear(8.0, -8.0), 0.05, renewal=1.0, reverse_scale=0.0625)
    return sampled(blurred_row("heat dissipation", process, draws), process, own=True)
