"""Classifier, similarity and classifier-free guidance, against the mixture with its components as labels."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import Categorical, Delta, Normal
from scipy import stats
from torch import nn

from pyro_diffusion.denoisers import CategoricalDenoiser, Denoiser, LevelsDenoiser, uniform_levels
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import ClassifierFreeGuidance, ClassifierGuidance, SimilarityGuidance
from pyro_diffusion.guidance.classifier import NoiseAwareGuidance
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.samplers import DDIM, Ancestral
from pyro_diffusion.schedules import LogLinear, Rectified, VarianceExploding
from pyro_diffusion.unwrapping import per_coordinate
from tests.exact import MEANS, VARIANCES, WEIGHTS, mixture
from tests.small_diffusions import Tiny

SCHEDULES = {
    "variance preserving": lambda: LogLinear(10.0, -10.0),
    "variance exploding": lambda: VarianceExploding(),
}


class Labels:
    """The exact p(k | x_t) of the mixture, written apart from the package."""

    def __init__(self, exploding: bool = False):
        self.exploding = exploding
        self.seen = None

    def __call__(self, xt, log_snr):
        self.seen = log_snr.shape
        ratio = log_snr.to(torch.float64)
        alpha2 = torch.ones_like(ratio) if self.exploding else ratio.sigmoid()
        sigma2 = (-ratio).exp() if self.exploding else (-ratio).sigmoid()
        alpha, sigma2 = alpha2.sqrt()[..., None], sigma2[..., None]
        scale = (alpha**2 * VARIANCES + sigma2).sqrt()
        logits = WEIGHTS.log() + torch.stack(
            [
                torch.distributions.Normal(alpha * m, s.unsqueeze(-1)).log_prob(xt).sum(-1)
                for m, s in zip(MEANS, scale.unbind(-1), strict=True)
            ],
            -1,
        )
        return Categorical(logits=logits)


class Labelled(Denoiser):
    """The exact conditional denoiser: the mixture's component if labelled, else the mixture."""

    def __init__(self, process, point_mass=False):
        super().__init__(process)
        self.mixture = mixture(process.schedule, point_mass)
        self.point_mass = point_mass
        self.reads = []

    def forward(self, xt, t, label=None, **other):
        self.reads.append(None if label is None else label.clone())
        if label is None:
            return self.mixture(xt, t)
        level = self.process.level(t, xt)
        mean, variance = component(xt, level, label)
        if self.point_mass:
            return Delta(mean, event_dim=1)
        return Normal(mean, variance.sqrt().expand(mean.shape)).to_event(1)


def component(xt, level, label):
    """Posterior mean and variance of one component."""
    m, s2 = MEANS[label], VARIANCES[label].unsqueeze(-1)
    total = level.alpha**2 * s2 + level.sigma**2
    mean = m + level.alpha * s2 / total * (xt - level.alpha * m)
    return mean, s2 * level.sigma**2 / total


