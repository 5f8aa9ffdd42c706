"""Where draws come from: scoring has noise of its own, beside other threads too."""

import contextlib
import copy
import threading
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_diffusion.denoisers import NPR, GaussianDenoiser, LearnedVariance, VarianceDenoiser
from pyro_diffusion.distributions import (
    Bound,
    Dequantization,
    Diffusion,
    DiffusionSDE,
    Hybrid,
    MomentRegression,
    ProbabilityFlow,
    RedDiff,
    Simple,
    Weighted,
)
from pyro_diffusion.dynamics import Hutchinson, ODESolver
from pyro_diffusion.guidance import SampledGuidance
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import GaussianProcess, SeededNoise, draw, drawing_from
from pyro_diffusion.processes.row_noise import RowNoise
from pyro_diffusion.schedules import Cosine
from tests.small_diffusions import SMALL_DIFFUSIONS, Tiny, normal


class StudentProcess(GaussianProcess):
    """A reverse kernel that torch knows no divergence from: it is estimated by a draw."""

    def reverse(self, xt, posterior, s, t, eta=1.0):
        kernel = super().reverse(xt, posterior, s, t, eta).base_dist
        return dist.StudentT(5.0, kernel.loc, kernel.scale).to_event(self.event_dim)

    def bridge(self, xt, x0, s, t, eta=1.0):
        return super().reverse(xt, self.point_mass(x0), s, t, eta)


def program(law: Diffusion) -> Callable[[], None]:
    def model():
        # Built anew at every run, as Pyro programs do.
        x = pyro.sample("x", Diffusion(law.denoiser, law.event_shape, law.steps))
        pyro.sample("y", dist.Normal(x.to(torch.float32).sum(-1), 1.0), obs=torch.tensor(2.0))

    return model


def guided(law: Diffusion) -> Diffusion:
    model = program(law)
    guidance = SampledGuidance(law.denoiser, ProgramLikelihood(model), num_samples=3)
    return Diffusion(guidance, law.event_shape, law.steps, decoder=law.decoder)


def head() -> VarianceDenoiser:
    return VarianceDenoiser(
        GaussianDenoiser(Tiny((3,)), GaussianProcess(Cosine())), NPR(), Tiny((3,))
    )


def student() -> GaussianDenoiser:
    return GaussianDenoiser(Tiny((3,), 2), StudentProcess(Cosine()), variance=LearnedVariance())


by_name = {small.name: small for small in SMALL_DIFFUSIONS}
VIEWS = {
    **{f"chain {name}": law for name, law in by_name.items()},
    **{
        f"objective {type(objective).__name__}": lambda o=objective: by_name["normal"](objective=o)
        for objective in (Bound(), Simple(), Hybrid(), RedDiff())
    },
    "objective Weighted": lambda: by_name["normal"](objective=Weighted(lambda s, t, k: s - t)),
    "objective MomentRegression": lambda: Diffusion(head(), (3,), 4, objective=MomentRegression()),
    "estimated divergence": lambda: Diffusion(student(), (3,), 4),
    "sde": lambda: DiffusionSDE(normal(), (3,)),
    "flow": lambda: ProbabilityFlow(
        normal(), (3,), trace=Hutchinson(2), solver=ODESolver("rk4", steps=2)
    ),
    "guided": lambda: guided(by_name["normal"]()),
    "guided symbols": lambda: guided(by_name["absorbing"]()),
    "guided levels": lambda: guided(by_name["levels"]()),
    "dequantized": lambda: dist.TransformedDistribution(
        by_name["normal"](), [Dequantization(event_dim=1)]
    ),
}


def build(name: str) -> tuple[dist.TorchDistribution, Tensor]:
    """An instance, and data it can score."""
    law = VIEWS[name]()
    kinds = {"guided symbols": "absorbing", "guided levels": "levels"}
    kind = by_name.get(kinds.get(name, name.removeprefix("chain ")), by_name["normal"])
    value = kind.data((6,))
    if name == "dequantized":
        value = value.floor()
    return law, value


@pytest.mark.parametrize("name", VIEWS)
def test_scoring_repeats_and_leaves_the_global_generator_alone(name):
    law, value = build(name)
    before = torch.get_rng_state()
    first = law.log_prob(value)
    assert torch.get_rng_state().equal(before)
    draw(dist.Normal(0.0, 1.0))
    assert first.isfinite().all() and law.log_prob(value).equal(first)
    # Its noise is random none the less.
    other = build(name)[0].log_prob(value)
    assert not other.equal(first)


def beside(*tasks: Callable[[], None]) -> None:
    """Run each in a thread of its own, starting together."""
    start = threading.Barrier(len(tasks))
    failed: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        start.wait()
        try:
            task()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


@pytest.mark.parametrize("name", ["chain normal", "chain absorbing", "sde", "flow", "guided"])
def test_threads_score_as_one_thread_does(name):
    """Without noise of their own, about one value in ten was wrong: no chance of passing 100."""
    laws, values = zip(*(build(name) for _ in range(2)), strict=True)
    expected = [law.log_prob(value) for law, value in zip(laws, values, strict=True)]
    got: list[list[Tensor]] = [[], []]

    def score(i: int) -> None:
        for _ in range(50):
            got[i].append(laws[i].log_prob(values[i]))

    beside(lambda: score(0), lambda: score(1))
    for each, one in zip(got, expected, strict=True):
        assert all(value.equal(one) for value in each)


