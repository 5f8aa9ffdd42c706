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
from tests.laws import LAWS, Law, conditional

laws = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
BATCHES = [(), (1,), (2, 3)]


@laws
def test_support_has_the_event_dimension_and_holds_the_samples(law: Law):
    diffusion = law()
    assert diffusion.support.event_dim == diffusion.event_dim == len(law.event_shape)
    assert not diffusion.has_rsample
    assert diffusion.support.check(diffusion.sample((5,))).shape == (5,)
    assert diffusion.support.check(diffusion.sample((5,))).all()
    wrong = torch.full(law.event_shape, torch.nan if law.levels is None else law.levels)
    assert not diffusion.support.check(wrong)


@laws
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("sample_shape", [(), (4,)])
def test_shapes(law: Law, batch, sample_shape):
    diffusion = law().expand(batch)
    assert diffusion.batch_shape == batch and diffusion.event_shape == law.event_shape
    assert diffusion.shape(sample_shape) == sample_shape + batch + law.event_shape
    value = diffusion.sample(sample_shape)
    assert value.shape == sample_shape + batch + law.event_shape
    assert not value.requires_grad
    assert value.is_floating_point() == (law.levels is None)
    assert diffusion.log_prob(value).shape == sample_shape + batch
    assert diffusion.log_prob(value).isfinite().all()
    # One datum broadcasts against the distribution's batch, and a batch against its absence.
    assert diffusion.log_prob(law.data()).shape == batch
    assert law().log_prob(law.data(batch)).shape == batch


@laws
def test_expand_twice(law: Law):
    diffusion = law()
    once = diffusion.expand((3,))
    twice = once.expand(torch.Size((2, 3)))
    assert (diffusion.batch_shape, once.batch_shape, twice.batch_shape) == ((), (3,), (2, 3))
    assert isinstance(twice, Diffusion) and twice.denoiser is diffusion.denoiser
    value = law.data((2, 3))
    # An expansion is the same instance in another shape: same randomness, same scores.
    torch.testing.assert_close(twice.log_prob(value), diffusion.log_prob(value), rtol=0, atol=0)
    torch.testing.assert_close(twice.log_prob(value), once.log_prob(value), rtol=0, atol=0)
    with pytest.raises(RuntimeError):
        law(context={"label": torch.tensor([0, 1, 2])}).expand((2,))


