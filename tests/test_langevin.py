"""Langevin moves, predictor-corrector and annealed Langevin: formulas, stationary laws, independence."""

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from pyro_diffusion.denoisers import TableDenoiser
from pyro_diffusion.processes import Uniform
from pyro_diffusion.samplers import (
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    Ancestral,
    AnnealedLangevin,
    DPMSolverPP,
    Heun,
    Langevin,
    PredictorCorrector,
    UniPC,
    langevin,
    simulate,
)
from pyro_diffusion.schedules import Cosine, LogLinear, VarianceExploding
from tests.exact import DTYPES, SCHEDULES, Gauge, mixture, mixture_law
from tests.sampler_table import grid, normal_data, start

F64 = torch.float64
PREDICTORS = [
    Ancestral(),
    DDIM(),
    AdamsBashforth(3),
    AdamsMoulton(),
    DPMSolverPP(1.0),
    UniPC(),
    Heun(),
]
SAMPLERS = [PredictorCorrector(p, Langevin(moves=2)) for p in PREDICTORS] + [
    AnnealedLangevin(moves=3)
]
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)


@each_sampler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_shapes_and_evaluations(sampler, dtype, batch):
    denoiser = mixture(Cosine()).to(dtype)
    reads = []
    denoiser.register_forward_hook(lambda *_: reads.append(1))
    x = simulate(
        denoiser, grid(Cosine(), 4).to(dtype), torch.randn(*batch, 2, dtype=dtype), sampler
    )
    assert x.shape == (*batch, 2) and x.dtype == dtype and bool(torch.isfinite(x).all())
    assert len(reads) == 4 * sampler.evaluations
    assert sampler.order is sampler.weak_order is sampler.strong_order is None


