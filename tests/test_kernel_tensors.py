"""Kernels as the tensors that define them, which a particle filter keeps and resamples."""

import pyro.distributions as dist
import pytest
import torch

from pyro_diffusion.denoisers import Denoiser, TableDenoiser
from pyro_diffusion.distributions import CategoricalDecoder, Diffusion, QuantizedDecoder
from pyro_diffusion.guidance import GuidedDenoiser, Twisted
from pyro_diffusion.infer import TwistedSMC
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.schedules import Cosine, Rectified
from tests.small_diffusions import SMALL_DIFFUSIONS, SmallDiffusion

close = torch.testing.assert_close
F64 = torch.float64
TABLE = SmallDiffusion(
    "table",
    lambda: TableDenoiser(Absorbing(Rectified.full(), 2), torch.tensor([[0.5, 0.2], [0.0, 0.3]])),
    (2,),
    levels=2,
)


def kernels(small, count):
    """A reverse kernel and a decoder's distribution, each with what takes it apart and rebuilds it."""
    diffusion = small()
    process, decoder = diffusion.denoiser.process, diffusion.decoder
    xt = process.prior(diffusion.event_shape).sample((count,))
    levels = process.levels(torch.tensor([0.02, 0.3, 0.6]))
    posterior = diffusion.posterior(xt, levels.at(2))
    yield (
        process.reverse(xt, posterior, levels.at(1), levels.at(2)),
        process.kernel_tensors,
        process.kernel_from,
    )
    posterior = diffusion.posterior(xt, levels.at(0))
    yield (
        decoder(posterior, levels.at(0), process),
        decoder.kernel_tensors,
        lambda tensors: decoder.kernel_from(tensors, process.event_dim),
    )


@pytest.mark.parametrize("small", [*SMALL_DIFFUSIONS, TABLE], ids=lambda small: small.name)
def test_a_kernel_is_rebuilt_from_its_tensors_for_any_choice_of_rows(small):
    count, rows = 4, torch.tensor([2, 0, 0, 3, 1])
    for kernel, take_apart, rebuild in kernels(small, count):
        tensors = take_apart(kernel)
        assert all(len(tensor) == count for tensor in tensors.values())
        again = rebuild({name: tensor[rows] for name, tensor in tensors.items()})
        assert again.batch_shape == (5,) and again.event_shape == kernel.event_shape
        x = kernel.sample((3,))
        close(again.log_prob(x[:, rows]), kernel.log_prob(x)[:, rows])
        torch.manual_seed(1)
        draws = kernel.sample((3,))
        torch.manual_seed(1)
        assert rebuild(tensors).sample((3,)).equal(draws)


# Probabilities below float's resolution and one of 0, or their logarithms; and what was asked for before.
@pytest.mark.parametrize("of", ["probs", "logits"])
@pytest.mark.parametrize("asked", [(), ("logits",), ("probs",)], ids=str)
@pytest.mark.parametrize("decoder", [CategoricalDecoder(3), QuantizedDecoder(3)], ids=repr)
def test_impossible_symbols_stay_impossible_and_unlikely_ones_unlikely(decoder, of, asked):
    logits = torch.tensor([[0.0, -30.0, -200.0], [0.0, 0.0, -30.0]])
    kernel = dist.Categorical(**{of: logits.exp() if of == "probs" else logits}).to_event(1)
    for name in asked:
        getattr(kernel.base_dist, name)
    kernel = kernel.expand((4,))
    again = decoder.kernel_from(decoder.kernel_tensors(kernel), 1)
    assert again.base_dist.probs.equal(kernel.base_dist.probs)
    assert (again.base_dist.probs[:, 0, 2] == 0).all()
    x = torch.cartesian_prod(torch.arange(3), torch.arange(3))[:, None]
    close(again.log_prob(x), kernel.log_prob(x), rtol=0, atol=0)


class Constant(Denoiser):
    """A posterior that does not depend on the state, and has no batch shape therefore."""

    def forward(self, xt, t, **context):
        return dist.Normal(torch.tensor([1.0, -1.0], dtype=F64), 0.5).to_event(1)


class Unguided(GuidedDenoiser):
    def __init__(self, denoiser, likelihood):
        super().__init__(denoiser)

    def twisted(self, xt, t, **context):
        prior = self.denoiser(xt, t, **context)
        return Twisted(prior, prior, xt.new_zeros(xt.shape[:-1]))


class Flat(Likelihood):
    batch_shape, event_shape = torch.Size(), torch.Size((2,))

    def log_prob(self, x0):
        return x0.new_zeros(x0.shape[:-1])


def test_kernels_without_a_batch_get_that_of_the_particles():
    law = Diffusion(Constant(GaussianProcess(Cosine())), (2,), 3)
    smc = TwistedSMC(law, Flat(), Unguided, 16)
    seen = []
    particles = smc.filter()
    with torch.no_grad():
        particles.init(3)
        for stage in (2, 1, 0):
            particles.step(stage)
            seen.append({k: v.shape for k, v in particles.state.items() if "." in k})
    names = {"prior.loc", "prior.scale", "posterior.loc", "posterior.scale"}
    assert seen == [dict.fromkeys(names, (16, 2))] * 3
