"""A log-SNR shifted by coordinate of a turned basis."""

import torch

from process_rows import Row
from process_rows._paths import claim_paths
from process_rows._rotated import rotated_row
from pyro_diffusion.processes import Basis, SpectralGaussian
from pyro_diffusion.schedules import LogLinear


def row_spectral(draws: int) -> Row:
    basis = Basis(torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64), (2,))
    shift = torch.tensor([0.0, 2.0])
    process = SpectralGaussian(LogLinear(12.0, -12.0), basis, shift)
    row = rotated_row("SpectralGaussian", process, draws)
    claim_paths(row, basis, shift, draws)
    return row
