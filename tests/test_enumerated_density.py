"""Sums over discrete latents under ``vmap``, by brute force; densities that an annealing run must refuse."""

import itertools
import math
import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Bernoulli, Categorical, Gamma, Normal, Uniform
from pyro.infer.autoguide import AutoNormal

from pyro_diffusion.infer.annealing.log_einsum import einsum
from pyro_diffusion.infer.annealing.unconstrained import UnconstrainedModel

X = torch.tensor([0.3, -1.0, 2.0, 0.5])
MOVE = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
KEPT = torch.tensor([True, False, True, True])
VOTES = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])


def scored(model, hide=()):
    """The model's density, run for all draws at once."""
    pyro.clear_param_store()
    guide = AutoNormal(poutine.block(model, hide=[*hide]))
    guide()
    return UnconstrainedModel(model, guide, (), {})


def chain():
    mean, z = pyro.sample("mean", Normal(0.0, 1.0)), 0
    for t in pyro.markov(range(4)):
        z = pyro.sample(f"z{t}", Categorical(MOVE[z]))
        pyro.sample(f"x{t}", Normal(mean * z, 1.0), obs=X[t])


def log_chain(mean):
    paths = []
    for path in itertools.product((0, 1), repeat=4):
        steps = zip((0, *path), path, X, strict=False)
        paths.append(
            sum(MOVE[a, b].log() + Normal(mean[0] * b, 1.0).log_prob(x) for a, b, x in steps)
        )
    return Normal(0.0, 1.0).log_prob(mean[0]) + torch.stack(paths).logsumexp(0)


def crossed():
    """Items with a hidden class, judges with a bias: every judge sees every item."""
    judges, items = pyro.plate("judges", 2, dim=-2), pyro.plate("items", 3, dim=-1)
    with items:
        z = pyro.sample("z", Bernoulli(0.3))
    with judges:
        bias = pyro.sample("bias", Normal(0.0, 1.0))
    with judges, items:
        pyro.sample("x", Normal(z + bias, 1.0), obs=VOTES)


def log_crossed(bias):
    seen = [Normal(z + bias.unsqueeze(-1), 1.0).log_prob(VOTES).sum(0) for z in (0, 1)]
    return Normal(0.0, 1.0).log_prob(bias).sum() + _halves(*seen).sum()


def _halves(zero, one):
    return torch.stack([math.log(0.7) + zero, math.log(0.3) + one]).logsumexp(0)


def padded():
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    with pyro.plate("data", 4), poutine.mask(mask=KEPT):
        z = pyro.sample("z", Bernoulli(0.3))
        pyro.sample("x", Normal(mean + z, 1.0), obs=X)


def in_turn():
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    for i in pyro.plate("data", 4):
        z = pyro.sample(f"z{i}", Bernoulli(0.3), infer={"enumerate": "sequential"})
        pyro.sample(f"x{i}", Normal(mean + z, 1.0), obs=X[i])


def log_in_turn(mean):
    rows = _halves(*(Normal(mean + z, 1.0).log_prob(X) for z in (0, 1)))
    return Normal(0.0, 1.0).log_prob(mean[0]) + rows.sum()


def log_padded(mean):
    rows = _halves(*(Normal(mean + z, 1.0).log_prob(X) for z in (0, 1)))
    return Normal(0.0, 1.0).log_prob(mean[0]) + (rows * KEPT).sum()


@pytest.mark.parametrize(
    ("model", "hide", "exact"),
    [
        (chain, [f"z{t}" for t in range(4)], log_chain),
        (crossed, ["z"], log_crossed),
        (padded, ["z"], log_padded),
        (in_turn, [f"z{t}" for t in range(4)], log_in_turn),
    ],
)
def test_sums_are_those_of_brute_force(model, hide, exact):
    """With their gradients, at once for all draws, without a warning."""
    density = scored(model, hide)
    u = torch.randn(5, density.dim, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density.check(u)
    expected = torch.stack([exact(row) for row in u])
    assert torch.allclose(density(u), expected, atol=1e-4)
    got, wanted = (torch.autograd.grad(x.sum(), u)[0] for x in (density(u), expected))
    assert torch.allclose(got, wanted, atol=1e-4)


def test_log_einsum_is_the_logarithm_of_einsum():
    a, b, c = torch.randn(2, 3), torch.randn(3, 4, 2), torch.randn(4)
    expected = torch.einsum("ab,bca,c->ca", a.exp(), b.exp(), c.exp()).log()
    assert torch.allclose(einsum("ab,bca,c->ca", a, b, c), expected, atol=1e-5)
    same = einsum("ab->ab", a)
    assert torch.equal(same, a) and same is not a


def scaled():
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    z = pyro.sample("z", Bernoulli(0.3))
    with poutine.scale(scale=2.0):
        pyro.sample("x", Normal(mean + z, 1.0), obs=X[0])


def moving():
    width = pyro.sample("width", Gamma(2.0, 1.0))
    z = pyro.sample("z", Uniform(0.0, width))
    pyro.sample("x", Normal(z, 1.0), obs=X[0])


def test_scales_of_summed_densities_are_refused():
    with pytest.raises(
        ValueError, match=r"site 'x': got a scale of 2\.0 on a density that discrete"
    ):
        scored(scaled, ["z"])


def test_supports_that_latents_move_are_refused():
    with pytest.raises(ValueError, match="site 'z': got a Uniform whose support changes"):
        scored(moving)


def test_noise_small_beside_the_density_is_seen():
    def noisy():
        z = pyro.sample("z", Normal(0.0, 1.0))
        pyro.factor("large", z - 5000 + torch.randn(()))

    with pytest.raises(ValueError, match="got another log density at a second run"):
        scored(noisy).check(torch.randn(3, 1))


def test_draws_that_mix_by_little_of_a_large_density_are_seen():
    """A sum over all latents takes in the draws' plate: half a nat of 40 000."""

    def mixing():
        z = pyro.sample("z", Normal(0.0, 1.0))
        assert float(z.detach().max()) < 99  # no vmap
        pyro.factor("own", -0.05 * z.square().sum() - 4e4)

    u = torch.tensor([[0.5], [1.0], [2.0]])
    density = scored(mixing)
    with pytest.warns(UserWarning, match="runs once a draw.*; densities differ there"):
        density.check(u)
    assert torch.allclose(
        density(u), Normal(0.0, 1.0).log_prob(u[:, 0]) - 0.05 * u[:, 0] ** 2 - 4e4
    )
