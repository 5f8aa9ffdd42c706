"""Every datum meets its own row of the context, in every function that takes both; any other is refused.

The data of a row are normal about that row's shift, and the shifts lie far apart: one wrong row costs
thousands of nats.
"""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_diffusion import evaluate
from pyro_diffusion.denoisers import analytic_variance, residual_variance
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.infer import DDPM
from pyro_diffusion.schedules import uniform
from tests.exact import Shifted

F64 = torch.float64
TIMES = uniform(4, F64)


def chain(**options):
    return Diffusion(Shifted(), (2,), times=TIMES, **options)


VIEWS = {
    "log_likelihood": (
        lambda law, data, **options: evaluate.log_likelihood(law, data, num_samples=8, **options),
        chain,
    ),
    "log_likelihood of an SDE": (
        lambda law, data, **options: evaluate.log_likelihood(law, data, num_terms=400, **options),
        lambda **options: DiffusionSDE(Shifted(), (2,), **options),
    ),
    "importance_weighted": (
        lambda law, data, **options: evaluate.importance_weighted(
            law, data, num_samples=4, **options
        ),
        chain,
    ),
    "flow_log_likelihood": (
        evaluate.flow_log_likelihood,
        lambda **options: ProbabilityFlow(Shifted(), (2,), **options),
    ),
    "log_weights": (
        lambda law, data, **options: evaluate.log_weights(law, data, num_samples=4, **options),
        chain,
    ),
}

AVERAGES = {
    "analytic_variance": lambda x, **options: analytic_variance(Shifted(), x, knots=5, **options),
    "residual_variance": lambda x, **options: residual_variance(Shifted(), x, knots=5, **options),
    "chain_costs": lambda x, context, **_: evaluate.chain_costs(
        Shifted(), x, TIMES, context=context
    ),
    "continuity_residual": lambda x, **options: evaluate.continuity_residual(
        Shifted(), x, levels=4, num_functions=8, **options
    ),
}


def rows(n=9):
    shift = torch.linspace(-30, 30, n, dtype=F64).unsqueeze(-1).expand(n, 2).clone()
    truth = dist.Normal(shift, math.sqrt(Shifted.variance)).to_event(1)
    return truth.sample(), shift, truth


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_likelihoods_are_those_of_the_own_row(name, batch_size):
    score, view = VIEWS[name]
    data, shift, truth = rows()
    result = score(view(), data, context={"c": shift}, batch_size=batch_size)
    value = result.mean(0) if name == "log_weights" else result.value
    # Every reverse kernel is exact. What is left is noise, of a bound whose terms are drawn one by one (its
    # standard deviation is at most 1.1 nats: of nine values one is beyond 5 in 5e-5 of seeds), and the
    # prior's distance at log-SNR -14: its mean is off by 30 alpha = .03 a coordinate. Another row's shift
    # costs 100 nats and more.
    tolerance = 5.0 if name.startswith("log_likelihood") else 0.2
    assert value.shape == (9,)
    torch.testing.assert_close(value, truth.log_prob(data), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["analytic_variance", "residual_variance", "chain_costs"])