@pytest.mark.parametrize("name", ["cosine", "exploding", "rectified", "sub-VP"])
def test_a_move_is_a_step_of_langevin_dynamics(name):
    """x + delta score + sqrt(2 delta) z with the score by automatic differentiation of the exact law."""
    schedule = SCHEDULES[name]()
    denoiser, snr = mixture(schedule), 0.2
    t = torch.tensor(0.4, dtype=F64)
    level = schedule.level(t)
    x = start(denoiser, 6).requires_grad_()
    law = mixture_law(level.alpha, level.sigma)
    (score,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    delta = 2 * snr**2 * level.sigma**2
    torch.manual_seed(1)
    expected = torch.normal(x + delta * score, (2 * delta).sqrt().expand(x.shape))
    mover = Langevin(snr)
    c = mover.coefficients(denoiser.process, level)
    torch.manual_seed(1)
    moved = mover.correct(denoiser.process, denoiser, x.detach(), level, c)
    assert_close(moved, expected.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("snr", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_stationary_law(snr, t, monkeypatch):
    """Normal data: carried through the affine move, mean and variance settle at the documented law's."""
    schedule = Cosine()
    denoiser = normal_data(schedule)
    level = schedule.level(torch.tensor(t, dtype=F64))
    law = denoiser.marginal(level.t)
    mover = Langevin(snr)
    c = mover.coefficients(denoiser.process, level)
    kernels = []
    monkeypatch.setattr(langevin, "draw", lambda kernel: kernels.append(kernel) or kernel.mean)
    mover.correct(denoiser.process, denoiser, torch.tensor([[0.0], [1.0]], dtype=F64), level, c)
    kernel = kernels[0]
    gain = kernel.mean[1] - kernel.mean[0]
    assert_close(kernel.mean[0] / (1 - gain), law.mean[0].reshape(1))
    stationary = kernel.variance[0] / (1 - gain**2)
    expected = law.variance / (1 - snr**2 * level.sigma**2 / law.variance)
    assert_close(stationary, expected.reshape(1))


def test_moves_repair_a_wrong_state():
    """From far away at one level, 400 moves reach the mixture's law there.

    Kolmogorov-Smirnov tests at 1e-4 of both coordinates (false alarms 2e-4); 1500 draws do not see the moves'
    own error of snr^2 = 1% in variance. The level is noisy enough for moves to cross between components.
    """
    schedule = Cosine()
    denoiser = mixture(schedule)
    level = schedule.level(torch.tensor(0.7, dtype=F64))
    mover = Langevin(snr=0.1, moves=400)
    c = mover.coefficients(denoiser.process, level)
    x = mover.correct(denoiser.process, denoiser, torch.full((1500, 2), 2.0, dtype=F64), level, c)
    exact = mixture_law(level.alpha, level.sigma).sample((50_000,))
    for i in (0, 1):
        assert stats.ks_2samp(x[:, i].numpy(), exact[:, i].numpy()).pvalue > 1e-4


@pytest.mark.parametrize("sampler", [*SAMPLERS[:-1], AnnealedLangevin(snr=0.3, moves=5)], ids=repr)
def test_samples_follow_the_mixture(sampler):
    """Kolmogorov-Smirnov tests at 1e-4 of both coordinates (false alarms 2e-4 a sampler); 1000 draws."""
    schedule = LogLinear(8.0, -8.0)
    denoiser = mixture(schedule)
    x = simulate(denoiser, grid(schedule, 60), start(denoiser, 1000), sampler)
    exact = mixture_law().sample((50_000,))
    for i in (0, 1):
        assert stats.ks_2samp(x[:, i].numpy(), exact[:, i].numpy()).pvalue > 1e-4


@each_sampler
def test_rows_are_independent(sampler, monkeypatch):
    """Row 0 alone is row 0 of a batch whose other rows are far off: no step size knows its batch-mates."""
    denoiser = mixture(VarianceExploding(0.05, 10.0))
    times = grid(denoiser.process.schedule, 4)
    x = start(denoiser, 3)
    wild = torch.cat([x[:1], 100 * x[1:]])
    noise = torch.randn(200, 2, dtype=F64)
    ends = []
    for batch in (x[:1], wild):
        feed = iter(noise)

        def fed(kernel, feed=feed):
            return kernel.mean + kernel.stddev * next(feed)

        for module in (langevin, pytest.importorskip("pyro_diffusion.samplers.ancestral")):
            monkeypatch.setattr(module, "draw", fed)
        ends.append(simulate(denoiser, times, batch, sampler)[0])
    assert_close(*ends, rtol=1e-9, atol=1e-9)


@each_sampler
def test_the_scale_of_the_state_does_not_matter(sampler):
    """The same log-SNRs under two scales, the same noise: the same x / alpha."""
    ends = []
    for schedule in (LogLinear(9.0, -9.0), Gauge(3.0, 9.0, -9.0)):
        level = schedule.level(grid(schedule, 7))
        torch.manual_seed(5)
        x = level.sigma[-1] * torch.ones(3, 2, dtype=F64)
        ends.append(simulate(mixture(schedule), level.t, x, sampler) / level.alpha[0])
    assert_close(*ends, rtol=1e-8, atol=1e-8)


def test_annealed_langevin_only_rescales_between_levels():
    """With moves so small that they vanish, x / alpha is kept."""
    schedule = Cosine()
    level = schedule.level(grid(schedule, 5))
    x = torch.randn(4, 2, dtype=F64)
    end = simulate(mixture(schedule), level.t, x, AnnealedLangevin(snr=1e-12, moves=1))
    assert_close(end / level.alpha[0], x / level.alpha[-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Langevin(snr=0.0), r"^snr: got 0.0, expected a number in \(0, 1\)"),
        (lambda: Langevin(snr=1.0), r"^snr: got 1.0"),
        (lambda: Langevin(moves=0), r"^moves: got 0, expected an integer >= 1"),
        (lambda: AnnealedLangevin(moves=0), r"^moves: got 0"),
        (lambda: PredictorCorrector("ddim"), r"^sampler: got 'ddim'"),
        (lambda: PredictorCorrector(DDIM(), DDIM()), r"^corrector: got DDIM.*expected Langevin"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sampler", [PredictorCorrector(Ancestral()), AnnealedLangevin()], ids=repr)
def test_symbols_are_refused(sampler):
    denoiser = TableDenoiser(Uniform(Cosine(), 3), torch.ones(3, 3))
    with pytest.raises(
        ValueError, match=r"^corrector: got Langevin.* under Uniform, which lacks Tweedie"
    ):
        simulate(denoiser, grid(Cosine(), 2), torch.zeros(2, dtype=torch.int64), sampler)
