"""Noise keyed by row: what a row gets does not depend on the rows beside it.

Statistical checks are z-scores with the limit 4.5 (a false alarm in 10^5) unless a test says otherwise.
"""

import functools
import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_diffusion import evaluate
from pyro_diffusion.denoisers import analytic_variance
from pyro_diffusion.denoisers.discrete import Quantized
from pyro_diffusion.distributions import DiffusionSDE, ProbabilityFlow
from pyro_diffusion.distributions.discretized import DiscretizedNormal
from pyro_diffusion.dynamics import Hutchinson, HutchPlusPlus, ODESolver
from pyro_diffusion.dynamics.trace_estimators import gaussian
from pyro_diffusion.processes import SeededNoise, draw, drawing_from
from pyro_diffusion.processes.noise import GAMMA
from pyro_diffusion.processes.row_noise import RowNoise, _mix, inverted
from pyro_diffusion.schedules import LogLinear
from tests.exact import mixture, mixture_law
from tests.small_diffusions import SMALL_DIFFUSIONS
from tests.test_noise import guided

F64 = torch.float64


def test_the_words_are_those_of_splitmix64():
    # The first two outputs of the published generator with the seed 1234567.
    words = _mix(1234567 + torch.tensor([1, 2]) * GAMMA)
    assert [int(w) % 2**64 for w in words] == [6457827717110365317, 3203168211198807973]


def test_normal_and_uniform_numbers_are_what_they_say():
    noise, like = RowNoise(3, torch.arange(1000)), torch.zeros((), dtype=F64)
    z = noise.normal((1000, 1000), like, event_dim=1)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(z.pow(power).mean()) - moment) < 4.5 * math.sqrt(spread / 1e6)
    # Correlations of 2 x 1225 pairs of rows and of places: the largest stays below 5 (one alarm in 10^3).
    for table in (z[:50], z[:, :50].T):
        pairs = torch.corrcoef(table).triu(1) * math.sqrt(1000)
        assert pairs.abs().max() < 5
    for dtype in (torch.float32, F64):
        u = noise.uniform((1000, 1000), torch.zeros((), dtype=dtype), event_dim=1)
        assert u.min() > 0 and u.max() < 1
        counts = torch.histc(u, 100, 0, 1)
        # Chi-square with 99 degrees of freedom has standard deviation 14.1.
        assert abs(float(((counts - 1e4) ** 2 / 1e4).sum()) - 99) < 4.5 * 14.1
    other = RowNoise(4, torch.arange(1000)).normal((1000, 1000), like, event_dim=1)
    assert abs(float((z * other).mean())) < 4.5e-3


def families(rows: Tensor) -> dict[str, dist.TorchDistribution]:
    """Laws of three coordinates, each row another."""
    logits = torch.linspace(-1, 1, 12, dtype=F64).reshape(3, 4) * (1 + rows)[:, None, None]
    loc = rows.to(F64)[:, None].expand(-1, 3)
    return {
        "normal": dist.Normal(loc, 0.5).to_event(1),
        "delta": dist.Delta(loc, event_dim=1),
        "symbols": dist.Categorical(logits=logits).to_event(1),
        "quantized": Quantized(logits, torch.linspace(-1, 1, 4, dtype=F64)).to_event(1),
        "integers": DiscretizedNormal(loc, torch.tensor(1.5, dtype=F64), 9).to_event(1),
        "laplace": dist.Laplace(loc, 0.5).to_event(1),
        "log normal": dist.LogNormal(loc, 0.5).to_event(1),
    }


@pytest.mark.parametrize("name", families(torch.arange(2)))
@pytest.mark.parametrize("sample_shape", [(), (2, 5)])
def test_a_row_draws_alike_in_every_batch(name, sample_shape):
    index = torch.arange(7)

    def drawn(rows: Tensor) -> Tensor:
        law = families(rows)[name]
        with drawing_from(RowNoise(11, rows)):
            draw(law)
            return draw(law, sample_shape)

    whole = drawn(index)
    assert whole.shape == (*sample_shape, 7, 3)
    for size in (1, 3):
        parts = torch.cat([drawn(rows) for rows in index.split(size)], -2)
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["symbols", "quantized", "integers", "laplace"])
def test_laws_drawn_by_inversion(name):
    """Frequencies of 40,000 draws against the law's own distribution."""
    law = families(torch.full((40_000,), 2))[name]
    with drawing_from(RowNoise(0, torch.arange(40_000))):
        x = draw(law)
    assert x.dtype == law.sample().dtype
    base = law.base_dist
    if name == "laplace":
        torch.testing.assert_close(x.mean(0), torch.full((3,), 2.0, dtype=F64), rtol=0, atol=0.02)
        torch.testing.assert_close(x.std(0), base.stddev[0], rtol=0.03, atol=0)
        return
    values = base.values if name == "quantized" else torch.arange(9 if name == "integers" else 4)
    for value in values:
        share = base.log_prob(value.expand(x.shape))[0].exp()
        error = ((x == value).to(F64).mean(0) - share) / (share * (1 - share) / 40_000).sqrt()
        assert bool((error.abs() < 4.5).all())