@pytest.mark.parametrize("name", ["chain normal", "sde"])
def test_draws_beside_a_scoring_thread_are_those_of_one_alone(name):
    (law, value), (sampled, _) = build(name), build("chain point")
    draws: list[Tensor] = []

    def sample() -> None:
        draws.extend(sampled.sample() for _ in range(100))

    torch.manual_seed(1)
    sample()
    alone = torch.stack(draws)
    draws.clear()
    torch.manual_seed(1)
    beside(sample, lambda: [law.log_prob(value) for _ in range(100)])
    assert torch.stack(draws).equal(alone)
    assert len(alone.unique(dim=0)) == 100


FAMILIES = [
    dist.Normal(torch.zeros(4, 3), 2.0).to_event(1),
    dist.Delta(torch.ones(3)),
    dist.Categorical(torch.rand(4, 3)),
    dist.Gamma(torch.rand(3) + 0.5, 1.0),
    dist.Dirichlet(torch.rand(4, 3) + 0.5),
    dist.Poisson(torch.full((3,), 5.0)),
    dist.StudentT(torch.full((3,), 5.0)),
    dist.VonMises(torch.zeros(3), 1.0),
    dist.Cauchy(torch.zeros(3), 1.0),
    dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
    dist.MixtureSameFamily(dist.Categorical(torch.rand(3)), dist.Normal(torch.zeros(3), 1.0)),
    dist.TransformedDistribution(
        dist.Uniform(torch.zeros(3), 1.0), [dist.transforms.ExpTransform()]
    ),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda d: type(d).__name__)
def test_a_seed_gives_the_stream_that_torchs_own_generator_gives(family):
    torch.manual_seed(7)
    expected = draw(family, (2,)), draw(family)
    before = torch.get_rng_state()
    with drawing_from(SeededNoise(7)):
        got = draw(family, (2,)), draw(family)
    assert torch.get_rng_state().equal(before)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.equal(theirs)


def test_sources_nest_and_belong_to_one_thread():
    normal = dist.Normal(torch.zeros(3), 1.0)
    inside: list[Tensor] = []
    with drawing_from(SeededNoise(1)):
        first = draw(normal)
        with drawing_from(SeededNoise(1)):
            assert draw(normal).equal(first)
        torch.manual_seed(2)
        beside(lambda: inside.append(draw(normal)))
        second = draw(normal)
    torch.manual_seed(2)
    assert inside[0].equal(draw(normal))
    assert not second.equal(first)
    with pytest.raises(RuntimeError), drawing_from(SeededNoise(1)):
        raise RuntimeError
    torch.manual_seed(2)
    assert inside[0].equal(draw(normal))


def test_dropout_is_torchs_own():
    """In training mode a network draws as any torch module does; in eval mode a score repeats."""
    network = Tiny((3,))
    network.last = torch.nn.Sequential(torch.nn.Dropout(0.5), network.last)
    law, value = (
        Diffusion(GaussianDenoiser(network, GaussianProcess(Cosine())), (3,), 4),
        SMALL_DIFFUSIONS[1],
    )
    value = value.data((8,))
    torch.manual_seed(3)
    first = law.log_prob(value)
    assert not law.log_prob(value).equal(first)
    torch.manual_seed(3)
    assert law.log_prob(value).equal(first)
    before = torch.get_rng_state()
    network.eval()
    assert law.log_prob(value).equal(law.log_prob(value))
    assert torch.get_rng_state().equal(before)


def test_a_copy_keeps_its_noise():
    law, value = build("chain normal")
    assert copy.deepcopy(law).log_prob(value).equal(law.log_prob(value))


def test_symbols_are_drawn_by_row_in_double_precision():
    """Sums of single precision near 1 have no room for rare symbols."""
    seen = []

    class Spy(RowNoise):
        def uniform(self, shape, like, event_dim=0):
            seen.append(like.dtype)
            return super().uniform(shape, like, event_dim)

    with drawing_from(Spy(5, torch.arange(6))):
        x = draw(dist.Categorical(logits=torch.randn(6, 3, 4)).to_event(1))
    assert x.shape == (6, 3) and seen == [torch.float64]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("source", [None, 5])
def test_rare_symbols_are_drawn_on_a_gpu(source):
    """Single precision has no exponential numbers small enough. Six standard errors: once in 10^8."""
    count, symbols, probability = 100_000, 1024, 2.0**-26
    probs = torch.full((symbols,), probability, device="cuda")
    probs[0] = 1 - probability * (symbols - 1)
    rare = dist.Categorical(probs=probs).expand([count])
    found = 0
    with contextlib.nullcontext() if source is None else drawing_from(SeededNoise(source)):
        for _ in range(200):
            found += int((draw(rare) > 0).sum())
    want = 200 * count * probability * (symbols - 1)
    assert abs(found - want) < 6 * want**0.5
