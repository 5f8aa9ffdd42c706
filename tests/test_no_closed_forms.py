"""What torch's interface lists and our laws do not have: a sentence each; what they show of themselves."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_diffusion.denoisers import GaussianDenoiser, MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.distributions.discretized import DiscretizedNormal
from pyro_diffusion.dynamics import ODESolver, SDESolver
from pyro_diffusion.guidance.base import GuidedDenoiser
from pyro_diffusion.infer.filtering.simulated_posterior import SimulatedPosterior
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine

PROCESS = GaussianProcess(Cosine())
DENOISER = MixtureDenoiser(PROCESS, torch.ones(1), torch.zeros(1, 2), 1.0)
VIEWS = [Diffusion, DiffusionSDE, ProbabilityFlow]
CALLS = {
    "mean": "average draws",
    "variance": "average draws",
    "stddev": "average draws",
    "mode": "maximize log_prob",
    "cdf": "count draws",
    "icdf": "quantiles of draws",
    "entropy": "average -log_prob over draws",
    "perplexity": "average -log_prob over draws",
    "enumerate_support": "use draws",
    "rsample": "ProbabilityFlow",
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_missing_says_so(view, name):
    law = view(DENOISER, (2,))
    if view is ProbabilityFlow and name == "rsample":
        assert law.rsample((3,)).shape == (3, 2)
        return
    with pytest.raises(NotImplementedError, match=CALLS[name]):
        ask(law, name)
    if name in ("mean", "variance", "stddev"):
        for wrapped in (law.mask(True), law.expand((3,)).to_event(1)):
            with pytest.raises(NotImplementedError, match=CALLS[name]):
                ask(wrapped, name)


def ask(law, name):
    member = getattr(law, name)
    return member(torch.zeros(law.event_shape)) if name in ("cdf", "icdf") else member()


def test_a_guides_law_says_so_too():
    law = SimulatedPosterior(lambda shape: None, (), (2,), dist.constraints.real_vector)
    with pytest.raises(
        NotImplementedError, match=r"SimulatedPosterior\.mean: .* draws of the guide"
    ):
        _ = law.mean


@pytest.mark.parametrize("view", VIEWS)
def test_divergences_say_so_without_ambiguity(view):
    """torch warns of two rules that fit, and warnings are errors here."""
    law = view(DENOISER, (2,))
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    others = [normal, normal.mask(True), dist.LogNormal(torch.zeros(2), 1.0).to_event(1)]
    others += [dist.TransformedDistribution(normal, [dist.transforms.ExpTransform()])]
    others += [other(DENOISER, (2,)) for other in VIEWS]
    for other in others:
        for pair in ((law, other), (other, law)):
            with pytest.raises(NotImplementedError, match=r"average p\.log_prob"):
                kl_divergence(*pair)
    with pytest.raises(NotImplementedError, match=r"average p\.log_prob"):
        kl_divergence(law.expand((3,)).to_event(1), normal.expand((3,)).to_event(1))
    x = torch.ones(2)
    assert kl_divergence(dist.Delta(x, event_dim=1), law) == -law.log_prob(x)


def test_a_flow_and_itself():
    law = ProbabilityFlow(DENOISER, (2,))
    assert kl_divergence(law, law.expand((1,))).item() == 0
    with pytest.raises(NotImplementedError, match=r"average p\.log_prob"):
        kl_divergence(law, ProbabilityFlow(DENOISER, (2,)))


@pytest.mark.parametrize(("loc", "scale"), [(1.3, 0.8), (-4.0, 0.5), (9.0, 30.0), (2.0, 0.0)])
def test_moments_of_integers(loc, scale):
    law = DiscretizedNormal(torch.tensor([[loc], [1.0]]), torch.tensor(scale), levels=5)
    probs = law.log_prob(torch.arange(5).reshape(5, 1, 1)).exp()
    values = torch.arange(5.0).reshape(5, 1, 1)
    assert law.enumerate_support().shape == (5, 2, 1)
    mean = (probs * values).sum(0)
    assert torch.allclose(law.mean, mean)
    assert torch.allclose(law.variance, (probs * values**2).sum(0) - mean**2, atol=1e-5)
    assert torch.allclose(law.entropy(), torch.special.entr(probs).sum(0), atol=1e-6)
    with pytest.raises(NotImplementedError, match="not reparameterized"):
        law.rsample()


def test_repr():
    network = GaussianDenoiser(MLP(2), PROCESS)
    law = Diffusion(network, (2,), steps=50)
    assert repr(law) == "Diffusion(GaussianDenoiser(MLP), event_shape=(2,), steps=50)"
    law = law.expand((4,))
    assert "batch_shape=(4,), steps=50" in repr(law)
    assert repr(law.to_event(1)) == f"Independent({law!r}, 1)"
    guided = Diffusion(GuidedDenoiser(network), (2,), steps=1)
    assert "GuidedDenoiser(GaussianDenoiser(MLP))" in repr(guided)
    law = DiffusionSDE(DENOISER, (2,), solver=SDESolver(steps=20))
    assert repr(law) == (
        "DiffusionSDE(MixtureDenoiser, event_shape=(2,), solver=SDESolver('euler', steps=20), eta=1.0)"
    )
    law = ProbabilityFlow(DENOISER, (2,))
    assert repr(law) == (
        "ProbabilityFlow(MixtureDenoiser, event_shape=(2,), "
        "solver=ODESolver('dopri5', rtol=1e-05, atol=1e-05), trace=ExactTrace())"
    )
    assert (
        repr(ODESolver("rk4", steps=8, adjoint=True)) == "ODESolver('rk4', steps=8, adjoint=True)"
    )
    adaptive = SDESolver("heun", adaptive=True)
    assert repr(adaptive) == "SDESolver('heun', adaptive=True, rtol=0.01, atol=0.01)"
    assert adaptive.steps is None
    assert ODESolver("rk4").rtol is None
    for solver, method in ((ODESolver, "rk4"), (SDESolver, "heun")):
        with pytest.raises(TypeError, match="positional"):
            solver(method, 16)
