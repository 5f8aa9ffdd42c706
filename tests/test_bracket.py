"""Bounds of the evidence from below and above: a gap shows what the ELBO hides."""

import math
import warnings

import pyro
import pytest
import torch
from pyro.distributions import Beta, Binomial, ImproperUniform, Normal, constraints
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal

from pyro_diffusion.evaluate import bracket_evidence
from pyro_diffusion.infer import AnnealedSMC, UnreliableWarning

X = torch.tensor([1.0, -0.5, 2.0])


def groups():
    """The posterior of each mean is N(x / 2, 1 / 2)."""
    with pyro.plate("groups", 3):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        pyro.sample("x", Normal(mean, 1.0), obs=X)


def exact_draws(count):
    return {"mean": X / 2 + math.sqrt(0.5) * torch.randn(count, 3)}


def test_bounds_against_closed_forms():
    """Two normals: bounds within 4.5 standard errors of log Z - KL(q, p) and log Z + KL(p, q)."""
    pyro.clear_param_store()
    guide = AutoNormal(groups, init_scale=0.6, init_loc_fn=lambda site: X / 2 + 0.2)
    found = bracket_evidence(groups, guide, exact_draws(4000), num_samples=4000)
    log_z = float(Normal(0.0, math.sqrt(2)).log_prob(X).sum())
    p, q = Normal(X / 2, math.sqrt(0.5)), Normal(X / 2 + 0.2, 0.6)
    below = log_z - float(torch.distributions.kl_divergence(q, p).sum())
    above = log_z + float(torch.distributions.kl_divergence(p, q).sum())
    assert abs(found.elbo.value - below) < 4.5 * found.elbo.standard_error
    assert abs(found.eubo.value - above) < 4.5 * found.eubo.standard_error
    assert max(found.elbo.standard_error, found.eubo.standard_error) < 0.02
    assert found.gap.value == pytest.approx(found.eubo.value - found.elbo.value)
    assert (found.elbo.kind, found.eubo.kind) == ("lower bound", "upper bound")
    assert not found.problems and "nats of the posterior" in str(found)


@pytest.mark.parametrize("kind", [AutoMultivariateNormal, AutoIAFNormal])
def test_other_guides_bracket_the_evidence(kind):
    pyro.clear_param_store()
    guide = kind(groups)
    log_z = float(Normal(0.0, math.sqrt(2)).log_prob(X).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)  # they are not fitted
        found = bracket_evidence(groups, guide, exact_draws(1000))
    assert found.elbo.value < log_z < found.eubo.value


def two_modes():
    """Half at -5, half at 5, of sd .5; evidence 1."""
    z = pyro.sample("z", ImproperUniform(constraints.real, (), ()))
    parts = torch.stack([Normal(-5.0, 0.5).log_prob(z), Normal(5.0, 0.5).log_prob(z)])
    pyro.factor("target", parts.logsumexp(0) - math.log(2))


def test_a_guide_on_one_mode_of_two():
    """Exact draws show it, 50 nats of gap; the guide's own particles do not, and give no all-clear."""
    pyro.clear_param_store()
    guide = AutoNormal(two_modes, init_scale=0.5, init_loc_fn=lambda site: torch.tensor(5.0))
    z = 5 * torch.randn(1000).sign() + 0.5 * torch.randn(1000)
    with pytest.warns(UnreliableWarning, match="bracket_evidence: guide: got an ELBO of"):
        shown = bracket_evidence(two_modes, guide, {"z": z})
    assert shown.gap.value > 50 and "not to be believed" in str(shown)
    particles = AnnealedSMC(two_modes, guide, 64, 8).run()
    hidden = bracket_evidence(two_modes, guide, particles)
    assert hidden.gap.value < 0.05 and not hidden.problems and not hidden.exact
    assert "blind to modes never visited" in str(hidden)
    assert "no all-clear" in str(hidden)


@pytest.mark.parametrize(
    ("posterior", "message"),
    [
        ({"other": torch.zeros(4, 3)}, r"draws: got none of \['mean'\]"),
        (
            {"mean": torch.zeros(4, 2)},
            r"draws\['mean'\]: got shape \(4, 2\), expected \(n,\) \+ \(3,\)",
        ),
        ({"mean": torch.full((4, 3), math.nan)}, r"posterior \(unconstrained\)"),
        (torch.zeros(3), "posterior: got Tensor, expected a dict"),
        ({"mean": torch.zeros(0, 3)}, r"draws\['mean'\]: got 0, expected two draws or more"),
        ({"mean": torch.zeros(1, 3)}, r"draws\['mean'\]: got 1, expected two draws or more"),
    ],
)
def test_bad_draws(posterior, message):
    with pytest.raises(ValueError, match=message):
        bracket_evidence(groups, AutoNormal(groups), posterior)


def coin(x=7.0):
    rate = pyro.sample("rate", Beta(2.0, 2.0))
    pyro.sample("x", Binomial(10, rate), obs=torch.tensor(x))


def test_draws_outside_of_the_support_are_refused():
    """torch's logit would move them to the edge, thousands of nats away."""
    with pytest.raises(ValueError, match=r"draws\['rate'\]: got values outside of the support"):
        bracket_evidence(coin, AutoNormal(coin), {"rate": torch.tensor([0.5, 1.2])})


def test_a_gap_that_may_be_chance_is_no_closeness():
    pyro.clear_param_store()
    found = bracket_evidence(coin, AutoNormal(coin), {"rate": torch.tensor([0.5, 1.0])})
    assert not found.problems and found.gap.value > 1
    assert "not known" in str(found) and "within" not in str(found)


def test_particles_of_another_model_are_refused():
    pyro.clear_param_store()
    particles = AnnealedSMC(coin, AutoNormal(coin), 16, 6).run()
    with pytest.raises(
        ValueError, match=r"posterior: got particles of \['rate'\], expected .*mean"
    ):
        bracket_evidence(groups, AutoMultivariateNormal(groups), particles)


def test_particles_whose_sites_are_in_another_order_are_refused():
    """Their columns would be taken for one another."""

    def of(*names):
        def model():
            for name in names:
                pyro.sample(name, Normal({"a": 0.0, "b": 5.0}[name], 1.0))

        return model

    pyro.clear_param_store()
    one, other = of("a", "b"), of("b", "a")
    particles = AnnealedSMC(one, AutoNormal(one, init_scale=1.0), 16, 6, rounds=1).run()
    with pytest.raises(ValueError, match=r"posterior: got particles of \['a', 'b'\], expected"):
        bracket_evidence(other, AutoNormal(other), particles)
