"""Booleans and complex numbers are neither real numbers nor symbols: refused wherever data come in."""

import pytest
import torch
from small_diffusions import SMALL_DIFFUSIONS, Tiny, conditional, normal

from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import SDESolver
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.samplers import Ancestral, simulate
from pyro_diffusion.schedules import Cosine

KINDS = {"bool": lambda x: x > 0, "complex": lambda x: torch.complex(x.float(), x.float())}
VIEWS = {small.name: small for small in SMALL_DIFFUSIONS} | {
    "sde": lambda **arguments: DiffusionSDE(normal(), (3,), solver=SDESolver(steps=4), **arguments),
    "flow": lambda **arguments: ProbabilityFlow(normal(), (3,), **arguments),
}


@pytest.mark.parametrize("validate_args", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VIEWS)
def test_data(name, kind, validate_args):
    law = VIEWS[name](validate_args=validate_args)
    x = KINDS[kind](torch.ones(4, *law.event_shape))
    with pytest.raises(ValueError, match=f"value: got dtype torch.{kind}"):
        law.log_prob(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["y", "label"])
def test_context(name, kind):
    context = {name: KINDS[kind](torch.ones(2) if name == "y" else torch.ones(()))}
    with pytest.raises(ValueError, match=f"{name}: got dtype torch.{kind}"):
        Diffusion(conditional(), (3,), 4, context=context)
    with pytest.raises(ValueError, match=f"{name}: got dtype torch.{kind}"):
        conditional()(torch.zeros(2, 3), torch.tensor(0.5), **context)


def test_a_network_may_declare_a_mask_as_context():
    class Masked(Tiny):
        def forward(self, x, log_snr, seen):
            return super().forward(x * seen, log_snr)

    denoiser = GaussianDenoiser(
        Masked((3,)), GaussianProcess(Cosine()), context_event_dims={"seen": 1}
    )
    law = Diffusion(denoiser, (3,), 4, context={"seen": torch.tensor([[True, False, True]] * 5)})
    assert law.batch_shape == (5,)
    assert law.log_prob(torch.randn(5, 3)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_states(kind):
    denoiser, x = normal(), KINDS[kind](torch.ones(4, 3))
    calls = {
        "x": lambda: simulate(denoiser, torch.linspace(0, 1, 4), x, Ancestral()),
        "xt": lambda: denoiser(x, 0.5),
        "x0": lambda: denoiser.process.marginal(x, 0.5),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}: got dtype torch.{kind}"):
            call()
