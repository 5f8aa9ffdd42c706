"""What Pyro asks of any distribution, for a Diffusion of every kind."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_diffusion.distributions import Bound, Diffusion, Hybrid, Simple, Weighted
from tests.small_diffusions import SMALL_DIFFUSIONS, SmallDiffusion, conditional

every_kind = pytest.mark.parametrize("small", SMALL_DIFFUSIONS, ids=lambda small: small.name)
BATCHES = [(), (1,), (2, 3)]


@every_kind
def test_support_has_the_event_dimension_and_holds_the_samples(small: SmallDiffusion):
    diffusion = small()
    assert diffusion.support.event_dim == diffusion.event_dim == len(small.event_shape)
    assert not diffusion.has_rsample
    assert diffusion.support.check(diffusion.sample((5,))).shape == (5,)
    assert diffusion.support.check(diffusion.sample((5,))).all()
    wrong = torch.full(small.event_shape, torch.nan if small.levels is None else small.levels)
    assert not diffusion.support.check(wrong)


@every_kind
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("sample_shape", [(), (4,)])
def test_shapes(small: SmallDiffusion, batch, sample_shape):
    diffusion = small().expand(batch)
    assert diffusion.batch_shape == batch and diffusion.event_shape == small.event_shape
    assert diffusion.shape(sample_shape) == sample_shape + batch + small.event_shape
    value = diffusion.sample(sample_shape)
    assert value.shape == sample_shape + batch + small.event_shape
    assert not value.requires_grad
    assert value.is_floating_point() == (small.levels is None)
    assert diffusion.log_prob(value).shape == sample_shape + batch
    assert diffusion.log_prob(value).isfinite().all()
    # One datum broadcasts against the distribution's batch, and a batch against its absence.
    assert diffusion.log_prob(small.data()).shape == batch
    assert small().log_prob(small.data(batch)).shape == batch


@every_kind
def test_expand_twice(small: SmallDiffusion):
    diffusion = small()
    once = diffusion.expand((3,))
    twice = once.expand(torch.Size((2, 3)))
    assert (diffusion.batch_shape, once.batch_shape, twice.batch_shape) == ((), (3,), (2, 3))
    assert isinstance(twice, Diffusion) and twice.denoiser is diffusion.denoiser
    value = small.data((2, 3))
    # An expansion is the same instance in another shape: same randomness, same scores.
    torch.testing.assert_close(twice.log_prob(value), diffusion.log_prob(value), rtol=0, atol=0)
    torch.testing.assert_close(twice.log_prob(value), once.log_prob(value), rtol=0, atol=0)
    with pytest.raises(RuntimeError):
        small(context={"label": torch.tensor([0, 1, 2])}).expand((2,))


@every_kind
def test_plates(small: SmallDiffusion):
    denoiser = small.denoiser()

    def model(x=None):
        outer = pyro.plate("outer", 2, dim=-2)
        with outer, pyro.plate("inner", 3, dim=-1):
            return pyro.sample("x", small(denoiser), obs=x)

    for x in (None, small.data((2, 3))):
        trace = poutine.trace(model).get_trace(x)
        trace.compute_log_prob()
        site = trace.nodes["x"]
        assert site["value"].shape == (2, 3, *small.event_shape)
        assert site["fn"].batch_shape == (2, 3)
        assert site["log_prob"].shape == (2, 3)

    def flat(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", small(denoiser), obs=x)

    trace = poutine.trace(flat).get_trace(small.data((7,)))
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (7,)


@every_kind
def test_mask(small: SmallDiffusion):
    diffusion, value = small(), small.data((2, 3))
    mask = torch.tensor([True, False, True])
    expected = diffusion.log_prob(value) * mask
    torch.testing.assert_close(diffusion.expand((2, 3)).mask(mask).log_prob(value), expected)

    def model():
        with pyro.plate("data", 3, dim=-1), poutine.mask(mask=mask):
            pyro.sample("x", diffusion, obs=value[0])

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    expected = diffusion.log_prob(value[0]) * mask
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected)


@every_kind
def test_to_event(small: SmallDiffusion):
    diffusion, value = small().expand((2, 3)), small.data((4, 2, 3))
    grouped = diffusion.to_event(1)
    assert grouped.batch_shape == (2,) and grouped.event_shape == (3, *small.event_shape)
    torch.testing.assert_close(grouped.log_prob(value), diffusion.log_prob(value).sum(-1))
    assert grouped.expand((5, 2)).sample().shape == (5, 2, 3, *small.event_shape)
    assert grouped.support.event_dim == 1 + len(small.event_shape)


@every_kind
def test_pickle_and_deepcopy(small: SmallDiffusion):
    value = small.data((2,))
    for objective in (Bound(), Simple(), Hybrid()) if small.name == "normal" else (Bound(),):
        diffusion = small(objective=objective).expand((2,))
        expected = diffusion.log_prob(value)
        diffusion.sample()
        for copied in (pickle.loads(pickle.dumps(diffusion)), copy.deepcopy(diffusion)):
            assert copied.batch_shape == (2,)
            torch.testing.assert_close(copied.log_prob(value), expected, rtol=0, atol=0)
            assert copied.expand((3, 2)).sample().shape == (3, 2, *small.event_shape)


@every_kind
def test_float64(small: SmallDiffusion):
    context = {k: v.double() if v.is_floating_point() else v for k, v in small.context.items()}
    diffusion = small(small.denoiser().double(), context=context)
    value = small.data((6,), dtype=torch.float64)
    assert diffusion.log_prob(value).dtype == torch.float64
    assert diffusion.sample().dtype == (torch.float64 if small.levels is None else torch.int64)
    # The module decides: data that arrive in another dtype are converted.
    assert diffusion.log_prob(value.to(torch.float32)).dtype == torch.float64
    single = small(times=torch.linspace(0, 1, 5, dtype=torch.float64))
    assert single.log_prob(value).isfinite().all()
    assert single.sample().dtype == (torch.float32 if small.levels is None else torch.int64)


@every_kind
def test_an_instance_scores_alike_and_another_afresh(small: SmallDiffusion):
    denoiser, value = small.denoiser(), small.data((32,))
    first, second = small(denoiser), small(denoiser)
    assert first.log_prob(value).equal(first.log_prob(value))
    assert not first.log_prob(value).equal(second.log_prob(value))
    assert not first.condition().log_prob(value).equal(first.log_prob(value))


@every_kind
def test_the_seed_fixes_a_run(small: SmallDiffusion):
    denoiser, value = small.denoiser(), small.data((8,))

    def run():
        pyro.set_rng_seed(3)
        diffusion = small(denoiser)
        return diffusion.log_prob(value), diffusion.sample((2,))

    for first, second in zip(run(), run(), strict=True):
        assert first.equal(second)


@every_kind
def test_scoring_leaves_the_global_generator_alone(small: SmallDiffusion):
    diffusion, value = small(), small.data((8,))
    before = torch.get_rng_state()
    diffusion.log_prob(value)
    diffusion.expand((8,)).log_prob(value)
    assert torch.get_rng_state().equal(before)
    small()
    assert not torch.get_rng_state().equal(before)


@every_kind
def test_vectorized_particles(small: SmallDiffusion):
    denoiser, value = small.denoiser(), small.data((7,))

    def model(x):
        with pyro.plate("data", 7):
            pyro.sample("x", small(denoiser), obs=x)

    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    trace, _ = next(elbo._get_traces(model, lambda x: None, (value,), {}))
    site = trace.nodes["x"]["log_prob"]
    assert site.shape == (5, 7)
    # Every particle has its own times and noise.
    assert not (site == site[0]).all()
    assert isinstance(elbo.loss(model, lambda x: None, value), float)


@every_kind
def test_rows_do_not_see_each_other(small: SmallDiffusion):
    diffusion, value = small(), small.data((16,))
    other = value.clone()
    other[1:] = small.data((15,))
    a, b = diffusion.log_prob(value), diffusion.log_prob(other)
    torch.testing.assert_close(a[0], b[0])
    assert not torch.allclose(a[1:], b[1:])


def test_samples_are_independent_across_plates_and_ancestral_steps():
    small = SMALL_DIFFUSIONS[0]
    value = small().expand((2, 3)).sample((4,))
    assert len(value.reshape(24, -1).unique(dim=0)) == 24


def test_context_broadcasts_into_the_batch():
    denoiser = conditional()
    label, y = torch.tensor([[0], [2]]), torch.randn(3, 2)

    def build(**context):
        pyro.set_rng_seed(1)
        return Diffusion(denoiser, (3,), 4, context=context)

    law = build(label=label, y=y)
    assert law.batch_shape == (2, 3) and law.expand((5, 2, 3)).batch_shape == (5, 2, 3)
    value = torch.randn(2, 3, 3)
    spelled = build(label=label.expand(2, 3), y=y.expand(2, 3, 2))
    torch.testing.assert_close(law.log_prob(value), spelled.log_prob(value))
    # Row (i, j) reads its own label and vector: change one of either.
    changed = build(label=torch.tensor([[0], [1]]), y=y).log_prob(value)
    torch.testing.assert_close(changed[0], law.log_prob(value)[0])
    assert (changed[1] != law.log_prob(value)[1]).all()
    moved = y.clone()
    moved[2] += 1
    changed = build(label=label, y=moved).log_prob(value)
    torch.testing.assert_close(changed[:, :2], law.log_prob(value)[:, :2])
    assert (changed[:, 2] != law.log_prob(value)[:, 2]).all()
    assert law.sample((4,)).shape == (4, 2, 3, 3)
    assert law.log_prob(torch.randn(4, 2, 3, 3)).shape == (4, 2, 3)


def test_absent_context_is_no_context():
    denoiser = conditional()
    law = Diffusion(denoiser, (3,), 4, context={"label": None})
    assert law.batch_shape == () and law.context == {}
    assert law.condition(label=torch.tensor([0, 1])).batch_shape == (2,)


def test_replace_changes_what_it_is_told_to():
    diffusion = SMALL_DIFFUSIONS[0]()
    assert diffusion.replace(steps=9).steps == 9
    assert diffusion.replace(times=torch.tensor([0.0, 0.5, 1.0])).steps == 2
    assert diffusion.replace(objective=Simple()).objective.is_bound is False
    assert diffusion.steps == 4 and diffusion.objective.is_bound


OBJECTIVES = {
    "bound": Bound(),
    "simple": Simple(),
    "hybrid": Hybrid(),
    "weighted": Weighted(lambda s, t, steps: torch.sigmoid(-t)),
    "mean_only": Weighted(lambda s, t, steps: torch.sigmoid(-t), mean_only=True),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (3, 3)])
def test_loss_shape_of_every_option(objective, batch):
    # The event size equals a batch size, so that a stray broadcast would go unnoticed without this.
    for small in SMALL_DIFFUSIONS:
        if small.name in ("normal", "vector", "levels") or (
            objective != "hybrid" and small.name in ("point", "image")
        ):
            diffusion = small(objective=OBJECTIVES[objective])
            value = small.data(batch)
            assert diffusion.log_prob(value).shape == batch
            for j in range(diffusion.steps + 2):
                assert diffusion.bound_terms(value, j).shape == batch


def test_terms_by_datum_and_by_number():
    small = SMALL_DIFFUSIONS[0]
    diffusion, value = small(), small.data((5,))
    pyro.set_rng_seed(0)
    one = diffusion.bound_terms(value, torch.tensor([0, 1, 2, 3, 4]))
    for j in range(5):
        pyro.set_rng_seed(0)
        torch.testing.assert_close(diffusion.bound_terms(value, j)[j], one[j])


def test_gradients_reach_the_data():
    small = SMALL_DIFFUSIONS[0]
    value = small.data((64,)).requires_grad_()
    small().log_prob(value).sum().backward()
    assert value.grad.isfinite().all() and (value.grad != 0).all()


def test_a_positive_variable_through_pyros_own_transforms():
    diffusion = SMALL_DIFFUSIONS[0]()
    positive = dist.TransformedDistribution(diffusion, [dist.transforms.ExpTransform()])
    value = positive.expand((4,)).sample()
    assert (value > 0).all() and value.shape == (4, 3)
    torch.testing.assert_close(
        positive.log_prob(value), diffusion.log_prob(value.log()) - value.log().sum(-1)
    )
