"""Any symbol first, masks in the end."""

import torch

from process_rows import Row
from process_rows._symbol_claims import claim
from process_rows._symbols import SYMBOLS, symbols_row
from pyro_diffusion.processes import VaryingNoise
from pyro_diffusion.schedules import Rectified


def row_varying_noise(draws: int) -> Row:
    mask = torch.eye(SYMBOLS + 1, dtype=torch.float64)[SYMBOLS]
    first = 0.6 * mask + 0.4 * (1 - mask) / SYMBOLS
    process = VaryingNoise(Rectified.full(), SYMBOLS, torch.stack([first, mask]))
    row = symbols_row("varying noise", process, draws)
    claim(row, process, draws)
    return row
