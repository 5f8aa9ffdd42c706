"""Strings with a context, in particles of an ELBO, and in filters: against enumeration."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.testing import assert_close

from pyro_diffusion.denoisers import Denoiser, InsertionDenoiser, StringTableDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionCTMC
from pyro_diffusion.guidance import ClassifierFreeGuidance, GuidedDenoiser, Twisted
from pyro_diffusion.infer import TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.nn import LabelContext, Transformer
from pyro_diffusion.processes import Deletion
from pyro_diffusion.processes.string_distributions import Insertions
from pyro_diffusion.processes.strings import lengths
from pyro_diffusion.schedules import Rectified
from tests.discrete import F64, chi_square, chi_square_limit
from tests.test_deletion import Wrong, counted, joint_of, strings

PROCESS = Deletion(Rectified.full(), 2)
ROWS = strings(3, 2)  # all 15 strings of up to three of two letters


class Labelled(Denoiser):
    """One of two tables, by a label."""

    def __init__(self):
        super().__init__(PROCESS)
        self.joints = [joint_of(3, 2)[0], joint_of(3, 2)[0].pow(0.3)]
        self.joints[1] = self.joints[1] / self.joints[1].sum()
        self.tables = nn.ModuleList(StringTableDenoiser(PROCESS, joint) for joint in self.joints)

    def forward(self, xt, t, label, **context):
        first, second = (table(xt, t).log_odds for table in self.tables)
        chosen = (label == 0).expand(xt.shape[:-1])[..., None, None]
        return Insertions(xt, torch.where(chosen, first, second), 2)

    def log_probs(self):
        """Of all strings given each label, (2, 15)."""
        return torch.stack([joint[tuple(ROWS.T)].log() for joint in self.joints])


def network():
    torch.manual_seed(0)
    label = {"label": LabelContext(2, 8)}
    out = Transformer(3, 3, width=8, depth=1, heads=2, outputs=2, context=label)
    for parameter in out.parameters():
        nn.init.normal_(parameter, std=0.5)
    return InsertionDenoiser(out, PROCESS).eval()


@torch.no_grad()
def test_a_network_is_told_the_context():
    denoiser, label = network(), torch.arange(15) % 2
    counts = denoiser(ROWS, 0.6, label=label).counts
    for i in range(15):
        assert_close(counts[i], denoiser(ROWS[i], 0.6, label=label[i]).counts)
    other = denoiser(ROWS, 0.6, label=1 - label).counts
    room = (ROWS == 2).any(-1)
    assert bool(((counts - other).abs().amax((-1, -2)) > 1e-3)[room].all())


@pytest.mark.parametrize("view", [Diffusion, DiffusionCTMC])
def test_shapes_of_a_context(view):
    law = view(network(), (3,), 4, context={"label": torch.tensor([[0], [1]])})
    assert law.batch_shape == (2, 1)
    x = law.expand((2, 5)).sample((7,))
    assert x.shape == (7, 2, 5, 3) and law.log_prob(x).shape == (7, 2, 5)
    assert law.log_prob(ROWS).shape == (2, 15)
    # The labels of one datum are scored with one draw of noise, each as by itself.
    found = {}
    for labels in ([0, 1], [1, 1], [0, 0]):
        pyro.set_rng_seed(0)
        context = {"label": torch.tensor(labels).unsqueeze(-1)}
        found[tuple(labels)] = view(network(), (3,), 4, context=context).log_prob(ROWS)
    assert_close(found[0, 1][0], found[0, 0][0])
    assert_close(found[0, 1][1], found[1, 1][1])
    assert_close(found[1, 1][0], found[1, 1][1])


def test_samples_and_bounds_are_those_of_the_label():
    """Chi-square over 15 strings, four standard errors of 30 means: a false alarm in 400, at a fixed seed."""
    torch.manual_seed(0)
    denoiser, label = Labelled(), torch.tensor([[0], [1]])
    law = DiffusionCTMC(denoiser, (3,), 128, context={"label": label})
    x, wanted = law.expand((2, 2000)).sample(), denoiser.log_probs()
    for i in (0, 1):
        own, other = (chi_square(counted(x[i], ROWS), wanted[j].exp()) for j in (i, 1 - i))
        assert own < chi_square_limit(15) < other
    many = law.log_prob(ROWS.repeat(2000, 1)).reshape(2, 2000, 15)
    error = many.std(1) / math.sqrt(2000)
    assert bool(((many.mean(1) - wanted).abs() < 4 * error + 1e-6).all())


@pytest.mark.parametrize("vectorized", [True, False])
def test_particles_of_an_elbo_draw_labels_of_strings(vectorized):
    """With the exact posterior of the label the ELBO is the evidence: four standard errors."""
    torch.manual_seed(1)
    denoiser = Labelled()
    wanted = denoiser.log_probs()
    posterior = wanted.T.softmax(-1)

    def model():
        pyro.module("denoiser", denoiser)
        with pyro.plate("strings", 15):
            label = pyro.sample("label", dist.Categorical(torch.ones(2)))
            pyro.sample("x", DiffusionCTMC(denoiser, (3,), 4, context={"label": label}), obs=ROWS)

    def guide():
        with pyro.plate("strings", 15):
            pyro.sample("label", dist.Categorical(posterior))

    count, repeats = (400, 20) if vectorized else (2, 60)
    elbo = Trace_ELBO(num_particles=count, vectorize_particles=vectorized, max_plate_nesting=1)
    found = -torch.tensor([elbo.loss(model, guide) for _ in range(repeats)], dtype=F64)
    truth = float((wanted.logsumexp(0) - math.log(2)).sum())
    assert abs(found.mean() - truth) < 4 * found.std() / math.sqrt(repeats)
    assert float(found.std()) * math.sqrt(count) < 30  # of one particle, 15 strings


def test_classifier_free_guidance_is_for_numbers_and_symbols():
    with pytest.raises(ValueError, match=r"^denoiser: got InsertionDenoiser under Deletion"):
        ClassifierFreeGuidance(network(), 2.0)


class Shorter(GuidedDenoiser):
    """The prior as proposal, and a twist that prefers short states: wrong, so that weights vary."""

    def __init__(self, denoiser, likelihood):
        super().__init__(denoiser)

    def twisted(self, xt, t, **context):
        prior = self.denoiser(xt, t, **context)
        return Twisted(prior, prior, -1.5 * lengths(xt, 2).to(F64))


def marginal_of_two_steps(denoiser):
    """The distribution of a chain's strings, by enumeration of its middle state."""
    empty, levels = torch.full((3,), 2), PROCESS.levels(torch.tensor([0.0, 0.5, 1.0], dtype=F64))
    early, middle, late = map(levels.at, range(3))
    first = PROCESS.reverse(empty, denoiser(empty, late), middle, late).log_prob(ROWS)
    second = PROCESS.reverse(ROWS, denoiser(ROWS, middle), early, middle)
    pairs = second.log_prob(ROWS.unsqueeze(1))  # data, middle
    return (first + pairs).logsumexp(-1)


