"""Diffusions in programs that learn: every parameter that should move does."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.nn import PyroModule
from torch import nn

from pyro_diffusion.denoisers import (
    CategoricalDenoiser,
    GaussianDenoiser,
    LearnedVariance,
    LevelsDenoiser,
    TimeVariance,
    uniform_levels,
)
from pyro_diffusion.distributions import Bound, Diffusion, Hybrid, QuantizedDecoder, Simple
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.schedules import Cosine, Rectified
from tests.small_diffusions import Tiny


def empty(*args, **kwargs) -> None:
    """The guide of a model without latent variables."""


def gaussian(event: int = 2, limit: float = 4.0, **arguments) -> GaussianDenoiser:
    outputs = 2 if "variance" in arguments and arguments["variance"].outputs else 1
    process = GaussianProcess(Cosine(limit, -limit))
    return GaussianDenoiser(Tiny((event,), outputs), process, **arguments)


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_all_moved(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    still = [name for name, p in module.named_parameters() if p.equal(before[name])]
    assert before and not still, still


def blob(n: int = 128) -> torch.Tensor:
    return torch.tensor([1.5, -0.5]) + 0.2 * torch.randn(n, 2)


class Model(PyroModule):
    """The denoiser as an attribute: PyroModule registers it."""

    def __init__(self, denoiser: nn.Module, **arguments: object):
        super().__init__()
        self.denoiser, self.arguments = denoiser, arguments

    def forward(self, x):
        with pyro.plate("data", len(x), subsample_size=32) as index:
            law = Diffusion(self.denoiser, x.shape[1:], steps=20, **self.arguments)
            return pyro.sample("x", law, obs=x[index])


def function_model(denoiser: nn.Module, **arguments: object):
    def model(x):
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(x), subsample_size=32) as index:
            law = Diffusion(denoiser, x.shape[1:], steps=20, **arguments)
            return pyro.sample("x", law, obs=x[index])

    return model


def assert_falls(losses: list[float]) -> None:
    assert all(map(math.isfinite, losses))
    first, last = sum(losses[:15]) / 15, sum(losses[-15:]) / 15
    assert last < first - 0.2 * abs(first), (first, last)


@pytest.mark.parametrize("style", [Model, function_model], ids=["module", "function"])
def test_svi_trains_in_global_mode(style):
    denoiser, data = gaussian(variance=LearnedVariance()), blob()
    before = snapshot(denoiser)
    svi = SVI(style(denoiser), empty, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    assert_falls([svi.step(data) for _ in range(150)])
    assert len(pyro.get_param_store()) == len(before)
    assert_all_moved(denoiser, before)


def test_a_torch_optimizer_trains_in_local_mode():
    data = blob()
    with pyro.settings.context(module_local_params=True):
        denoiser = gaussian(variance=LearnedVariance())
        before = snapshot(denoiser)
        loss_fn = Trace_ELBO()(Model(denoiser), empty)
        optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.02)
        losses = []
        for _ in range(150):
            optimizer.zero_grad()
            loss = loss_fn(data)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert_falls(losses)
    assert_all_moved(denoiser, before)
    assert len(pyro.get_param_store()) == 0


def categorical() -> CategoricalDenoiser:
    return CategoricalDenoiser(Tiny((3,), 4), Absorbing(Rectified.full(), 4))


def levels() -> LevelsDenoiser:
    process = GaussianProcess(Cosine(6.0, -6.0))
    return LevelsDenoiser(Tiny((3,), 4), process, uniform_levels(4))


def integers() -> torch.Tensor:
    first = torch.randint(2, (128, 1))
    return torch.cat([first, first + 1, 3 - first], 1)


@pytest.mark.parametrize(
    ("denoiser", "data", "arguments"),
    [
        (gaussian, blob, {"objective": Simple()}),
        (lambda: gaussian(variance=LearnedVariance()), blob, {"objective": Hybrid(0.1)}),
        (lambda: gaussian(variance=TimeVariance([-4.0, 0.0, 4.0])), blob, {"objective": Bound()}),
        (categorical, integers, {}),
        (levels, integers, {"decoder": QuantizedDecoder(4)}),
    ],
    ids=["simple", "hybrid", "time_variance", "categorical", "levels"],
)
def test_every_kind_trains(denoiser, data, arguments):
    denoiser, data = denoiser(), data()
    before = snapshot(denoiser)
    svi = SVI(Model(denoiser, **arguments), empty, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    assert_falls([svi.step(data) for _ in range(200)])
    assert_all_moved(denoiser, before)


def test_the_packaged_network_trains_from_its_zero_start():
    denoiser = GaussianDenoiser(MLP(2, hidden=(16, 16)), GaussianProcess(Cosine(4.0, -4.0)))
    before = snapshot(denoiser)
    svi = SVI(Model(denoiser), empty, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(blob()) for _ in range(60)]
    assert all(map(math.isfinite, losses))
    assert_all_moved(denoiser, before)


def test_training_is_the_same_again():
    def run():
        pyro.clear_param_store()
        pyro.set_rng_seed(7)
        denoiser, data = gaussian(), blob()
        svi = SVI(Model(denoiser), empty, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        return [svi.step(data) for _ in range(20)]

    assert run() == run()


def test_an_unregistered_denoiser_is_left_alone():
    denoiser = gaussian()
    before = snapshot(denoiser)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Diffusion(denoiser, (2,), steps=5), obs=x)

    svi = SVI(model, empty, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    svi.step(blob())
    assert all(p.equal(before[name]) for name, p in denoiser.named_parameters())


class LatentDiffusion(nn.Module):
    """z ~ Diffusion, x ~ N(decoder(z), 0.1), guide q(z | x)."""

    def __init__(self):
        super().__init__()
        self.prior = gaussian(variance=LearnedVariance())
        self.decoder, self.encoder = nn.Linear(2, 5), nn.Linear(5, 4)

    def model(self, x):
        pyro.module("prior", self.prior)
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Diffusion(self.prior, (2,), steps=10))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.1).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (log_scale - 1).exp()).to_event(1))


@pytest.mark.parametrize("vectorize", [False, True])
def test_latent_diffusion_gives_gradients_to_all_three_parts(vectorize):
    whole = LatentDiffusion()
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=vectorize, max_plate_nesting=1)
    elbo.loss_and_grads(whole.model, whole.guide, torch.randn(16, 5))
    for name, parameter in whole.named_parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).any(), name


def test_latent_diffusion_trains_end_to_end():
    whole = LatentDiffusion()
    data = blob(64) @ torch.randn(2, 5) + 0.1 * torch.randn(64, 5)
    before = snapshot(whole)
    svi = SVI(whole.model, whole.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert_falls([svi.step(data) for _ in range(250)])
    assert_all_moved(whole, before)


def test_latent_gradient_is_pathwise_through_the_prior():
    # The guide's location learns from d log p(z) / dz, the bound's own gradient in its data.
    denoiser = gaussian()
    loc = torch.zeros(2, requires_grad=True)
    law = Diffusion(denoiser, (2,), steps=10)
    noise = torch.randn(64, 2)
    (expected,) = torch.autograd.grad(-law.log_prob(loc + noise).sum(), loc)

    def model():
        with pyro.plate("data", 64):
            pyro.sample("z", law)

    def guide():
        with pyro.plate("data", 64):
            pyro.sample("z", Fixed(loc, 1.0).to_event(1))

    class Fixed(dist.Normal):
        def rsample(self, sample_shape=()):
            return self.loc + noise

    loss = Trace_ELBO().differentiable_loss(model, guide)
    (got,) = torch.autograd.grad(loss, loc)
    # log q(z) does not depend on loc along the path.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_positive_data_through_a_transform():
    denoiser = gaussian()
    before = snapshot(denoiser)
    data = blob().exp()

    def model(x):
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(x)):
            law = Diffusion(denoiser, (2,), steps=20)
            positive = dist.TransformedDistribution(law, [dist.transforms.ExpTransform()])
            pyro.sample("x", positive, obs=x)

    svi = SVI(model, empty, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(data) for _ in range(150)]
    assert_falls(losses)
    assert_all_moved(denoiser, before)
    law = Diffusion(denoiser, (2,), steps=20)
    draws = dist.TransformedDistribution(law, [dist.transforms.ExpTransform()]).sample((200,))
    assert draws.shape == (200, 2) and (draws > 0).all()
    # The first coordinate is near exp(1.5), the second near exp(-0.5).
    assert (draws.log().mean(0) - torch.tensor([1.5, -0.5])).abs().max() < 0.4


def test_a_mixture_of_two_diffusions_with_known_components():
    """Rows choose their component; both denoisers learn from their own rows alone."""
    first, second = gaussian(), gaussian()
    before = snapshot(first), snapshot(second)

    def model(x, kind):
        for k, denoiser in enumerate((first, second)):
            pyro.module(f"denoiser{k}", denoiser)
            rows = x[kind == k]
            with pyro.plate(f"data{k}", len(rows)):
                pyro.sample(f"x{k}", Diffusion(denoiser, (2,), steps=20), obs=rows)

    kind = torch.arange(128) % 2
    data = blob() * torch.where(kind == 0, 1.0, -1.0)[:, None]
    svi = SVI(model, empty, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    assert_falls([svi.step(data, kind) for _ in range(150)])
    assert_all_moved(first, before[0])
    assert_all_moved(second, before[1])
    means = [Diffusion(d, (2,), steps=20).sample((200,)).mean(0)[0] for d in (first, second)]
    assert means[0] > 0.7 and means[1] < -0.7


def test_a_soft_mixture_through_masks():
    """Responsibilities that are latent in the guide weigh two diffusions in one plate."""
    first, second = gaussian(), gaussian()
    data = blob(32)

    def model(x):
        pyro.module("first", first)
        pyro.module("second", second)
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            for k, denoiser in enumerate((first, second)):
                with pyro.poutine.mask(mask=kind == k):
                    pyro.sample(f"x{k}", Diffusion(denoiser, (2,), steps=10), obs=x)

    def guide(x):
        probs = pyro.param("probs", torch.full((len(x),), 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Bernoulli(probs))

    Trace_ELBO().loss_and_grads(model, guide, data)
    for p in (*first.parameters(), *second.parameters(), pyro.param("probs").unconstrained()):
        assert p.grad.isfinite().all() and (p.grad != 0).any()


def test_enumerated_labels_reach_the_context():
    network = Tiny((2,), context=True)
    denoiser = GaussianDenoiser(network, GaussianProcess(Cosine()))

    def model(x):
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Categorical(torch.ones(3) / 3))
            law = Diffusion(denoiser, (2,), steps=5, context={"label": label})
            pyro.sample("x", law, obs=x)

    # In the guide, where the loss is linear in the estimates; the model's own enumeration is refused.
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("label", dist.Categorical(torch.ones(len(x), 3) / 3))

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.loss_and_grads(model, config_enumerate(guide), blob(8))
    assert math.isfinite(loss)
    assert (network.label.weight.grad != 0).all(1).all()
    with pytest.raises(ValueError, match="'label' enumerated in the model"):
        elbo.loss_and_grads(config_enumerate(model), empty, blob(8))
