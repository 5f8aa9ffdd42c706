"""Proposals that take account of the readings' covariance: algebra, and weights without variance."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance.proposal import Readings, told, told_at_last
from pyro_diffusion.infer import TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import GaussianProcess, draw, drawing_from
from pyro_diffusion.processes.conditioned_normal import (
    ConditionedNormal,
    normal_from,
    normal_tensors,
)
from pyro_diffusion.processes.row_noise import RowNoise
from pyro_diffusion.schedules import LogLinear, uniform

F64 = torch.float64
close = torch.testing.assert_close


def example(batch=(5,), event=(2, 3), m=4) -> ConditionedNormal:
    loc, scale = torch.randn(*batch, *event, dtype=F64), torch.rand(*event, dtype=F64) + 0.5
    return ConditionedNormal(loc, scale, torch.randn(*batch, *event, m, dtype=F64), len(event))


def dense(kernel) -> dist.MultivariateNormal:
    n = kernel.event_shape.numel()
    loc, scale = (v.reshape(*kernel.batch_shape, n) for v in (kernel.loc, kernel.scale))
    f = kernel.factor.reshape(*kernel.batch_shape, n, -1) / scale.unsqueeze(-1)
    precision = torch.diag_embed(scale**-2) + f @ f.mT
    return dist.MultivariateNormal(loc, precision_matrix=precision)


def test_density_and_variance_are_those_of_the_dense_normal():
    kernel = example()
    x, same = torch.randn(7, 5, 2, 3, dtype=F64), dense(kernel)
    close(kernel.log_prob(x), same.log_prob(x.flatten(-2)))
    close(kernel.variance.flatten(-2), same.variance)
    assert kernel.batch_shape == (5,) and kernel.event_shape == (2, 3)
    wide = kernel.expand((7, 5))
    close(wide.log_prob(x), kernel.log_prob(x))
    again = normal_from(normal_tensors(kernel), 2)
    close(again.log_prob(x), kernel.log_prob(x))


@pytest.mark.parametrize("rows", [False, True], ids=["global noise", "noise by row"])
def test_draws_have_its_covariance(rows):
    # The largest of 21 entries beyond 5 standard errors: a false alarm in 1e-5 of seeds.
    kernel, count = example(batch=(1,)), 40000
    if rows:
        with drawing_from(RowNoise(3, torch.arange(1))):
            x = draw(kernel, (count,))
    else:
        x = kernel.rsample((count,))
    z = torch.linalg.solve_triangular(
        dense(kernel).scale_tril[0], (x - kernel.loc).reshape(count, 6).mT, upper=False
    )
    product = z @ z.mT / count - torch.eye(6, dtype=F64)
    assert product.abs().max() < 5 * math.sqrt(2 / count)
    assert z.mean(1).abs().max() < 5 / math.sqrt(count)


def normal_world(weight: float, variance: float, bridge: float):
    """x_0 ~ N(0, v I) given x_t, x_s = k x_0 + bridge noise, readings B x_0 of unit noise."""
    b, y = torch.randn(3, 4, dtype=F64), torch.randn(3, dtype=F64)
    readings = Readings.of(y[None], b[None], variance * b[None])
    spread = math.sqrt(bridge + weight**2 * variance)
    kernel = dist.Normal(torch.zeros(1, 4, dtype=F64), spread).to_event(1)
    return b, y, readings, kernel


def test_weights_do_not_depend_on_what_is_drawn():
    k, v, bridge = 0.8, 0.6, 0.2
    b, y, readings, kernel = normal_world(k, v, bridge)
    shift = k * v * b.mT @ torch.linalg.solve(torch.eye(3, dtype=F64) + v * b @ b.mT, y)
    guided = dist.Normal(shift[None], kernel.base_dist.scale).to_event(1)
    proposal = told(guided, readings, torch.tensor(k, dtype=F64))
    x = torch.randn(50, 4, dtype=F64)
    # x_0 given x_s, and the twist there.
    gain = k * v / (k**2 * v + bridge)
    system = torch.eye(3, dtype=F64) + (v - gain * k * v) * b @ b.mT
    twist = dist.MultivariateNormal(gain * x @ b.mT, system).log_prob(y)
    weights = kernel.log_prob(x) + twist - proposal.log_prob(x)
    before = dist.MultivariateNormal(
        torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64) + v * b @ b.mT
    )
    close(weights, before.log_prob(y).expand(50))


def test_the_last_kernel_is_the_data_given_their_likelihood():
    b, y, readings, kernel = normal_world(1.0, 0.6, 0.0)
    proposal = told_at_last(kernel, readings)
    x = torch.randn(50, 4, dtype=F64)
    likelihood = dist.Normal(x @ b.mT, 1.0).to_event(1).log_prob(y)
    evidence = dist.MultivariateNormal(
        torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64) + 0.6 * b @ b.mT
    )
    weights = kernel.log_prob(x) + likelihood - proposal.log_prob(x)
    close(weights, evidence.log_prob(y).expand(50))


def test_a_covariance_that_claims_too_much_leaves_the_readings_their_noise():
    _, _, readings, kernel = normal_world(0.8, 0.6, 0.2)
    # A gap that is no covariance at all: the precision stays positive, and below that of exact readings.
    broken = readings._replace(gap=-readings.gap)
    proposal = told(kernel, broken, torch.tensor(0.8, dtype=F64))
    assert proposal.factor.isfinite().all()
    assert (proposal.variance > 0).all() and (proposal.variance < kernel.variance).all()


@pytest.mark.parametrize("sd", [1e-3, 1e-5])
def test_sharp_readings_that_say_the_same_in_single_precision(sd):
    # Of I + F^T F single precision keeps nothing but the readings, which are singular.
    b = torch.tensor([[1.0, 0.5, 0.0]] * 2)[None] / sd
    kernel = dist.Normal(torch.zeros(1, 3), torch.ones(3)).to_event(1)
    proposal = told_at_last(kernel, Readings.of(torch.ones(1, 2), b, b))
    exact = ConditionedNormal(proposal.loc.double(), torch.ones(3, dtype=F64), proposal.factor, 1)
    x = proposal.rsample((4000,))
    # Of 4000 squares of normal numbers, 5 standard errors: a false alarm in 1e-6 of seeds.
    along = (x.double() - exact.loc) @ proposal.factor[0].double()
    assert float(along.square().sum(-1).mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / 4000))
    close(proposal.log_prob(x).double(), exact.log_prob(x.double()), atol=1e-4, rtol=0)
    assert (proposal.variance > 0).all()
    close(proposal.variance.double(), exact.variance, rtol=1e-5, atol=0)


def test_readings_that_are_not_finite_say_nothing_and_leave_others_alone():
    _, _, readings, kernel = normal_world(0.8, 0.6, 0.2)
    pair = Readings(*(torch.cat([v.new_full(v.shape, math.nan), v]) for v in readings))
    both, k = kernel.expand((2,)), torch.tensor(0.8, dtype=F64)
    assert (told(both, pair, k).factor[0] == 0).all()
    close(told(both, pair, k).factor[1], told(kernel, readings, k).factor[0])
    last = told_at_last(both, pair)
    assert (last.factor[0] == 0).all()
    close(last.log_prob(both.mean)[1:], told_at_last(kernel, readings).log_prob(kernel.mean))


def evidence_of(sd: float, y: Tensor, a: Tensor, variance: float) -> float:
    total = variance * a @ a.mT + sd**2 * torch.eye(len(a), dtype=F64)
    return float(dist.MultivariateNormal(torch.zeros(len(a), dtype=F64), total).log_prob(y))


@pytest.mark.parametrize("end", [10.0, 3.0], ids=["fine end", "coarse end"])
def test_thirty_two_sharp_readings_of_sixty_four_normals(end):
    # One isotropic normal: chain and twists are exact, and only x_T is not drawn from its posterior.
    n, m, sd, variance = 64, 32, 0.05, 0.7
    a, x = torch.randn(m, n, dtype=F64) / 8, variance**0.5 * torch.randn(n, dtype=F64)
    y = a @ x + sd * torch.randn(m, dtype=F64)
    process = GaussianProcess(LogLinear(end, -10))
    denoiser = MixtureDenoiser(
        process, torch.ones(1, dtype=F64), torch.zeros(1, n, dtype=F64), variance
    )
    law = Diffusion(denoiser, (n,), times=uniform(24, F64))

    def model():
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x @ a.mT, sd).to_event(1), obs=y)

    run = TwistedSMC(law, ProgramLikelihood(model), num_particles=16).run()
    assert run.ess.min() > 15 and run.ancestors[-1] == 16
    # Means alone shifted, it would be off by tens of nats.
    assert run.log_evidence.value == pytest.approx(evidence_of(sd, y, a, variance), abs=0.1)