def states(*shape):
    return 2 * torch.randn(*shape, 2, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("label", [0, 1, 2])
def test_exact_classifier_gives_the_components_own_mean(name, label):
    prior = mixture(SCHEDULES[name]())
    classifier = Labels(exploding=name == "variance exploding")
    guided = ClassifierGuidance(prior, classifier, torch.tensor(label))
    for xt, t in [
        (states(5), torch.tensor(0.3)),
        (states(5), torch.tensor(0.9)),
        (states(4, 3), torch.rand(4, 3, dtype=torch.float64)),
    ]:
        twisted = guided.twisted(xt, t)
        level = prior.process.level(t, xt)
        mean, _ = component(xt, level, torch.tensor(label))
        torch.testing.assert_close(twisted.posterior.mean, mean, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(twisted.posterior.variance, twisted.prior.variance)
        torch.testing.assert_close(twisted.prior.mean, prior(xt, t).mean)
        assert twisted.log_twist.shape == xt.shape[:-1] == classifier.seen
        assert not twisted.posterior.mean.requires_grad and not twisted.log_twist.requires_grad
        exact = classifier(
            xt, level.log_snr.reshape(level.log_snr.shape[:-1]).expand(xt.shape[:-1])
        )
        torch.testing.assert_close(twisted.log_twist, exact.log_prob(torch.tensor(label)))


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_scale_tilts_as_the_closed_form_says(scale):
    """Both guidances move the mean from the mixture's by the scale times the way to the component's."""
    prior = mixture(LogLinear(10.0, -10.0))
    xt, t, label = states(6), torch.rand(6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    null = prior(xt, t).mean
    wanted = null + scale * (component(xt, prior.process.level(t, xt), label)[0] - null)
    guided = ClassifierGuidance(prior, Labels(), label, scale=scale)(xt, t)
    torch.testing.assert_close(guided.mean, wanted, rtol=1e-7, atol=1e-7)
    free = ClassifierFreeGuidance(Labelled(prior.process), scale)(xt, t, label=label)
    torch.testing.assert_close(free.mean, wanted, rtol=1e-7, atol=1e-7)
    # A scale that varies with the level.
    guided = ClassifierGuidance(prior, Labels(), label, scale=lambda level: level.alpha)(xt, t)
    weight = prior.process.level(t, xt).alpha
    wanted = null + weight * (component(xt, prior.process.level(t, xt), label)[0] - null)
    torch.testing.assert_close(guided.mean, wanted, rtol=1e-7, atol=1e-7)
    free = ClassifierFreeGuidance(Labelled(prior.process), lambda level: level.alpha)
    torch.testing.assert_close(free(xt, t, label=label).mean, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sampler", [DDIM(0.0), Ancestral()], ids=repr)
def test_samples_follow_the_labels_component(sampler):
    """Kolmogorov-Smirnov per coordinate; false alarm 1e-3 for each of the eight."""
    guided = ClassifierGuidance(mixture(LogLinear(10.0, -10.0), True), Labels(), torch.tensor(1))
    law = Diffusion(guided, (2,), steps=200, sampler=sampler)
    x = law.sample((2000,))
    for i in range(2):
        exact = stats.norm(float(MEANS[1, i]), math.sqrt(float(VARIANCES[1])))
        assert stats.kstest(x[:, i].numpy(), exact.cdf).pvalue > 1e-3
    free = ClassifierFreeGuidance(Labelled(guided.process, True), 1.0)
    x = Diffusion(
        free, (2,), steps=200, sampler=sampler, context={"label": torch.tensor(1)}
    ).sample((2000,))
    for i in range(2):
        exact = stats.norm(float(MEANS[1, i]), math.sqrt(float(VARIANCES[1])))
        assert stats.kstest(x[:, i].numpy(), exact.cdf).pvalue > 1e-3


def test_any_likelihood_at_noise_level_t():
    """A normal reading of unit-normal data: p(y | x_t) is normal, the guided mean is the conjugate one."""
    process = GaussianProcess(LogLinear(10.0, -10.0))

    class Prior(Denoiser):
        def forward(self, xt, t, **context):
            level = self.process.level(t, xt)  # variance preserving: alpha^2 + sigma^2 = 1
            return Normal(level.alpha * xt, level.sigma.expand(xt.shape)).to_event(1)

    def regression(xt, log_snr):
        alpha, sigma2 = log_snr.sigmoid().sqrt()[..., None], (-log_snr).sigmoid()[..., None]
        return Normal(alpha * xt, (sigma2 + 0.25).sqrt()).to_event(1)

    y = torch.tensor([0.7, -1.2], dtype=torch.float64)
    guided = ClassifierGuidance(Prior(process), regression, y)
    xt, t = states(7), torch.rand(7, dtype=torch.float64)
    level = process.level(t, xt)
    precision = 1 + (level.alpha / level.sigma) ** 2 + 4
    mean = (level.alpha / level.sigma**2 * xt + 4 * y) / precision
    torch.testing.assert_close(guided(xt, t).mean, mean, rtol=1e-6, atol=1e-9)


def test_similarity_moves_along_its_gradient():
    prior = mixture(LogLinear(10.0, -10.0))
    target = torch.tensor([0.6, -0.8], dtype=torch.float64) * 2
    xt, t = states(5), torch.tensor(0.4, dtype=torch.float64)
    level = prior.process.level(t, xt)
    dot = SimilarityGuidance(prior, lambda x, log_snr: x, target, 1.5, similarity="dot")
    twisted = dot.twisted(xt, t)
    shift = level.sigma**2 / level.alpha * 1.5
    torch.testing.assert_close(twisted.posterior.mean, prior(xt, t).mean + shift * target)
    torch.testing.assert_close(twisted.log_twist, 1.5 * (xt @ target))
    cosine = SimilarityGuidance(prior, lambda x, log_snr: x, target, 1.5).twisted(xt, t)
    norm, unit = xt.norm(dim=-1, keepdim=True), target / 2
    angle = xt @ unit / norm[:, 0]
    slope = (unit - angle[:, None] * xt / norm) / norm
    torch.testing.assert_close(cosine.log_twist, 1.5 * angle)
    torch.testing.assert_close(cosine.posterior.mean, prior(xt, t).mean + shift * slope)


@pytest.mark.parametrize("kind", ["classifier", "similarity", "free"])
def test_a_row_does_not_see_its_batch(kind):
    prior = mixture(LogLinear(10.0, -10.0))
    guided = {
        "classifier": lambda: ClassifierGuidance(prior, Labels(), torch.tensor(1), 2.0),
        "similarity": lambda: SimilarityGuidance(prior, lambda x, _: x.sin(), torch.ones(2)),
        "free": lambda: ClassifierFreeGuidance(Labelled(prior.process), 2.0),
    }[kind]()
    context = {"label": torch.tensor(1)} if kind == "free" else {}
    xt, t = states(6), torch.rand(6, dtype=torch.float64)
    whole, alone = guided(xt, t, **context), guided(xt[:1], t[:1], **context)
    torch.testing.assert_close(whole.mean[:1], alone.mean, rtol=0, atol=1e-13)


def test_a_point_mass_stays_one():
    prior = mixture(LogLinear(10.0, -10.0), point_mass=True)
    xt, t = states(3), torch.tensor(0.5)
    guided = ClassifierGuidance(prior, Labels(), torch.tensor(0))
    assert isinstance(per_coordinate(guided(xt, t)), Delta)
    free = ClassifierFreeGuidance(Labelled(prior.process, True), 2.0)
    assert isinstance(per_coordinate(free(xt, t, label=torch.tensor(0))), Delta)


def test_scale_one_is_the_conditional_model_from_one_read():
    base = Labelled(GaussianProcess(LogLinear(10.0, -10.0)))
    xt, t, label = states(4), torch.tensor(0.5), torch.tensor([0, 1, 2, 2])
    guided, plain = ClassifierFreeGuidance(base, 1.0)(xt, t, label=label), base(xt, t, label=label)
    assert type(guided) is type(plain) and len(base.reads) == 2
    assert torch.equal(guided.mean, plain.mean) and torch.equal(guided.variance, plain.variance)
    # Nor is anything read twice where nothing is left out.
    base.reads.clear()
    ClassifierFreeGuidance(base, 3.0)(xt, t)
    assert len(base.reads) == 1


def test_interval_holds_the_scale_inside_alone():
    base = Labelled(GaussianProcess(LogLinear(10.0, -10.0)))
    guided = ClassifierFreeGuidance(base, 3.0, interval=(-2.0, 4.0))
    always = ClassifierFreeGuidance(base, 3.0)
    xt, label = states(3), torch.tensor([0, 1, 2])
    for time, inside, reads in [(0.1, False, 1), (0.5, True, 2), (0.9, False, 1)]:
        base.reads.clear()
        mean = guided(xt, torch.tensor(time), label=label).mean
        assert len(base.reads) == reads
        model = always if inside else base
        torch.testing.assert_close(mean, model(xt, torch.tensor(time), label=label).mean)
    times = torch.tensor([0.1, 0.5, 0.9])
    mean = guided(xt, times, label=label).mean
    for i, model in enumerate([base, always, base]):
        alone = model(xt[i], times[i], label=label[i]).mean
        torch.testing.assert_close(mean[i], alone, rtol=1e-6, atol=1e-6)


def test_interval_saves_reads_along_a_grid():
    base = Labelled(GaussianProcess(LogLinear(10.0, -10.0)), True)
    guided = ClassifierFreeGuidance(base, 3.0, interval=(-4.0, 4.0))
    law = Diffusion(guided, (2,), steps=20, context={"label": torch.tensor(1)})
    law.sample((3,))
    # Log-SNR 10 - j at grid point j: both reads at j = 6 ... 14, one at the others of 0 ... 20.
    assert len(base.reads) == 21 + 9
    assert sum(label is None for label in base.reads) == 9


def test_null_context_is_laid_over_the_given_one():
    seen = []

    class Recorder(Denoiser):
        def forward(self, xt, t, **context):
            seen.append({k: v.item() for k, v in context.items()})
            return Delta(xt * 0, event_dim=1)

    base = Recorder(GaussianProcess(LogLinear(10.0, -10.0)))
    xt, context = torch.zeros(3, 2), {"label": torch.tensor(1), "y": torch.tensor(0.5)}
    for null, wanted in [
        (None, {}),
        ({"label": None}, {"y": 0.5}),
        ({"label": torch.tensor(7)}, {"label": 7, "y": 0.5}),
    ]:
        seen.clear()
        ClassifierFreeGuidance(base, 2.0, null=null)(xt, torch.tensor(0.5), **context)
        assert seen == [{"label": 1, "y": 0.5}, wanted]


class Logits(Tiny):
    """A network of a few logits per coordinate that takes a label."""

    def __init__(self, outputs):
        super().__init__((3,), outputs, context=True)


def test_categorical_posteriors_combine_by_logits():
    base = CategoricalDenoiser(Logits(5), Absorbing(Rectified.full(), 5)).double()
    xt, t, label = torch.randint(5, (6, 3)), torch.tensor(0.5), torch.tensor([0, 1, 2, 0, 1, 2])
    xt[:, 0] = base.process.mask
    cond, null = base(xt, t, label=label), base(xt, t)
    guided = ClassifierFreeGuidance(base, 2.5)(xt, t, label=label)
    assert type(guided) is type(cond)
    law = per_coordinate(guided)
    assert isinstance(law, Categorical) and torch.isfinite(law.probs).all()
    p, q = per_coordinate(cond).probs, per_coordinate(null).probs
    wanted = torch.where(q > 0, p**2.5 * q.clamp(min=1e-300) ** -1.5, torch.zeros_like(p))
    torch.testing.assert_close(law.probs, wanted / wanted.sum(-1, keepdim=True))
    assert (law.probs[:, 1:].argmax(-1) == xt[:, 1:]).all()
    Diffusion(ClassifierFreeGuidance(base, 2.5), (3,), steps=4, context={"label": label}).sample()


def test_impossible_symbols_stay_impossible():
    """Infinite logits: in both reads, in the conditional alone, in the null alone."""
    inf = torch.inf
    label = torch.tensor([[0.0, 1.0, -inf, -inf, 0.5]])
    null = torch.tensor([[1.0, 0.0, -inf, 0.0, -inf]])

    class Table(Denoiser):
        def forward(self, xt, t, **context):
            return Categorical(logits=label if context else null).to_event(1)

    base = Table(Absorbing(Rectified.full(), 5))
    guided = ClassifierFreeGuidance(base, 3.0)(torch.tensor([5]), 0.5, label=torch.tensor(0))
    probs = per_coordinate(guided).probs[0]
    assert (
        torch.isfinite(probs).all() and (probs[[2, 3]] == 0).all() and (probs[[0, 1, 4]] > 0).all()
    )
    shift = (label.log_softmax(-1) - null.log_softmax(-1))[0, [0, 1]]
    wanted = label[0, [0, 1]] + 2 * shift
    found = probs[[0, 1]].log()
    torch.testing.assert_close(found[1] - found[0], wanted[1] - wanted[0])


def test_quantized_posteriors_combine_by_mean():
    process = GaussianProcess(LogLinear(10.0, -10.0))
    base = LevelsDenoiser(Logits(4), process, uniform_levels(4))
    xt, t, label = torch.randn(6, 3), torch.tensor(0.5), torch.tensor([0, 1, 2, 0, 1, 2])
    cond, null = base(xt, t, label=label), base(xt, t)
    guided = ClassifierFreeGuidance(base, 2.0)(xt, t, label=label)
    assert isinstance(per_coordinate(guided), Normal)
    torch.testing.assert_close(guided.mean, 2 * cond.mean - null.mean)
    torch.testing.assert_close(guided.variance, cond.variance)


def test_classifier_free_reads_keep_their_graph():
    base = Labelled(GaussianProcess(LogLinear(10.0, -10.0)))
    xt = states(3).requires_grad_()
    guided = ClassifierFreeGuidance(base, 2.0)
    (slope,) = torch.autograd.grad(
        guided(xt, torch.tensor(0.5), label=torch.tensor(1)).mean.sum(), xt
    )
    parts = [
        torch.autograd.grad(base(xt, torch.tensor(0.5), **c).mean.sum(), xt)[0]
        for c in ({"label": torch.tensor(1)}, {})
    ]
    torch.testing.assert_close(slope, 2 * parts[0] - parts[1])


def test_guidances_compose():
    """The label by its context, a reading by a likelihood: one wraps the other."""
    base = Labelled(GaussianProcess(LogLinear(10.0, -10.0)))
    free = ClassifierFreeGuidance(base, 1.0)
    dot = SimilarityGuidance(free, lambda x, _: x, torch.ones(2), similarity="dot")
    xt, t = states(4), torch.tensor(0.5, dtype=torch.float64)
    level = base.process.level(t, xt)
    wanted = base(xt, t, label=torch.tensor(2)).mean + level.sigma**2 / level.alpha
    torch.testing.assert_close(dot(xt, t, label=torch.tensor(2)).mean, wanted)


BASE = mixture(LogLinear(10.0, -10.0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ClassifierGuidance(nn.Linear(1, 1), Labels(), 0), "denoiser: got Linear"),
        (lambda: ClassifierGuidance(BASE, 3, 0), "classifier: got int"),
        (lambda: ClassifierGuidance(BASE, Labels(), 0, scale="2"), "scale: got '2'"),
        (lambda: ClassifierGuidance(BASE, Labels(), 0, scale=math.inf), "scale: got inf"),
        (
            lambda: ClassifierGuidance(
                CategoricalDenoiser(Logits(5), Absorbing(Rectified.full(), 5)), Labels(), 0
            ),
            "which lacks data of real numbers",
        ),
        (lambda: SimilarityGuidance(BASE, 3, torch.ones(2)), "features: got int"),
        (lambda: SimilarityGuidance(BASE, Labels(), torch.tensor(1.0)), "target: got"),
        (
            lambda: SimilarityGuidance(BASE, Labels(), torch.ones(2), similarity="l2"),
            "similarity: got 'l2'",
        ),
        (
            lambda: SimilarityGuidance(BASE, lambda x, _: x, torch.ones(3))(states(2), 0.5),
            "features: got shape",
        ),
        (
            lambda: ClassifierGuidance(BASE, lambda x, _: dist.Normal(x, 1.0), 0.0)(states(2), 0.5),
            "log_twist: got shape",
        ),
        (
            lambda: ClassifierGuidance(
                BASE, lambda x, _: dist.Bernoulli(probs=(x.detach().sum(-1) > 0).double()), 1.0
            )(states(2), 0.5),
            "no gradient",
        ),
        (lambda: ClassifierFreeGuidance(nn.Linear(1, 1), 2.0), "denoiser: got Linear"),
        (lambda: ClassifierFreeGuidance(BASE, None), "scale: got None"),
        (lambda: ClassifierFreeGuidance(BASE, 2.0, interval=(1.0, -1.0)), "interval: got"),
        (lambda: ClassifierFreeGuidance(BASE, 2.0, interval=3.0), "interval: got"),
        (lambda: NoiseAwareGuidance(nn.Linear(1, 1)), "denoiser: got Linear"),
    ],
)
def test_bad_input_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