@torch.no_grad()
@pytest.mark.parametrize("threshold", [1e-9, 1.0])
def test_particles_of_a_filter_keep_their_strings(threshold):
    """Evidence and posterior of a program about strings, without resampling and with it at every step.

    Four standard errors of 20 runs, of 16 numbers each: false alarms once in 500, at fixed seeds.
    """
    denoiser = Wrong(PROCESS, 3)
    law = Diffusion(denoiser, (3,), times=torch.tensor([0.0, 0.5, 1.0], dtype=F64))

    def program():
        x = pyro.sample("x", law)
        ones = (x == 1).sum(-1).to(F64)
        pyro.sample("ones", dist.Normal(ones, 0.6), obs=torch.tensor(1.7, dtype=F64))

    likelihood = ProgramLikelihood(program)
    own = dist.Normal((ROWS == 1).sum(-1).to(F64), 0.6).log_prob(torch.tensor(1.7, dtype=F64))
    prior = marginal_of_two_steps(denoiser)
    assert abs(float(prior.exp().sum()) - 1) < 1e-9
    joint = prior + own
    evidences, shares = [], []
    for seed in range(20):
        pyro.set_rng_seed(seed)
        run = TwistedSMC(law, likelihood, Shorter, 400, threshold).run()
        evidences.append(run.log_evidence.value - float(joint.logsumexp(0)))
        which = (run.value.unsqueeze(1) == ROWS).all(-1).to(F64)
        shares.append(run.log_weights.exp().to(F64) @ which)
    for found, wanted in (
        (torch.tensor(evidences, dtype=F64).exp().unsqueeze(-1), torch.ones(1, dtype=F64)),
        (torch.stack(shares), joint.softmax(0)),
    ):
        error = found.std(0) / math.sqrt(len(found)) + 2e-4
        assert bool(((found.mean(0) - wanted).abs() < 4 * error).all())
