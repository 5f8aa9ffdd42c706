"""EM and adversarial divergences as variational inference, each against a known answer."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from torch import nn
from torch.distributions import kl_divergence

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, ProbabilityFlow
from pyro_diffusion.infer import DensityRatio, Responsibilities
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine

F64 = torch.float64
close = torch.testing.assert_close
START = {"weights": [0.5, 0.5], "means": [-0.5, 1.0], "scales": [1.0, 1.5]}


def data(count=60):
    left = torch.rand(count, dtype=F64) < 0.3
    return torch.where(left, -2.0, 1.0) + 0.6 * torch.randn(count, dtype=F64)


def model(x):
    weights = pyro.param(
        "weights", torch.tensor(START["weights"], dtype=F64), dist.constraints.simplex
    )
    means = pyro.param("means", torch.tensor(START["means"], dtype=F64))
    scales = pyro.param(
        "scales", torch.tensor(START["scales"], dtype=F64), dist.constraints.positive
    )
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(means[k], scales[k]), obs=x)


def log_evidence(x, weights, means, scales):
    log_joint = weights.log() + dist.Normal(means, scales).log_prob(x.unsqueeze(-1))
    return log_joint.logsumexp(-1).sum(), log_joint.softmax(-1)


def start():
    return [torch.tensor(START[name], dtype=F64) for name in ("weights", "means", "scales")]


def test_responsibilities_are_bayes_rule():
    x = data()
    found = Responsibilities(model).probs(x)
    assert list(found) == ["k"]
    close(found["k"], log_evidence(x, *start())[1])


def test_the_elbo_is_the_evidence_and_so_is_its_gradient():
    """Fisher's identity; and nothing else has a gradient to the guide."""
    x, guide = data(), Responsibilities(model)
    loss = guide.elbo.differentiable_loss(model, guide, x)
    weights, means, scales = start()
    means.requires_grad_()
    value, _ = log_evidence(x, weights, means, scales)
    close(-loss.detach(), value.detach())
    (mine,) = torch.autograd.grad(-loss, pyro.param("means").unconstrained())
    (known,) = torch.autograd.grad(value, means)
    close(mine, known)


def test_steps_of_em_in_closed_form_only_rise_and_meet_the_gradients_optimum():
    """Sixty EM steps by the guide's responsibilities; SVI with the same guide ends where they do."""
    x, guide = data(400), Responsibilities(model)
    model(x)
    store, values = pyro.get_param_store(), []
    for _ in range(60):
        r = guide.probs(x)["k"]
        total = r.sum(0)
        means = (r * x.unsqueeze(-1)).sum(0) / total
        spread = (r * (x.unsqueeze(-1) - means).square()).sum(0) / total
        for name, value in (
            ("weights", total / len(x)),
            ("means", means),
            ("scales", spread.sqrt()),
        ):
            store[name] = value.detach().clone()
        values.append(float(log_evidence(x, total / len(x), means, spread.sqrt())[0].detach()))
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(values))
    assert values[-1] - values[-2] < 1e-4
    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), guide.elbo)
    for _ in range(250):
        loss = svi.step(x)
    assert -loss == pytest.approx(values[-1], abs=0.05)


def test_a_mixture_of_diffusions_by_their_flows():
    """p(x | k) is each flow's density; responsibilities are those of the two normals that they are."""
    flows = [
        ProbabilityFlow(
            MixtureDenoiser(
                GaussianProcess(Cosine()),
                torch.ones(1, dtype=F64),
                torch.full((1, 1), m, dtype=F64),
                0.25,
            ),
            (1,),
        )
        for m in (-1.0, 1.0)
    ]

    def mixture(x):
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7], dtype=F64)))
            log_probs = torch.stack([flow.log_prob(x) for flow in flows])
            rows = torch.arange(len(x))
            pyro.factor("x", log_probs[k, rows])

    x = torch.tensor([[-1.2], [0.1], [0.9]], dtype=F64)
    law = dist.Normal(torch.tensor([-1.0, 1.0], dtype=F64), 0.5)
    expected = (law.log_prob(x) + torch.tensor([0.3, 0.7], dtype=F64).log()).softmax(-1)
    close(Responsibilities(mixture).probs(x)["k"], expected, atol=2e-3, rtol=0)


def test_a_guide_of_a_model_without_latents_is_refused():
    with pytest.raises(ValueError, match="model: got no discrete latent"):
        Responsibilities(lambda: pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)))()
    with pytest.raises(ValueError, match="model: got int"):
        Responsibilities(3)
    assert isinstance(Responsibilities(model).elbo, TraceEnum_ELBO)