def test_a_symbol_without_probability_is_never_drawn():
    probs = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0])
    for place in (0.0, 0.3, 1 - 2**-24):
        assert int(inverted(probs, torch.tensor(place))) in (1, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_neither_reaches_the_ends_nor_moves_the_law(dtype):
    n = 100_000
    noise = RowNoise(1, torch.arange(n))
    u = noise.uniform((n,), torch.zeros((), dtype=dtype))
    assert u.dtype == dtype and u.min() > 0 and u.max() < 1
    probs = torch.tensor([0.3, 0.5, 0.2, 0.0], dtype=dtype).expand(n, 4)
    rate = torch.ones(n, dtype=dtype)
    with drawing_from(noise):
        symbols = draw(dist.Categorical(probs, validate_args=False))
        x = draw(dist.Exponential(rate))
    shares = probs[0].to(F64) / probs[0].to(F64).sum()
    counts = symbols.bincount(minlength=4)
    assert ((counts - n * shares).abs() <= 4.5 * (n * shares).sqrt()).all()
    assert x.dtype == dtype and x.isfinite().all()
    # A rate of one; beyond 6, where a coarse number has nothing, lie 248 of them.
    assert abs(float(x.to(F64).mean()) - 1) < 4.5 / n**0.5
    assert abs(int((x > 6).sum()) - n * math.exp(-6)) < 4.5 * (n * math.exp(-6)) ** 0.5


def test_other_laws_are_right_though_not_row_by_row():
    law = dist.StudentT(torch.full((2000, 3), 50.0, dtype=F64)).to_event(1)
    with drawing_from(RowNoise(0, torch.arange(2000))):
        first, second = draw(law), draw(law)
    assert not first.equal(second)
    assert abs(float(first.mean())) < 4.5 * math.sqrt(50 / 48 / 6000)
    with drawing_from(RowNoise(0, torch.arange(2000, 4000))):
        assert not draw(law).equal(first)


# --- evaluation -----------------------------------------------------------------------------------------


def double(name: str):
    small = next(small for small in SMALL_DIFFUSIONS if small.name == name)
    return small(small.denoiser().double(), steps=3), small.data((7,), dtype=F64)


def chunked() -> dict:
    """Functions of (batch_size, seed)."""
    out = {}
    for name in ("normal", "image", "levels", "absorbing"):
        law, data = double(name)
        out |= {
            f"bound {name}": lambda law=law, data=data, **o: evaluate.log_likelihood(
                law, data, **o
            ),
            f"weights {name}": lambda law=law, data=data, **o: evaluate.log_weights(
                law, data, num_samples=2, **o
            ),
        }
    law, data = double("normal")
    symbols, words = double("absorbing")
    sde = DiffusionSDE(law.denoiser, (3,))

    def flow(trace=None):
        view = ProbabilityFlow(law.denoiser, (3,), trace=trace, solver=ODESolver("rk4", steps=3))
        return lambda **o: evaluate.flow_log_likelihood(view, data, **o)

    out |= {
        "some terms": lambda **o: evaluate.log_likelihood(law, data, num_terms=3, **o),
        "importance": lambda **o: evaluate.importance_weighted(law, data, num_samples=6, **o),
        "guided": lambda **o: evaluate.log_likelihood(guided(law), data, **o),
        "guided symbols": lambda **o: evaluate.log_likelihood(guided(symbols), words, **o),
        "sde": lambda **o: evaluate.log_likelihood(sde, data, num_terms=5, **o),
        "flow": flow(),
        "flow probes": flow(Hutchinson(2)),
        "flow seeded probes": flow(HutchPlusPlus(2, seed=1)),
    }
    return out


@pytest.fixture(scope="module")
def functions() -> dict:
    torch.manual_seed(0)
    return chunked()


@pytest.mark.parametrize("name", chunked())
def test_the_batch_size_changes_values_by_rounding_alone(name, functions):
    def figures(size: int, seed: int = 5) -> list[Tensor]:
        out = functions[name](batch_size=size, seed=seed)
        return [out] if isinstance(out, Tensor) else [out.value, out.standard_error]

    torch.manual_seed(1)
    whole, before = figures(7), torch.get_rng_state()
    for size in (1, 3):
        for part, all_at_once in zip(figures(size), whole, strict=True):
            torch.testing.assert_close(part, all_at_once, rtol=1e-5, atol=1e-9)
    if not name.startswith("guided"):  # whose program builds a distribution
        assert torch.get_rng_state().equal(before)
    if name not in ("flow", "flow seeded probes"):
        assert not figures(7, seed=6)[0].equal(whole[0])


@pytest.mark.parametrize(
    "estimate",
    [
        functools.partial(analytic_variance, knots=4),
        functools.partial(evaluate.continuity_residual, levels=3),
    ],
    ids=["analytic variance", "continuity residual"],
)
def test_estimates_over_data_do_not_depend_on_the_batch_size(estimate):
    data, results = mixture_law().sample((40,)), []
    for size in (40, 7, 1):
        torch.manual_seed(2)
        results.append(estimate(mixture(LogLinear(6, -6)), data, num_samples=2, batch_size=size))
    for result in results[1:]:
        torch.testing.assert_close(result.standard_error, results[0].standard_error)


@pytest.mark.parametrize("seeded", [False, True])
def test_the_reported_error_of_the_mean_is_the_true_one(seeded):
    """Equal data in many chunks: probes that repeat from chunk to chunk do not average out.

    The ratio of two standard deviations from 40 runs has standard deviation .11; the limit is 4 of it, and
    repeated probes have a ratio of 2.
    """
    x = mixture_law().sample((1,)).expand(16, 2)
    law = ProbabilityFlow(mixture(LogLinear(10, -10)), (2,), solver=ODESolver("rk4", steps=3))
    exact = law.log_prob(x[:1])
    errors, claimed = [], []
    for run in range(40):
        trace = Hutchinson(4, seed=run if seeded else None)
        result = evaluate.flow_log_likelihood(law.replace(trace=trace), x, batch_size=4)
        errors.append(float((result.value - exact).mean()))
        claimed.append(result.monte_carlo_error)
    true = torch.tensor(errors).square().mean().sqrt()
    told = torch.tensor(claimed).square().mean().sqrt()
    assert abs(float(true / told) - 1) < 0.45


@pytest.mark.parametrize("seed", [None, 3])
def test_rows_of_a_flow_have_their_own_probes(seed):
    x = mixture_law().sample((1,)).expand(5, 2)
    law = ProbabilityFlow(
        mixture(LogLinear(10, -10)),
        (2,),
        trace=Hutchinson(1, gaussian, seed=seed),
        solver=ODESolver("rk4", steps=8),
    )
    value = law.log_prob(x)
    assert len(value.unique()) == 5
    torch.testing.assert_close(law.log_prob(x[:2]), value[:2])
    torch.testing.assert_close(law.expand((5,)).log_prob(x), value)


def test_bad_input_is_named():
    rows = torch.arange(3)
    for seed in (-1, 2**63, 0.5, True, None):
        with pytest.raises(ValueError, match="seed: got"):
            SeededNoise(seed)
    for bad in (rows.double(), rows[None], [0, 1]):
        with pytest.raises(ValueError, match="rows: got"):
            RowNoise(0, bad)
    with pytest.raises(ValueError, match="noise: got int"), drawing_from(3):
        pass
    with pytest.raises(ValueError, match="distribution: got Tensor"):
        draw(torch.zeros(3))
    with pytest.raises(ValueError, match=r"noise: got 3 rows for draws of shape \(4, 2\)"):
        RowNoise(0, rows).normal((4, 2), torch.zeros(()), event_dim=1)
    law, data = double("normal")
    with pytest.raises(ValueError, match="seed: got -1"):
        evaluate.log_likelihood(law, data, seed=-1)
