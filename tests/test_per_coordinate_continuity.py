"""The residual of the continuity equation under scales by coordinate: zero if exact, and its value if not."""

import torch
from torch.distributions import Normal

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.evaluate import continuity_residual
from tests.per_coordinate import F64, MEAN, VARIANCE, PerCoordinate, normal


def data(count):
    return Normal(torch.tensor(MEAN, dtype=F64), VARIANCE**0.5).sample((count,))


def test_an_exact_denoiser_has_none():
    # 320 numbers, all within 4.8 of their standard errors: a false alarm in 1900 runs.
    found = continuity_residual(normal(), data(20_000), levels=10)
    assert found.value.shape == (10, 32) and found.z.abs().max() < 4.8


def test_a_wrong_denoiser_has_that_of_its_flow():
    """R = sum_k E[d phi/d x_k] alpha_k (d lambda_k / d clock) / 2 times the constant gap in coordinate k.

    The denoiser is exact for data shifted by c in one coordinate, so its gap is the same at every state.
    """
    wrong = MixtureDenoiser(
        PerCoordinate(),
        torch.ones(1, dtype=F64),
        torch.tensor([MEAN], dtype=F64) + torch.tensor([0.0, 1.0], dtype=F64),
        VARIANCE,
    )
    torch.manual_seed(5)
    found = continuity_residual(wrong, data(200_000), levels=torch.tensor([0.0]), num_functions=8)
    torch.manual_seed(5)
    data(200_000)  # the same numbers are drawn for the functions after the data
    octave = 1 + torch.arange(8) % 2
    w = torch.randn(2, 8, dtype=F64) * octave / 2**0.5
    b = 2 * torch.pi * torch.rand(8, dtype=F64)
    level = PerCoordinate().level_of_clock(torch.zeros((), dtype=F64))
    spread = VARIANCE + sum(m**2 for m in MEAN) / 2
    width = (level.alpha**2 * spread + level.sigma**2).sqrt()
    # E sin(w . x / width + b) of a normal x_t is closed; x_0 - x0_hat has the mean -(1 - gain alpha) c.
    mean, variance = (
        level.alpha * torch.tensor(MEAN, dtype=F64),
        level.alpha**2 * VARIANCE + level.sigma**2,
    )
    frequency = w / width[:, None]
    phase, decay = mean @ frequency + b, torch.exp(-0.5 * (variance @ frequency.square()))
    gain = level.alpha * VARIANCE / variance
    gap = -torch.tensor([0.0, 1.0], dtype=F64) * (1 - gain * level.alpha)
    pace = torch.tensor([1.0, 0.6], dtype=F64)
    expected = -0.5 * torch.sin(phase) * decay * ((level.alpha * pace * gap) @ frequency)
    # 8 numbers within 4.5 standard errors and 1 % for the spread that is estimated: false alarms below 1e-4.
    error = (found.value[0] - expected).abs()
    assert (error < 4.5 * found.standard_error[0] + 0.01 * expected.abs()).all()
    assert found.z.abs().max() > 20