def test_a_subsampled_plate_has_the_evidence_of_its_rows_and_other_rows_each_time():
    x, every = data(6), [torch.tensor(p) for p in itertools.combinations(range(6), 2)]

    def some_rows(x):
        with pyro.plate("rows", len(x), subsample_size=2) as rows:
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5], dtype=F64)))
            loc = torch.tensor(START["means"], dtype=F64)[k]
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])

    guide = Responsibilities(some_rows)
    means, scales = torch.tensor(START["means"], dtype=F64), torch.ones(2, dtype=F64)
    weights = torch.tensor([0.5, 0.5], dtype=F64)
    expected = torch.stack([3 * log_evidence(x[p], weights, means, scales)[0] for p in every])
    found = torch.tensor([-guide.elbo.loss(some_rows, guide, x) for _ in range(20)], dtype=F64)
    nearest = (found.unsqueeze(-1) - expected).abs().min(-1)
    close(nearest.values, torch.zeros(20, dtype=F64), atol=1e-9, rtol=0)
    assert len(nearest.indices.unique()) > 3  # 20 draws of 15 pairs: below 1e-9 to be fewer


def test_a_plate_that_is_a_loop():
    x = data(3)

    def loop(x):
        for i in pyro.plate("rows", len(x)):
            k = pyro.sample(f"k_{i}", dist.Categorical(torch.tensor([0.5, 0.5], dtype=F64)))
            pyro.sample(
                f"x_{i}", dist.Normal(torch.tensor([-0.5, 1.0], dtype=F64)[k], 1.0), obs=x[i]
            )

    guide = Responsibilities(loop)
    weights, means = torch.tensor([0.5, 0.5], dtype=F64), torch.tensor([-0.5, 1.0], dtype=F64)
    expected = log_evidence(x, weights, means, torch.ones(2, dtype=F64))[0]
    close(torch.tensor(-guide.elbo.loss(loop, guide, x), dtype=F64), expected)


def test_latents_whose_posterior_is_no_product_are_refused():
    half = dist.Bernoulli(torch.tensor(0.5))

    def two(outside):
        a = pyro.sample("a", half) if outside else 0.0
        with pyro.plate("rows", 3):
            a = a if outside else pyro.sample("a", half)
            pyro.sample("x", dist.Normal(a + pyro.sample("b", half), 1.0), obs=torch.ones(3))

    for outside in (False, True):
        with pytest.raises(ValueError, match="got latents 'a' and 'b' for the same data"):
            Responsibilities(two).probs(outside)

    def continuous():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mean + pyro.sample("k", half), 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match=r"model: got latents \['mean'\] that cannot be"):
        Responsibilities(continuous).probs()

    def nested():
        with pyro.plate("a", 2, dim=-2), pyro.plate("b", 3, dim=-1):
            pyro.sample("k", half)

    with pytest.raises(ValueError, match="max_plate_nesting: got 1, expected 2"):
        Responsibilities(nested).probs()


def test_a_guide_draws_other_latents_and_has_the_discrete_ones_summed_out():
    x, mean = data(9), torch.tensor(0.3, dtype=F64, requires_grad=True)
    prior = dist.Normal(torch.zeros((), dtype=F64), 2.0)

    def shifted(x):
        shift = pyro.sample("shift", prior)
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5], dtype=F64)))
            pyro.sample("x", dist.Normal(shift + 2.0 * k, 1.0), obs=x)

    def guide(x):
        shift = pyro.sample("shift", dist.Delta(mean))
        Responsibilities(pyro.poutine.condition(shifted, {"shift": shift}))(x)

    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(shifted, guide, x)
    means = torch.stack([mean, mean + 2.0])
    weights = torch.tensor([0.5, 0.5], dtype=F64)
    evidence = log_evidence(x, weights, means, torch.ones(2, dtype=F64))[0] + prior.log_prob(mean)
    close(-loss, evidence)
    close(torch.autograd.grad(-loss, mean), torch.autograd.grad(evidence, mean))


class Quadratic(nn.Module):
    """Holds the log-ratio of any two normals of independent coordinates."""

    def __init__(self, size):
        super().__init__()
        self.layer = nn.Linear(2 * size, 1)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x):
        return self.layer(torch.cat([x, x.square()], -1))


