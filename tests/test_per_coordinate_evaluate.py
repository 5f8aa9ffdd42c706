"""Likelihoods, their tables and plots, and checkpoints of a process whose scales differ by coordinate.

Data are independent normals, so marginals, divergences and the model's own density are known in closed form.
"""

import copy

import pytest
import torch
from per_coordinate import F64, MEAN, VARIANCE, PerCoordinate, alone, normal
from pyro.distributions import Normal

from pyro_diffusion import checkpoint, plotting
from pyro_diffusion.denoisers import Denoiser, MixtureDenoiser, VarianceDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import ExactTrace, Hutchinson, ODESolver
from pyro_diffusion.dynamics.trace_estimators import gaussian
from pyro_diffusion.evaluate import (
    chain_costs,
    compare,
    flow_log_likelihood,
    importance_weighted,
    log_likelihood,
    log_weights,
    to_arviz,
    to_elpd,
    wasserstein_bound,
)
from pyro_diffusion.schedules import LogLinear, optimal_grid, uniform
from pyro_diffusion.unwrapping import per_coordinate

PAIR = (0, 1)
close = torch.testing.assert_close


def data(count):
    return Normal(torch.tensor(MEAN, dtype=F64), VARIANCE**0.5).sample((count,))


def part(x, i):
    return x[..., i : i + 1]


# --- costs of steps ---------------------------------------------------------------------------------


class Rough(Denoiser):
    """The exact mean with a variance that differs by datum, which leaves no short cut."""

    def __init__(self, denoiser):
        super().__init__(denoiser.process)
        self.denoiser = denoiser

    def forward(self, xt, t, **context):
        exact = per_coordinate(self.denoiser(xt, t))
        return Normal(exact.mean, exact.stddev * (1 + xt.square())).to_event(1)


