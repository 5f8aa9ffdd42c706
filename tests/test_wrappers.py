"""Any Pyro distribution may stand around a diffusion: the right one is found inside, or none."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.transforms import AffineTransform, ExpTransform

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.distributions.base import DenoisedDistribution
from pyro_diffusion.infer import AutoGuidance
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.likelihoods.whitening import whitened
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear
from pyro_diffusion.unwrapping import unwrap, unwrap_to

DENOISER = MixtureDenoiser(
    GaussianProcess(LogLinear(10, -10)), torch.ones(1), torch.zeros(1, 2), 1.0
)
LAW = Diffusion(DENOISER, (2,), steps=3)
SCALE = AffineTransform(1.0, 2.0)
NORMAL = dist.Normal(torch.zeros(2), 1.0).to_event(1)

WRAPPERS = {
    "expand": lambda law: law.expand((4, *law.batch_shape)),
    "expanded": lambda law: ExpandedDistribution(law, (4, *law.batch_shape)),
    "interstitial": lambda law: ExpandedDistribution(law, (*law.batch_shape[:-1], 3)),
    "mask": lambda law: law.mask(
        torch.arange(math.prod(law.batch_shape)).reshape(law.batch_shape) % 2 > 0
    ),
    "masked out": lambda law: law.mask(False),
    "to_event": lambda law: law.to_event(1),
    "affine": lambda law: dist.TransformedDistribution(law, [SCALE]),
    "two": lambda law: dist.TransformedDistribution(law, [SCALE, ExpTransform()]),
}
CHAINS = [names for count in (1, 2, 3) for names in itertools.permutations(WRAPPERS, count)]


def wrapped(law, names):
    for name in names:
        law = WRAPPERS[name](law)
    return law


def possible(names):
    """Whether there is a dimension to stretch: `to_event` takes the last."""
    order = {name: place for place, name in enumerate(names)}
    return order.get("interstitial", -1) <= order.get("to_event", math.inf)


@pytest.mark.parametrize("view", [Diffusion, DiffusionSDE, ProbabilityFlow])
def test_the_view_inside_is_found_at_its_batch_shape(view):
    for names in [(), *filter(possible, CHAINS)]:
        whole = wrapped(view(DENOISER, (2,)).expand((2, 1)), names)
        found = unwrap_to(whole, DenoisedDistribution)
        assert type(found.base) is view
        count = found.base.batch_shape.numel() * 2
        assert count == whole.shape().numel(), names
        again = found.around(found.base)
        assert (again.batch_shape, again.event_shape) == (whole.batch_shape, whole.event_shape)
        transforms = [
            t for name in names for t in {"affine": [SCALE], "two": [SCALE, "exp"]}.get(name, [])
        ]
        assert len(found.transforms) == len(transforms)
        assert [t is SCALE for t in found.transforms] == [t is SCALE for t in transforms]
        assert len(found.masks) == sum(name.startswith("mask") for name in names)


def test_the_same_wrappers_around_the_base_score_alike():
    base = dist.Normal(torch.zeros(2, 1, 2), torch.ones(2)).to_event(1)
    for names in filter(possible, CHAINS):
        whole = wrapped(base, names)
        found = unwrap(whole, (dist.Normal,))
        assert type(found.base) is dist.Normal
        value = whole.sample()
        again = found.around(found.base).log_prob(value)
        assert torch.allclose(again, whole.log_prob(value)), names


def test_unwrapping_leaves_the_distribution_alone():
    """`ExpandedDistribution.expand` changes the object that it is called on."""
    inner = ExpandedDistribution(LAW, (1,))
    outer = ExpandedDistribution(inner, (5, 1))
    assert unwrap_to(outer, DenoisedDistribution).base.batch_shape == (5, 1)
    assert inner.batch_shape == (1,)


class Growing(dist.TorchDistribution):
    """Its expansion is always one wrapper more."""

    arg_constraints = {}  # noqa: RUF012

    def expand(self, batch_shape, _instance=None):
        return ExpandedDistribution(self, batch_shape).mask(True)


def mixed():
    two = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), LAW.expand((2,)))
    mask = torch.tensor([True, False])
    return {
        "masked mixture": dist.MaskedMixture(torch.tensor(True), LAW, LAW),
        "stretched": dist.MaskedMixture(torch.tensor(True), LAW, LAW).expand((2,)),
        "stretched twice": dist.MaskedMixture(torch.tensor(True), LAW, LAW)
        .expand((1,))
        .expand((2,)),
        "two kinds": dist.MaskedMixture(mask, NORMAL, LAW),
        "mixture": two,
        "expanded mixture": two.expand((3,)),
        "growing": Growing(torch.Size(), torch.Size([2])).expand((3,)),
        "delta": dist.Delta(torch.zeros(2), event_dim=1),
        "unit": dist.Unit(torch.zeros(())),
        "rejector": dist.Rejector(NORMAL, lambda x: torch.zeros(x.shape[:-1]), torch.tensor(0.0)),
        "zero inflated": dist.ZeroInflatedPoisson(torch.tensor(1.0), gate=torch.tensor(0.1)),
        "folded": dist.FoldedDistribution(dist.Normal(0.0, 1.0)),
        "improper": dist.ImproperUniform(dist.constraints.real, (), (2,)),
        "normal": NORMAL,
        "log-normal": dist.LogNormal(0.0, torch.ones(2)).to_event(1),
    }


@pytest.mark.parametrize("name", mixed())
def test_what_is_no_diffusion_is_none(name):
    law = mixed()[name]
    laws = [
        law,
        dist.MaskedDistribution(law, True),
        ExpandedDistribution(law, (4, 3, *law.batch_shape)),
        law.expand_by((3,)),
    ]
    laws += [other.to_event(len(other.batch_shape)) for other in laws]
    if name in ("mixture", "expanded mixture", "delta", "normal", "log-normal", "folded"):
        laws += [dist.TransformedDistribution(other, [SCALE]) for other in laws]
    for other in laws:
        assert unwrap_to(other, DenoisedDistribution) is None
        assert not isinstance(unwrap(other).base, ExpandedDistribution | dist.MaskedDistribution)


def test_no_distribution_at_all():
    assert unwrap_to(lambda: torch.zeros(2), DenoisedDistribution) is None


def test_a_program_with_a_mixture_is_told_that_it_has_no_diffusion():
    def model():
        x = pyro.sample("x", mixed()["stretched"].to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(2), obs=torch.zeros(2, 2))

    with pytest.raises(ValueError, match="model: got no diffusion site"):
        ProgramLikelihood(model)
    with pytest.raises(ValueError, match="model: got no diffusion site"):
        AutoGuidance(model)()


def test_a_program_with_a_wrapped_site_finds_it():
    """log N(y; (1 + 2 x) . 1, 1) over four data of which a mask hides half."""

    def model(y):
        law = ExpandedDistribution(dist.TransformedDistribution(LAW, [SCALE]), (4,))
        x = pyro.sample("x", law.mask(torch.arange(4) < 2).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1), 1.0).to_event(1), obs=y)

    likelihood = ProgramLikelihood(model, (torch.arange(4.0),))
    x0 = torch.randn(7, 4, 2)
    exact = dist.Normal((1 + 2 * x0).sum(-1), 1.0).log_prob(torch.arange(4.0)).sum(-1, keepdim=True)
    got = likelihood.log_prob(x0)
    assert likelihood.batch_shape == (4,)
    assert torch.allclose(got, exact.reshape(got.shape), rtol=1e-5)


def test_observations_by_mixtures_end_too():
    """An observed site whose law can only be wrapped to be expanded has no residual, and says so."""
    law = dist.MaskedMixture(torch.tensor(True), NORMAL, NORMAL).expand((2,))

    def model():
        x = pyro.sample("x", LAW)
        narrow = dist.Normal(x, 1.0).to_event(1)
        pyro.sample(
            "y", dist.MaskedMixture(torch.tensor(True), NORMAL, narrow).expand((1,)), obs=x.detach()
        )

    site = {"fn": law, "value": torch.zeros(2, 2), "mask": None, "scale": 1.0}
    assert whitened(site) is None
    assert whitened(site, "deviance") is None
    likelihood = ProgramLikelihood(model)
    with pytest.raises(ValueError, match="MaskedMixture, expected a Normal"):
        likelihood.residual(torch.zeros(2))