def fit(ratio, q, p, steps=300, lr=0.05):
    optimizer = torch.optim.Adam(ratio.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        ratio.loss(q(2000), p(2000)).backward()
        optimizer.step()
    return ratio


def test_divergence_of_two_normals():
    """KL(N(.5, .7) || N(0, 1)) a coordinate: the mean log-odds to .03, the bound to three of its errors."""
    ratio = fit(
        DensityRatio(Quadratic(2)),
        lambda n: 0.5 + 0.7 * torch.randn(n, 2),
        lambda n: torch.randn(n, 2),
    )
    exact = 2 * (0.5 * (0.7**2 + 0.5**2 - 1) - math.log(0.7))
    q, p = 0.5 + 0.7 * torch.randn(40_000, 2), torch.randn(40_000, 2)
    assert float(ratio(q).mean().detach()) == pytest.approx(exact, abs=0.03)
    found = ratio.lower_bound(q, p)
    assert found.kind == "lower bound"
    assert exact - 0.03 - 3 * found.standard_error < found.value < exact + 3 * found.standard_error


def test_the_bound_holds_for_any_classifier():
    ratio = DensityRatio(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)))
    q, p = 0.5 + torch.randn(20_000, 2), torch.randn(20_000, 2)
    found = ratio.lower_bound(q, p)
    assert found.value < 0.25 + 3 * found.standard_error
    assert found.value < 0.2  # and an untrained one's is loose


def test_an_implicit_guide_finds_a_diffusion_prior():
    """q has draws alone, the prior is N(1, .25) as a diffusion: mean and sd are met to .1."""
    process = GaussianProcess(Cosine())
    prior = Diffusion(
        MixtureDenoiser(process, torch.ones(1), torch.ones(1, 1), 0.25), (1,), steps=20
    )
    pool = prior.sample((4000,))
    loc, log_scale = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    ratio = DensityRatio(Quadratic(1))
    optimizer = torch.optim.Adam(ratio.parameters(), lr=0.05)

    def draws(count):
        return loc + log_scale.exp() * torch.randn(count, 1)

    def program():
        pyro.param("loc", loc), pyro.param("log_scale", log_scale)
        pyro.factor("kl", -ratio(draws(500)).mean())

    svi = SVI(program, lambda: None, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    path = []
    for _ in range(400):
        for _ in range(3):
            optimizer.zero_grad()
            ratio.loss(draws(500), pool[torch.randint(4000, (500,))]).backward()
            optimizer.step()
        svi.step()
        path.append(torch.stack([loc.detach(), log_scale.detach().exp()]))
    # The two players circle around where they are even: the mean of the last steps is there.
    mean, sd = torch.stack(path[-200:]).mean(0).flatten().tolist()
    assert mean == pytest.approx(float(pool.mean()), abs=0.1)
    assert sd == pytest.approx(float(pool.std()), abs=0.1)
    assert float(pool.std()) == pytest.approx(0.5, abs=0.05)


def test_the_missing_term_is_the_mutual_information():
    """E_x KL(q(z|x) || p) = I(x; z) + KL(q(z) || p) where z = x + noise: the second term alone is 0."""
    noise = 0.2
    x = math.sqrt(1 - noise**2) * torch.randn(50_000, 1, dtype=F64)
    z = x + noise * torch.randn_like(x)
    each = kl_divergence(dist.Normal(x, noise), dist.Normal(0.0, 1.0)).mean()
    information = -math.log(noise)  # of a normal channel whose output has variance one
    assert float(each) == pytest.approx(information, abs=0.02)
    ratio = fit(
        DensityRatio(Quadratic(1)).double(),
        lambda n: z[:n],
        lambda n: torch.randn(n, 1, dtype=F64),
        50,
    )
    assert abs(float(ratio(z).mean().detach())) < 0.02


def test_the_bound_of_a_classifier_beyond_all_numbers():
    ratio = DensityRatio(nn.Identity())
    found = ratio.lower_bound(torch.zeros(3, 1), torch.tensor([[0.0], [1e3], [2.0]]))
    assert found.value == -math.inf and found.standard_error == math.inf


def test_refusals():
    ratio = DensityRatio(nn.Linear(2, 1))
    for q, p in ((torch.zeros(1, 2), torch.zeros(3, 2)), (torch.zeros(3, 2), torch.zeros(3, 1))):
        with pytest.raises(ValueError, match="got shape"):
            ratio.loss(q, p)
    with pytest.raises(ValueError, match="q: got 1 NaN"):
        ratio.loss(torch.tensor([[math.nan, 1.0], [0.0, 0.0]]), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="network: got int"):
        DensityRatio(3)
    several = DensityRatio(nn.Linear(2, 3))
    for function in (several.loss, several.lower_bound):
        with pytest.raises(ValueError, match=r"network: got \(4, 3\) for draws of shape \(4, 2\)"):
            function(torch.zeros(4, 2), torch.zeros(4, 2))
