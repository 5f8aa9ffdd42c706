"""Observations that are not linear: averaged, linearized again, and what observations leave of a variance."""

import contextlib
import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch.testing import assert_close

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import MMPS, TMPD, DataCovariance, PiGDM
from pyro_diffusion.guidance.relinearization import PAIRS, averaged
from pyro_diffusion.infer import AutoGuidance
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.likelihoods.whitening import Whitened
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine
from pyro_diffusion.unreliable import UnreliableWarning

F64 = torch.float64
MEANS = torch.tensor([[-0.7, 0.4, 0.1], [0.6, -0.5, 0.8]], dtype=F64)
MATRIX = torch.tensor([[1.0, 0.5, -0.5], [0.0, 1.0, 1.0]], dtype=F64)
NORMAL = MixtureDenoiser(
    GaussianProcess(Cosine()), torch.ones(1, dtype=F64), torch.zeros(1, 3, dtype=F64), 0.5
)
MIXTURE = MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(2, dtype=F64), MEANS, 0.1)
OPERATORS = {
    "linear": lambda x: x @ MATRIX.mT,
    "clipping": lambda x: x.clamp(-0.3, 0.3),
    "magnitudes": lambda x: (x @ MATRIX.mT).abs(),
}


def likelihood(denoiser, operator, y, sd=0.05):
    prior = Diffusion(denoiser, (3,), steps=40)

    def model():
        with pyro.plate("rows", len(y)) if y.dim() == 2 else contextlib.nullcontext():
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(OPERATORS[operator](x), sd).to_event(1), obs=y)

    return ProgramLikelihood(model)


def squares(x0):
    return Whitened(x0.square(), torch.zeros_like(x0[..., 0]))


def test_an_affine_residual_is_averaged_to_itself():
    def affine(x0):
        return Whitened(3 * x0 @ MATRIX.mT - 1, x0.new_ones(x0.shape[:-1]))

    x = torch.randn(4, 3, dtype=F64)
    found = averaged(affine, torch.tensor(2.0, dtype=F64), 1)(x)
    assert_close(found.residual, affine(x).residual)
    assert_close(found.log_normalizer, affine(x).log_normalizer)


def test_an_average_of_squares_is_the_mean_and_what_no_line_explains():
    """r(x) = x^2: mean x^2 + v, slope 2 x, and the variance of v z^2 on top of the noise's."""
    x, v = torch.tensor([0.7, -0.2, 0.0], dtype=F64).requires_grad_(), 0.3
    found = averaged(squares, torch.tensor(v, dtype=F64), 1)(x)
    scale = torch.exp(-2 * found.log_normalizer)  # 1 + variance, of all residuals together
    noise = (x.detach().square() + v) / found.residual.detach()
    assert_close(scale, noise.square().prod())
    (slope,) = torch.autograd.grad((found.residual * noise).sum(), x)
    assert_close(slope, 2 * x.detach())
    # z^2 has variance 2 under a normal; the fixed directions are few.
    assert (noise.square() > 1).all() and (noise.square() < 1 + 2 * v**2 * PAIRS).all()


@pytest.mark.parametrize("method", [MMPS, PiGDM, TMPD, functools.partial(MMPS, solver="cg")])
def test_linear_observations_are_solved_once(method):
    y, x = torch.tensor([0.4, -0.2], dtype=F64), torch.randn(3, dtype=F64)
    found = [
        method(MIXTURE, likelihood(MIXTURE, "linear", y), relinearizations=passes)(x, 0.4)
        for passes in (0, 3)
    ]
    assert torch.equal(found[0].mean, found[1].mean)
    assert torch.equal(found[0].variance, found[1].variance)


@pytest.mark.parametrize("operator", ["clipping", "magnitudes"])
def test_rows_are_relinearized_alone(operator):
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=F64)
    y = OPERATORS[operator](torch.randn(5, 3, dtype=F64))
    together = MMPS(MIXTURE, likelihood(MIXTURE, operator, y))(x, 0.3)
    for row in range(5):
        alone = MMPS(MIXTURE, likelihood(MIXTURE, operator, y[row]))(x[row], 0.3)
        assert_close(together.mean[row], alone.mean)
        assert_close(together.variance[row], alone.variance)


def test_a_clipped_reading_pulls_back_what_is_beyond():
    """Where a reading is clipped its derivative is 0 at the mean; on average around it, it is not."""
    y, x = torch.tensor([0.1, 0.1, 0.1], dtype=F64), torch.tensor([0.8, 1.0, -0.9], dtype=F64)
    before = NORMAL(x, 0.4).mean
    assert (before.abs() > 0.3).all()
    once, more = (
        MMPS(NORMAL, likelihood(NORMAL, "clipping", y), relinearizations=passes)(x, 0.4).mean
        for passes in (0, 2)
    )
    assert_close(once, before)
    assert ((more - y).abs() < 0.5 * (before - y).abs()).all()


def misfit(operator, passes, seed=0):
    """Mean chi^2 of 100 draws for each of 10 observations."""
    pyro.set_rng_seed(seed)
    which = torch.randint(2, (10,))
    truth = MEANS[which] + 0.1**0.5 * torch.randn(10, 3, dtype=F64)
    y = dist.Normal(OPERATORS[operator](truth), 0.05).sample()
    prior = Diffusion(MIXTURE, (3,), steps=64)

    def model():
        with pyro.plate("rows", 10):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(OPERATORS[operator](x), 0.05).to_event(1), obs=y)

    guide = AutoGuidance(model, functools.partial(MMPS, relinearizations=passes))
    draws = Predictive(model, guide=guide, num_samples=100, parallel=True)()["x"]
    return float(((y - OPERATORS[operator](draws)) / 0.05).square().mean())


def test_draws_of_clipped_observations_fit_them():
    """chi^2 was 0.9 to 1.3 over seeds 0 to 4, and over 3 without; one seed is run, so no false alarms."""
    assert 0.8 < misfit("clipping", 2) < 1.4
    with pytest.warns(UnreliableWarning, match="AutoGuidance: draws miss the observations"):
        assert misfit("clipping", 0) > 1.4


@pytest.mark.parametrize("kind", ["MMPS", "PiGDM", "DataCovariance"])
def test_the_variance_left_is_that_of_the_conditional_normal(kind):
    """Normal data: p(x_0 | x_t, y) in closed form, coordinate by coordinate."""
    y = torch.tensor([0.4, -0.2], dtype=F64)
    seen = likelihood(NORMAL, "linear", y, sd=0.2)
    covariance = 0.5 * torch.eye(3, dtype=F64)
    guided = {
        "MMPS": lambda: MMPS(NORMAL, seen),
        "PiGDM": lambda: PiGDM(NORMAL, seen),
        "DataCovariance": lambda: DataCovariance(NORMAL, seen, covariance=covariance),
    }[kind]()
    x, level = torch.randn(3, dtype=F64), NORMAL.process.level(torch.tensor(0.5, dtype=F64))
    snr = float((level.alpha / level.sigma).square())
    precision = (2 + snr) * torch.eye(3, dtype=F64) + MATRIX.mT @ MATRIX / 0.2**2
    assert_close(guided(x, 0.5).variance, torch.linalg.inv(precision).diagonal())
    assert_close(guided.twisted(x, 0.5).posterior.variance, guided.twisted(x, 0.5).prior.variance)
