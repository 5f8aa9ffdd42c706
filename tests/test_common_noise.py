"""One datum under several contexts, as of an enumerated latent: one level and one noise for all of them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_diffusion.denoisers import CategoricalDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE
from pyro_diffusion.processes import Absorbing
from pyro_diffusion.schedules import Rectified
from tests.small_diffusions import Tiny, conditional


def views():
    symbols = CategoricalDenoiser(Tiny((3,), 5, context=True), Absorbing(Rectified.full(), 5))
    real, integers = torch.randn(6, 3), torch.randint(5, (6, 3))
    return [
        pytest.param(lambda c: Diffusion(conditional_(), (3,), 8, context=c), real, id="chain"),
        pytest.param(lambda c: DiffusionSDE(conditional_(), (3,), context=c), real, id="sde"),
        pytest.param(lambda c: Diffusion(symbols, (3,), 8, context=c), integers, id="symbols"),
    ]


def conditional_():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return conditional()


@pytest.mark.parametrize("law, x", views())
def test_each_class_scores_as_it_would_alone(law, x):
    classes = law({"label": torch.arange(3)[:, None]}).expand((3, len(x)))
    together = classes.log_prob(x)
    assert together.shape == (3, len(x))
    for k in range(3):
        alone = law({"label": torch.tensor(k)}).expand((len(x),))
        alone._seed = classes._seed
        torch.testing.assert_close(together[k], alone.log_prob(x))


def test_equal_contexts_score_equally_and_nothing_else_is_shared():
    x = torch.randn(6, 3)
    same = torch.zeros(2, 1, dtype=torch.long)
    law = Diffusion(conditional_(), (3,), 8, context={"label": same}).expand((2, 6))
    assert torch.equal(*law.log_prob(x))
    # Particles of one context, rows of their own data, and contexts row by row draw for themselves.
    particles = Diffusion(conditional_(), (3,), 8, context={"label": same[:1]}).expand((2, 6))
    rows = Diffusion(conditional_(), (3,), 8, context={"label": same.expand(2, 6)[0]})
    for log_prob in (particles.log_prob(x), law.log_prob(x.expand(2, 6, 3))):
        assert not torch.isclose(log_prob[0], log_prob[1]).any()
    assert len(rows.log_prob(x[:1].expand(6, 3)).unique()) == 6


def test_the_gap_of_two_classes_is_read_far_more_precisely():
    # Two labels that the network tells apart a little: the noise in their gap must be far below that of a
    # score. Independent draws give a ratio of sqrt(2); the fresh network's classes differ by a few percent.
    x = torch.randn(256, 3)
    label = torch.arange(2)[:, None]
    law = Diffusion(conditional_(), (3,), 100, context={"label": label}).expand((2, 256))
    scores = law.log_prob(x)
    assert (scores[0] - scores[1]).std() < 0.5 * scores[0].std()


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_enumerated_in_the_guide_the_loss_is_the_weighted_sum_of_the_classes(temperature):
    x, logits = torch.randn(6, 3), torch.randn(6, 3)
    denoiser, kept = conditional_(), []

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)))
            kept.append(Diffusion(denoiser, (3,), 8, context={"label": k}))
            pyro.sample("x", kept[-1], obs=x)

    @config_enumerate
    def guide(x):
        # A scale at the guide's site weighs its entropy alone, as examples/unsupervised_classes.py does.
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=temperature):
            pyro.sample("k", dist.Categorical(logits=logits))

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
    log_q = logits.log_softmax(-1)
    scores = kept[-1].expand((3, 6)).log_prob(x).T
    assert kept[-1].batch_shape == (3, 1)
    expected = (
        log_q.exp() * (temperature * log_q - torch.tensor(1 / 3).log() - scores.detach())
    ).sum()
    assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("inside", [(), (6,)], ids=["shared", "per datum"])
def test_particles_that_drew_their_own_contexts_draw_their_own_noise(inside):
    """Their average must become precise, whether each drew one context or one for every datum."""
    x, denoiser = torch.randn(6, 3), conditional_()

    def score(particles):
        with pyro.plate("particles", particles, dim=-2), pyro.plate("data", 6, dim=-1):
            label = torch.ones(particles, *(inside or (1,)), dtype=torch.long)
            law = Diffusion(denoiser, (3,), 8, context={"label": label})
            return law.expand((particles, 6)).log_prob(x)

    scores = score(4)
    assert not torch.isclose(scores[1:], scores[0]).any()
    few, many = (torch.stack([score(n).mean() for _ in range(40)]).std() for n in (2, 200))
    # A hundred times the particles: at least a tenth; the ratio of two standard deviations of 40 draws varies
    # by 16 %, so that twice a tenth is a false alarm in 2e-5 of seeds.
    assert many < 0.2 * few