@laws
def test_plates(law: Law):
    denoiser = law.denoiser()

    def model(x=None):
        outer = pyro.plate("outer", 2, dim=-2)
        with outer, pyro.plate("inner", 3, dim=-1):
            return pyro.sample("x", law(denoiser), obs=x)

    for x in (None, law.data((2, 3))):
        trace = poutine.trace(model).get_trace(x)
        trace.compute_log_prob()
        site = trace.nodes["x"]
        assert site["value"].shape == (2, 3, *law.event_shape)
        assert site["fn"].batch_shape == (2, 3)
        assert site["log_prob"].shape == (2, 3)

    def flat(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", law(denoiser), obs=x)

    trace = poutine.trace(flat).get_trace(law.data((7,)))
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (7,)


@laws
def test_mask(law: Law):
    diffusion, value = law(), law.data((2, 3))
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


@laws
def test_to_event(law: Law):
    diffusion, value = law().expand((2, 3)), law.data((4, 2, 3))
    grouped = diffusion.to_event(1)
    assert grouped.batch_shape == (2,) and grouped.event_shape == (3, *law.event_shape)
    torch.testing.assert_close(grouped.log_prob(value), diffusion.log_prob(value).sum(-1))
    assert grouped.expand((5, 2)).sample().shape == (5, 2, 3, *law.event_shape)
    assert grouped.support.event_dim == 1 + len(law.event_shape)


@laws
def test_pickle_and_deepcopy(law: Law):
    value = law.data((2,))
    for objective in (Bound(), Simple(), Hybrid()) if law.name == "normal" else (Bound(),):
        diffusion = law(objective=objective).expand((2,))
        expected = diffusion.log_prob(value)
        diffusion.sample()
        for copied in (pickle.loads(pickle.dumps(diffusion)), copy.deepcopy(diffusion)):
            assert copied.batch_shape == (2,)
            torch.testing.assert_close(copied.log_prob(value), expected, rtol=0, atol=0)
            assert copied.expand((3, 2)).sample().shape == (3, 2, *law.event_shape)


@laws
def test_float64(law: Law):
    context = {k: v.double() if v.is_floating_point() else v for k, v in law.context.items()}
    diffusion = law(law.denoiser().double(), context=context)
    value = law.data((6,), dtype=torch.float64)
    assert diffusion.log_prob(value).dtype == torch.float64
    assert diffusion.sample().dtype == (torch.float64 if law.levels is None else torch.int64)
    # The module decides: data that arrive in another dtype are converted.
    assert diffusion.log_prob(value.to(torch.float32)).dtype == torch.float64
    single = law(times=torch.linspace(0, 1, 5, dtype=torch.float64))
    assert single.log_prob(value).isfinite().all()
    assert single.sample().dtype == (torch.float32 if law.levels is None else torch.int64)


@laws
def test_an_instance_scores_alike_and_another_afresh(law: Law):
    denoiser, value = law.denoiser(), law.data((32,))
    first, second = law(denoiser), law(denoiser)
    assert first.log_prob(value).equal(first.log_prob(value))
    assert not first.log_prob(value).equal(second.log_prob(value))
    assert not first.condition().log_prob(value).equal(first.log_prob(value))


@laws
def test_the_seed_fixes_a_run(law: Law):
    denoiser, value = law.denoiser(), law.data((8,))

    def run():
        pyro.set_rng_seed(3)
        diffusion = law(denoiser)
        return diffusion.log_prob(value), diffusion.sample((2,))

    for first, second in zip(run(), run(), strict=True):
        assert first.equal(second)


@laws
def test_scoring_leaves_the_global_generator_alone(law: Law):
    diffusion, value = law(), law.data((8,))
    before = torch.get_rng_state()
    diffusion.log_prob(value)
    diffusion.expand((8,)).log_prob(value)
    assert torch.get_rng_state().equal(before)
    law()
    assert not torch.get_rng_state().equal(before)


@laws
def test_vectorized_particles(law: Law):
    denoiser, value = law.denoiser(), law.data((7,))

    def model(x):
        with pyro.plate("data", 7):
            pyro.sample("x", law(denoiser), obs=x)

    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    trace, _ = next(elbo._get_traces(model, lambda x: None, (value,), {}))
    site = trace.nodes["x"]["log_prob"]
    assert site.shape == (5, 7)
    # Every particle has its own times and noise.
    assert not (site == site[0]).all()
    assert isinstance(elbo.loss(model, lambda x: None, value), float)


@laws
def test_rows_do_not_see_each_other(law: Law):
    diffusion, value = law(), law.data((16,))
    other = value.clone()
    other[1:] = law.data((15,))
    a, b = diffusion.log_prob(value), diffusion.log_prob(other)
    torch.testing.assert_close(a[0], b[0])
    assert not torch.allclose(a[1:], b[1:])


def test_samples_are_independent_across_plates_and_ancestral_steps():
    law = LAWS[0]
    value = law().expand((2, 3)).sample((4,))
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
    law = LAWS[0]()
    assert law.replace(steps=9).steps == 9
    assert law.replace(times=torch.tensor([0.0, 0.5, 1.0])).steps == 2
    assert law.replace(objective=Simple()).objective.is_bound is False
    assert law.steps == 4 and law.objective.is_bound


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
    for law in LAWS:
        if law.name in ("normal", "vector", "levels") or (
            objective != "hybrid" and law.name in ("point", "image")
        ):
            diffusion = law(objective=OBJECTIVES[objective])
            value = law.data(batch)
            assert diffusion.log_prob(value).shape == batch
            for j in range(diffusion.steps + 2):
                assert diffusion.bound_terms(value, j).shape == batch


def test_terms_by_datum_and_by_number():
    law = LAWS[0]
    diffusion, value = law(), law.data((5,))
    pyro.set_rng_seed(0)
    one = diffusion.bound_terms(value, torch.tensor([0, 1, 2, 3, 4]))
    for j in range(5):
        pyro.set_rng_seed(0)
        torch.testing.assert_close(diffusion.bound_terms(value, j)[j], one[j])


def test_gradients_reach_the_data():
    law = LAWS[0]
    value = law.data((64,)).requires_grad_()
    law().log_prob(value).sum().backward()
    assert value.grad.isfinite().all() and (value.grad != 0).all()


def test_a_positive_variable_through_pyros_own_transforms():
    law = LAWS[0]()
    positive = dist.TransformedDistribution(law, [dist.transforms.ExpTransform()])
    value = positive.expand((4,)).sample()
    assert (value > 0).all() and value.shape == (4, 3)
    torch.testing.assert_close(
        positive.log_prob(value), law.log_prob(value.log()) - value.log().sum(-1)
    )