KINDS = {
    "a point mass": VarianceDenoiser,
    "a variance by coordinate": lambda denoiser: denoiser,
    "a variance by datum": Rough,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_costs_are_the_sum_of_the_costs_of_each_coordinate(make, monkeypatch):
    x, times, draw = data(7), uniform(5, F64), torch.randn
    noise = draw(3, 7, 2, dtype=F64)
    whole = parts = 0.0
    for i in (None, *PAIR):
        with monkeypatch.context() as patch:
            given = noise if i is None else part(noise, i)
            patch.setattr(torch, "randn", lambda *shape, given=given, **_: given)
            denoiser = make(normal() if i is None else alone(i))
            costs = chain_costs(denoiser, x if i is None else part(x, i), times, num_samples=3)
        ahead = costs[torch.ones_like(costs, dtype=torch.bool).triu(1)]
        if i is None:
            whole = ahead
        else:
            parts = parts + ahead
    close(whole, parts)


def test_costs_of_exact_normals_have_a_closed_form():
    """Over data, E m = v, so a step costs log(1 + g v) / 2 a coordinate.

    The mean of m over 20 000 data has the standard error v / 100. 15 numbers within 4.5 standard errors: a
    false alarm in 9000 runs.
    """
    process, times = PerCoordinate(), uniform(5, F64)
    snr = process.levels(times).log_snr.exp()
    variance = 1 / (1 / VARIANCE + snr)
    gain = snr.unsqueeze(1) - snr
    expected = 0.5 * torch.log1p(gain.clamp(min=0) * variance).sum(-1)
    found = chain_costs(normal(), data(20_000), times)
    ahead = torch.ones_like(found, dtype=torch.bool).triu(1)
    share = gain * variance / (1 + gain * variance)
    error = share.square().sum(-1).div(2 * 20_000).sqrt()
    assert ((found - expected).abs() < 4.5 * error)[ahead].all()
    assert len(optimal_grid(times, found, 3)) == 4


def test_a_bound_in_one_norm_asks_for_one_noise_level():
    with pytest.raises(ValueError, match="lacks one noise level for all coordinates"):
        wasserstein_bound(normal(), data(4))


# --- likelihoods ------------------------------------------------------------------------------------


def ends():
    """Levels at both ends, and the data's moments."""
    process = PerCoordinate()
    start, end = (process.level(torch.tensor(t, dtype=F64)) for t in (0.0, 1.0))
    return start, end, torch.tensor(MEAN, dtype=F64)


def prior_scale(end):
    return torch.hypot(end.alpha, end.sigma)


def elbo(x, mean=None):
    """The bound of the exact denoiser of normals of some mean: the density, less what the prior costs."""
    _, end, own = ends()
    mean = own if mean is None else mean
    q = Normal(end.alpha * x, end.sigma)
    marginal = Normal(end.alpha * mean, (end.alpha**2 * VARIANCE + end.sigma**2).sqrt())
    kl = torch.distributions.kl_divergence
    gap = kl(q, marginal) - kl(q, Normal(torch.zeros_like(mean), prior_scale(end)))
    return (Normal(mean, VARIANCE**0.5).log_prob(x) + gap).sum(-1)


def chain_density(x):
    """The density of the chain of exact kernels that starts from the prior: x_0 is linear in x_1."""
    _, end, mean = ends()
    weight = end.alpha * VARIANCE / (end.alpha**2 * VARIANCE + end.sigma**2)
    loc = mean * (1 - weight * end.alpha)
    variance = VARIANCE * (1 - weight * end.alpha) + (weight * prior_scale(end)) ** 2
    return Normal(loc, variance.sqrt()).log_prob(x).sum(-1)


def flow_density(x):
    """The density of the flow, which keeps the quantiles of every coordinate."""
    start, end, mean = ends()
    scale = (VARIANCE + start.noise_to_signal**2).sqrt()
    last = (end.alpha**2 * VARIANCE + end.sigma**2).sqrt()
    z = (end.alpha * mean + last * (x - mean) / scale) / prior_scale(end)
    slope = last / scale / prior_scale(end)
    return (Normal(0.0, 1.0).log_prob(z) + slope.log()).sum(-1)


@pytest.mark.parametrize("num_terms", [None, 8])
@pytest.mark.parametrize("continuous", [False, True], ids=["chain", "SDE"])
def test_the_bound_is_its_closed_form_within_its_errors(continuous, num_terms):
    """The mean over 4000 data within 4.5 of its error (a false alarm in 140 000 runs), which is honest."""
    x = data(4000)
    times = uniform(4, F64)
    model = DiffusionSDE(normal(), (2,)) if continuous else Diffusion(normal(), (2,), times=times)
    found = log_likelihood(model, x, num_terms=num_terms)
    gap = found.value - elbo(x)
    assert gap.mean().abs() < 4.5 * found.monte_carlo_error
    ratio = float(gap.square().mean() / found.standard_error.square().mean())
    spaced = continuous or num_terms is not None  # draws that scatter less than independent ones
    assert ratio < 1.15 and (spaced or ratio > 0.85)


def test_the_terms_of_the_bound_have_closed_forms():
    """6 means over 20 000 data within 4.5 of their errors: a false alarm in 24 000 runs."""
    x, times = data(20_000), uniform(4, F64)
    _, end, _ = ends()
    terms = log_likelihood(Diffusion(normal(), (2,), times=times), x).terms
    snr = PerCoordinate().levels(times).log_snr.exp()
    variance = 1 / (1 / VARIANCE + snr)
    steps = 0.5 * torch.log1p((snr[:-1] - snr[1:]) * variance[1:]).sum(-1)
    assert ((terms.steps - steps).abs() < 4.5 * terms.steps_standard_error).all()
    assert abs(terms.reverse - float(steps.sum())) < 4.5 * terms.reverse_standard_error
    decoder = float(0.5 * (2 * torch.pi * torch.e * variance[0]).log().sum())
    assert abs(terms.decoder - decoder) < 4.5 * terms.decoder_standard_error
    prior = Normal(torch.zeros(2, dtype=F64), prior_scale(end))
    q = Normal(end.alpha * x, end.sigma)
    close(terms.prior, float(torch.distributions.kl_divergence(q, prior).sum(-1).mean()))
    # Steps are told apart by the clock, which is one number for all coordinates.
    close(terms.log_snr, torch.tensor([5.0, 0.0, -5.0, -10.0], dtype=F64))


def test_importance_weights_average_to_the_density_of_the_chain():
    """40 values within 4.5 of their errors: a false alarm in 3700 runs. Their mean logarithm is the bound."""
    x, model = data(40), Diffusion(normal(), (2,), times=uniform(3, F64))
    found = importance_weighted(model, x, num_samples=100, seed=1)
    assert ((found.value - chain_density(x)).abs() < 4.5 * found.standard_error).all()
    assert found.evaluations == 400 and found.kind == "importance-weighted"
    logs = log_weights(model, x, num_samples=100, seed=1)
    close(found.value, logs.exp().mean(0).log())
    error = logs.std(0).square().sum().div(100).sqrt() / len(x)
    assert (logs.mean(0) - elbo(x)).mean().abs() < 4.5 * error


def test_the_flow_has_its_closed_form():
    x, solver = data(6), ODESolver("dopri8", rtol=1e-8, atol=1e-8)
    exact = flow_log_likelihood(
        ProbabilityFlow(normal(), (2,), solver=solver, trace=ExactTrace()), x
    )
    close(exact.value, flow_density(x), rtol=0, atol=1e-6)
    assert exact.kind == "exact" and not exact.standard_error.any()
    # The trace of independent coordinates is the same for all signs: normal probes err, by what they say.
    noisy = ProbabilityFlow(
        normal(), (2,), solver=ODESolver("rk4", steps=60), trace=Hutchinson(400, gaussian)
    )
    estimate = flow_log_likelihood(noisy, x)
    assert ((estimate.value - exact.value).abs() < 4.5 * estimate.standard_error + 1e-3).all()
    assert estimate.kind == "unbiased" and (estimate.standard_error > 1e-2).all()


def test_models_are_compared_and_exported():
    """The exact model and one whose second mean is wrong; the gap within 4.5 standard errors of its own."""
    x, times = data(1000), uniform(4, F64)
    shifted = torch.tensor(MEAN, dtype=F64) + torch.tensor([0.0, 1.0], dtype=F64)
    wrong = MixtureDenoiser(PerCoordinate(), torch.ones(1, dtype=F64), shifted[None], VARIANCE)
    models = {"exact": normal(), "wrong": wrong}
    found = {
        name: log_likelihood(Diffusion(each, (2,), times=times), x, seed=3)
        for name, each in models.items()
    }
    table = compare(found)
    assert list(table.index) == ["exact", "wrong"] and table.loc["exact", "weight"] > 0.9
    gap = float((elbo(x) - elbo(x, shifted)).sum())
    error = sum(float(each.standard_error.square().sum()) for each in found.values()) ** 0.5
    assert abs(table.loc["wrong", "elpd_diff"] - gap) < 4.5 * error < gap / 4
    exported = to_arviz(found["exact"])
    assert exported.log_likelihood["x"].shape == (1, 1, 1000)
    close(torch.tensor(exported.log_likelihood["x"].values[0, 0]), found["exact"].value)
    summed = to_elpd(found["exact"])
    summed = summed.elpd if hasattr(summed, "elpd") else summed.elpd_loo
    close(float(summed), float(table.loc["exact", "elpd"]))


# --- figures and files ------------------------------------------------------------------------------


def test_a_plotted_process_has_a_curve_for_each_coordinate():
    process, times = PerCoordinate(), torch.linspace(0, 1, 11, dtype=F64)
    level = process.level(times)
    scales, ratio = plotting.schedule(process, num_points=11).axes
    drawn = [torch.tensor(line.get_ydata()) for line in (*scales.lines, *ratio.lines[1:])]
    expected = torch.cat([level.alpha, level.sigma, level.log_snr], -1)
    close(torch.stack(drawn, -1), expected)
    assert len(scales.get_legend().get_texts()) == 2


def test_bounds_are_plotted_over_the_clock():
    terms = log_likelihood(Diffusion(normal(), (2,), times=uniform(4, F64)), data(50)).terms
    ax = plotting.bound_per_step(terms.log_snr, terms.steps, axis="log_snr")
    assert ax.lines[-1].get_xdata().tolist() == [-10.0, -5.0, 0.0, 5.0]


def test_a_process_is_saved_and_restored(tmp_path):
    saved, path = normal(), tmp_path / "model.safetensors"
    saved.process.rate.copy_(torch.tensor([0.9, 0.7]))
    checkpoint.save_module(path, saved)
    fresh, x, times = normal(), torch.randn(5, 2, dtype=F64), uniform(4, F64)
    before = fresh.process.levels(times).log_snr  # kept, and to be forgotten
    checkpoint.load_module(path, fresh)
    for other in (fresh, copy.deepcopy(saved)):
        close(other.process.rate, torch.tensor([0.9, 0.7], dtype=F64))
        close(other(x, 0.4).mean, saved(x, 0.4).mean, rtol=0, atol=0)
        log_snr = other.process.levels(times).log_snr
        close(log_snr, saved.process.levels(times).log_snr, rtol=0, atol=0)
        assert not torch.equal(log_snr, before)


def test_a_state_of_another_process_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save_module(path, PerCoordinate())
    with pytest.raises(checkpoint.CheckpointError, match="log_snr_max: got 10"):
        checkpoint.load_module(path, PerCoordinate(LogLinear(7.0, -10.0)))
    with pytest.raises(checkpoint.CheckpointError, match="unexpected rate"):
        checkpoint.load_module(path, alone(0).process)
