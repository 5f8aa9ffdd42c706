"""A log-SNR curve of its own for every coordinate of a turned basis."""

import torch

from process_rows import Row
from process_rows._rotated import rotated_row
from pyro_diffusion.processes import Basis, LearnedSpectralGaussian
from pyro_diffusion.schedules import LogLinear


def row_learned_spectral(draws: int) -> Row:
    basis = Basis(torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64), (2,))
    process = LearnedSpectralGaussian(LogLinear(12.0, -12.0), basis, degree=4)
    with torch.no_grad():
        process.steps.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [-1.0, 1.0]]))
    return rotated_row("LearnedSpectralGaussian", process.requires_grad_(False), draws)
