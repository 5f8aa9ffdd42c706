"""Masking."""

from process_rows import Row
from process_rows._symbol_claims import claim, claim_orders
from process_rows._symbols import SYMBOLS, symbols_row, table
from pyro_diffusion.denoisers import TableDenoiser
from pyro_diffusion.distributions import DiffusionCTMC
from pyro_diffusion.processes import Absorbing
from pyro_diffusion.samplers import FirstHitting
from pyro_diffusion.schedules import Rectified


def row_absorbing(draws: int) -> Row:
    process = Absorbing(Rectified.full(), SYMBOLS)
    view = DiffusionCTMC(TableDenoiser(process, table()), (2,), 2, sampler=FirstHitting())
    row = symbols_row("absorbing", process, draws, {"first hitting, 2 steps": view})
    claim(row, process, draws)
    claim_orders(row)
    return row