def test_averages_are_those_of_the_own_row(name):
    """Shifting data and context alike moves nothing that these see."""
    data, shift, _ = rows()
    far, near = (
        (torch.manual_seed(0), AVERAGES[name](x, context={"c": c}, batch_size=4))[1]
        for x, c in ((data, shift), (data - shift, torch.zeros_like(shift)))
    )
    if name == "chain_costs":
        torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-6)
    else:
        # The cap by the data's own variance is looser for data that lie far apart.
        torch.testing.assert_close(far.standard_error, near.standard_error, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(far.value[2:], near.value[2:], rtol=1e-5, atol=1e-9)


def test_residuals_of_an_exact_denoiser_are_noise():
    """32 z-scores within 4.5: by chance outside once in 4,600 seeds."""
    data, shift, _ = rows(2000)
    result = AVERAGES["continuity_residual"](data, context={"c": shift}, batch_size=300)
    assert bool((result.z.abs() < 4.5).all())


BAD = {
    "a dimension more": lambda c: c[:, None],
    "one row": lambda c: c[:1],
    "no rows": lambda c: c[0],
    "a row more": lambda c: torch.cat([c, c[:1]]),
    "a row less": lambda c: c[:-1],
    "a number": lambda c: c[0, 0],
    "a list": lambda c: c.tolist(),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", [*VIEWS, *AVERAGES])
def test_any_other_context_is_refused(name, bad):
    data, shift, _ = rows(4)
    context = {"c": BAD[bad](shift)}
    with pytest.raises(ValueError, match=r"^context: got 'c'"):
        if name in VIEWS:
            score, view = VIEWS[name]
            score(view(), data, context=context)
        else:
            AVERAGES[name](data, context=context, batch_size=2)


class Numbers(Shifted):
    """Its context is one number per datum, without a dimension of its own."""

    def context_event_dim(self, name, value):
        return 0

    def forward(self, xt, t, c):
        return super().forward(xt, t, c.unsqueeze(-1))


def test_a_column_of_numbers_is_no_row_per_datum():
    """It used to score every datum under every number: (4, 4) values, or 16 of a flow that carries it."""
    c = torch.tensor([-2.0, 0.0, 1.0, 3.0], dtype=F64)
    truth = dist.Normal(c.unsqueeze(-1).expand(4, 2), math.sqrt(Shifted.variance)).to_event(1)
    data = truth.sample()
    flow = ProbabilityFlow(Numbers(), (2,))
    right = evaluate.flow_log_likelihood(flow, data, context={"c": c})
    torch.testing.assert_close(right.value, truth.log_prob(data), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match=r"^context: got 'c' of shape \(4, 1\), expected \(4,\)"):
        evaluate.flow_log_likelihood(flow, data, context={"c": c[:, None]})
    carries = ProbabilityFlow(Numbers(), (2,), context={"c": c})
    with pytest.raises(ValueError, match=r"^flow: got a ProbabilityFlow of batch shape \(4,\)"):
        evaluate.flow_log_likelihood(carries, data, batch_size=1)


@pytest.mark.parametrize("bad", BAD)
def test_the_ready_model_takes_rows(bad):
    data, shift, _ = rows(4)
    ddpm = DDPM(Shifted(), (2,), times=TIMES)
    trace = poutine.trace(ddpm.model).get_trace(data, c=shift, subsample_size=2)
    assert trace.nodes["x"]["value"].shape == (2, 2)
    with pytest.raises(ValueError, match=r"^context: got 'c'"):
        ddpm.model(data, c=BAD[bad](shift))


@pytest.mark.parametrize("name", VIEWS)
def test_a_model_with_a_batch_shape_is_refused(name):
    score, view = VIEWS[name]
    data, shift, _ = rows(4)
    plain = view()
    for law in (view(context={"c": shift}), plain.expand((4,)), plain.expand((4,)).to_event(1)):
        rows_of = data if law.event_shape == (2,) else data.expand(3, 4, 2)
        with pytest.raises(ValueError, match=r"of batch shape \(4,\).*`context=`"):
            score(law, rows_of, batch_size=1)


@pytest.mark.parametrize("name", VIEWS)
def test_one_context_for_all_belongs_in_the_model(name):
    score, view = VIEWS[name]
    data, shift, truth = rows(1)
    result = score(view(context={"c": shift[0]}), data.expand(4, 2))
    value = result.mean(0) if name == "log_weights" else result.value
    torch.testing.assert_close(
        value,
        truth.log_prob(data).expand(4),
        atol=5.0 if name.startswith("log_likelihood") else 0.2,
        rtol=0,
    )


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("shape", [(2,), (3, 4, 2), (4, 3)])
def test_data_are_rows(name, shape):
    score, view = VIEWS[name]
    with pytest.raises(ValueError, match=r"^data: got"):
        score(view(context={"c": torch.zeros(2, dtype=F64)}), torch.zeros(shape, dtype=F64))


def test_the_other_view_is_refused():
    data = torch.zeros(4, 2, dtype=F64)
    flow, sde = ProbabilityFlow(Shifted(), (2,)), DiffusionSDE(Shifted(), (2,))
    for score, law in (
        (evaluate.log_likelihood, flow),
        (evaluate.flow_log_likelihood, chain()),
        (evaluate.log_weights, sde),
        (evaluate.importance_weighted, dist.Normal(torch.zeros(2), 1.0).to_event(1)),
        (evaluate.log_likelihood, None),
    ):
        with pytest.raises(ValueError, match=r"^(diffusion|flow): got .*, expected"):
            score(law, data)


class Wide(Shifted):
    """Its mean has a dimension too many for its data, and would broadcast."""

    def forward(self, xt, t, c=0.0):
        return dist.Normal(xt.new_zeros(len(xt), 5), 1.0).to_event(1)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: analytic_variance(Wide(), x, knots=5),
        lambda x: evaluate.chain_costs(Wide(), x, TIMES),
        lambda x: evaluate.continuity_residual(Wide(), x, levels=2),
        lambda x: evaluate.wasserstein_bound(Wide(), x, lipschitz=lambda level: level.alpha),
    ],
)
def test_a_mean_of_another_shape_is_refused(call):
    with pytest.raises(ValueError, match=r"denoiser: got a posterior mean of shape \(4, 5\)"):
        call(torch.randn(4, 1, dtype=F64))
