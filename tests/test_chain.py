"""The chain spelled out: stock inference on it, and its equality with the one-site estimate."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Importance,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from torch.distributions import kl_divergence

from pyro_diffusion.denoisers import GaussianDenoiser, MixtureDenoiser, TableDenoiser
from pyro_diffusion.distributions import Diffusion, QuantizedDecoder
from pyro_diffusion.infer import DDPM, ChainReparam
from pyro_diffusion.infer.reparam import forward_chain, reverse_chain
from pyro_diffusion.processes import Absorbing, CategoricalProcess, GaussianProcess, Uniform
from pyro_diffusion.schedules import Cosine, Rectified, uniform
from tests.small_diffusions import SMALL_DIFFUSIONS, SmallDiffusion, Tiny, conditional

F64 = torch.float64
every_kind = pytest.mark.parametrize("small", SMALL_DIFFUSIONS, ids=lambda small: small.name)


def mixture(**arguments) -> MixtureDenoiser:
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.3], [0.2, -1.2]], dtype=F64)
    process = GaussianProcess(Cosine())
    return MixtureDenoiser(process, torch.ones(3, dtype=F64), means, 0.1, **arguments)


def table(process: type) -> TableDenoiser:
    joint = torch.arange(1.0, 28.0, dtype=F64).reshape(3, 3, 3) ** 2
    return TableDenoiser(process(Rectified.full(), 3).double(), joint)


def mean_and_error(draws: list[float]) -> tuple[float, float]:
    values = torch.tensor(draws, dtype=F64)
    return float(values.mean()), float(values.std()) / math.sqrt(len(draws))


@pytest.mark.parametrize("kind", ["normal", "point", "quantized", "absorbing", "uniform"])
@pytest.mark.parametrize("steps", [1, 4])
def test_one_site_equals_the_stock_elbo_on_the_chain(kind, steps):
    # Three standard errors on each of ten comparisons: a false alarm in 3 % of seeds, the seed is fixed.
    decoder = QuantizedDecoder(5, low=-2.0, high=2.0) if kind == "quantized" else None
    if kind in ("absorbing", "uniform"):
        denoiser, event = table(Absorbing if kind == "absorbing" else Uniform), (3,)
        elbo = Trace_ELBO()
    else:
        denoiser, event = mixture(point_mass=kind == "point"), (2,)
        elbo = TraceMeanField_ELBO()
    arguments = {"times": uniform(steps, F64), "decoder": decoder}
    data = Diffusion(denoiser, event, **arguments).sample((1000,))
    ddpm = DDPM(denoiser, event, **arguments)

    def one_site(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Diffusion(denoiser, event, **arguments), obs=x)

    repeats = 15
    with torch.no_grad():
        chain = [elbo.loss(ddpm.model, ddpm.guide, data) / 1000 for _ in range(repeats)]
        site = [
            Trace_ELBO().loss(one_site, lambda x: None, data) / 1000 for _ in range(10 * repeats)
        ]
    (a, error_a), (b, error_b) = mean_and_error(chain), mean_and_error(site)
    assert abs(a - b) <= 3 * math.hypot(error_a, error_b), (a, error_a, b, error_b)
    assert math.hypot(error_a, error_b) < 0.02 * max(abs(a), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "chains", "sites"), [("normal", 100, 600), ("absorbing", 10, 200)]
)
def test_one_site_equals_the_chain_to_a_fifth_of_a_percent(kind, chains, sites):
    # Long and precise: three standard errors, themselves below 0.2 % of the bound.
    denoiser = mixture() if kind == "normal" else table(Absorbing)
    event, elbo = ((2,), TraceMeanField_ELBO()) if kind == "normal" else ((3,), Trace_ELBO())
    arguments = {"times": uniform(5, F64)}
    data = Diffusion(denoiser, event, **arguments).sample((5000,))
    ddpm = DDPM(denoiser, event, **arguments)
    with torch.no_grad():
        chain = [elbo.loss(ddpm.model, ddpm.guide, data) / 5000 for _ in range(chains)]
        site = [
            -float(Diffusion(denoiser, event, **arguments).log_prob(data).mean())
            for _ in range(sites)
        ]
    (a, error_a), (b, error_b) = mean_and_error(chain), mean_and_error(site)
    error = math.hypot(error_a, error_b)
    assert abs(a - b) <= 3 * error and error < 0.002 * abs(a), (a, error_a, b, error_b)


def test_expected_gradients_agree_too():
    network = Tiny((2,)).double()
    denoiser = GaussianDenoiser(network, GaussianProcess(Cosine(4.0, -4.0)))
    arguments = {"times": uniform(3, F64)}
    data = torch.randn(3000, 2, dtype=F64)
    ddpm = DDPM(denoiser, (2,), **arguments)
    gradients: dict[str, list[torch.Tensor]] = {"chain": [], "site": []}
    for _ in range(40):
        losses = {
            "chain": TraceMeanField_ELBO().differentiable_loss(ddpm.model, ddpm.guide, data),
            "site": -Diffusion(denoiser, (2,), **arguments).log_prob(data).sum(),
        }
        for name, loss in losses.items():
            gradient = torch.autograd.grad(loss, list(network.parameters()))
            gradients[name].append(torch.cat([g.flatten() for g in gradient]))
    a, b = (torch.stack(g) for g in gradients.values())
    error = ((a.var(0) + b.var(0)) / 40).sqrt()
    # 42 numbers at 4.5 standard errors: a false alarm in 3e-4 of seeds.
    assert ((a.mean(0) - b.mean(0)).abs() <= 4.5 * error).all()


@every_kind
def test_stock_elbos_run_in_both_parameter_modes(small: SmallDiffusion, module_local_params):
    data = small.data((6,))
    context = {k: v.expand(6, *v.shape) for k, v in small.context.items()}
    ddpm = DDPM(small.denoiser(), small.event_shape, steps=3, decoder=small.decoder)
    discrete = isinstance(ddpm.model.denoiser.process, CategoricalProcess)
    # Pyro asks for a reparameterized guide where it takes divergences in closed form.
    mean_field = Trace_ELBO if discrete else TraceMeanField_ELBO
    for elbo in (
        Trace_ELBO(),
        Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        mean_field(),
        mean_field(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        RenyiELBO(alpha=0.5, num_particles=3),
        RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    ):
        for subsample_size in (None, 2):
            arguments = {"subsample_size": subsample_size, **context}
            loss = elbo.loss(ddpm.model, ddpm.guide, data, **arguments)
            assert math.isfinite(loss)
            ddpm.model.zero_grad()
            if module_local_params and hasattr(elbo, "differentiable_loss"):
                elbo(ddpm.model, ddpm.guide)(data, **arguments).backward()
            else:
                elbo.loss_and_grads(ddpm.model, ddpm.guide, data, **arguments)
            gradients = [p.grad for p in ddpm.model.parameters() if p.grad is not None]
            assert gradients and all(g.isfinite().all() for g in gradients)


def test_training_moves_every_parameter_in_both_modes(module_local_params):
    denoiser = GaussianDenoiser(Tiny((2,)), GaussianProcess(Cosine(4.0, -4.0)))
    ddpm = DDPM(denoiser, (2,), steps=3)
    before = [p.detach().clone() for p in denoiser.parameters()]
    data = 0.3 * torch.randn(64, 2) + 1
    losses = []
    if module_local_params:
        module = TraceMeanField_ELBO()(ddpm.model, ddpm.guide)
        module(data)
        assert {id(p) for p in module.parameters()} == {id(p) for p in denoiser.parameters()}
        optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
        for _ in range(80):
            optimizer.zero_grad()
            loss = module(data)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    else:
        svi = SVI(ddpm.model, ddpm.guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO())
        losses = [svi.step(data) for _ in range(80)]
        assert len(pyro.get_param_store()) == len(before)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    for a, b in zip(before, denoiser.parameters(), strict=True):
        assert not a.equal(b)


@pytest.mark.usefixtures("module_local_params")
def test_the_guide_has_no_parameters_and_survives_a_copy():
    ddpm = DDPM(GaussianDenoiser(Tiny((2,)), GaussianProcess(Cosine())), (2,), steps=2)
    data = torch.zeros(3, 2)
    assert not list(ddpm.guide.parameters())
    trace = poutine.trace(ddpm.guide).get_trace(data)
    assert not trace.param_nodes
    copied = copy.deepcopy(ddpm)
    assert len(poutine.trace(ddpm.model).get_trace(data).param_nodes) == 4
    assert math.isfinite(Trace_ELBO().loss(copied.model, copied.guide, data))


def test_two_models_do_not_share_parameters_or_sites():
    first, second = (
        DDPM(GaussianDenoiser(Tiny((2,)), GaussianProcess(Cosine())), (2,), steps=2, name=name)
        for name in ("a", "b")
    )

    def model(x):
        return first.model(x), second.model(x)

    def guide(x):
        first.guide(x), second.guide(x)

    trace = poutine.trace(model).get_trace(torch.zeros(3, 2))
    assert {"a_t2", "a_t1", "a_t0", "a", "b_t2", "b_t0", "b"} <= set(trace.stochastic_nodes) | set(
        trace.observation_nodes
    )
    assert math.isfinite(TraceMeanField_ELBO().loss(model, guide, torch.zeros(3, 2)))


@pytest.mark.parametrize("steps", [1, 6])
def test_renyi_lies_between_the_bound_and_the_truth(steps):
    denoiser = mixture(point_mass=True)
    data = denoiser.data().sample((1500,))
    ddpm = DDPM(denoiser, (2,), times=uniform(steps, F64))

    # One datum per plate entry: weights must be averaged per datum, so particles sit in a plate.
    def log_weights(particles: int) -> torch.Tensor:
        elbo = Trace_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
        p, q = next(elbo._get_traces(ddpm.model, ddpm.guide, (data,), {}))
        total = 0.0
        for sign, trace in ((1, p), (-1, q)):
            trace.compute_log_prob()
            names = trace.stochastic_nodes + trace.observation_nodes
            total = total + sign * sum(
                trace.nodes[n]["log_prob"] for n in names if not n.endswith("plate")
            )
        return total

    with torch.no_grad():
        weights = log_weights(200)
    assert weights.shape == (200, 1500)
    bound = weights.mean(0).mean()
    tighter = (weights.logsumexp(0) - math.log(200)).mean()
    truth = denoiser.data().log_prob(data).mean()
    assert bound < tighter
    if steps == 1:
        return
    # 200 draws nearly close the gap that a point mass leaves (the model is not the data's law exactly).
    assert abs(tighter - truth) < 0.5 * abs(bound - truth)
    single = RenyiELBO(alpha=0, num_particles=5).loss(ddpm.model, ddpm.guide, data[:50])
    assert math.isfinite(single)


@every_kind
def test_predictive_and_generation(small: SmallDiffusion):
    context = {k: v.expand(4, *v.shape) for k, v in small.context.items()}
    ddpm = DDPM(small.denoiser(), small.event_shape, steps=3, decoder=small.decoder)
    for parallel in (False, True):
        draws = Predictive(ddpm.model, num_samples=5, parallel=parallel)(size=4, **context)
        for name in ("x", "x_t3", "x_t2", "x_t1", "x_t0"):
            assert draws[name].shape == (5, 4, *small.event_shape)
        assert len(draws["x"].unique(dim=0)) == 5
    assert ddpm.model(size=4, **context).shape == (4, *small.event_shape)
    with pytest.raises(ValueError, match="size: got None"):
        ddpm.model()


def test_predictive_draws_follow_the_data():
    denoiser = mixture()
    ddpm = DDPM(denoiser, (2,), times=uniform(60, F64))
    draws = Predictive(ddpm.model, num_samples=1)(size=4000)["x"].reshape(-1, 2)
    truth = denoiser.data()
    # Four standard errors of the mean and of the variance: four numbers, a false alarm in 3e-4 of seeds.
    error = (draws.var(0) / 4000).sqrt()
    assert ((draws.mean(0) - truth.mean).abs() <= 4 * error).all()
    spread = (draws - draws.mean(0)).square()
    assert ((spread.mean(0) - truth.variance).abs() <= 4 * spread.std(0) / 63 + 0.02).all()


def test_importance_recovers_the_evidence():
    denoiser = mixture()
    ddpm = DDPM(denoiser, (2,), times=uniform(20, F64))
    datum = torch.tensor([[0.9, 0.4]], dtype=F64)
    posterior = Importance(ddpm.model, ddpm.guide, num_samples=150).run(datum)
    estimate = posterior.get_log_normalizer()
    truth = denoiser.data().log_prob(datum)[0]
    assert estimate == pytest.approx(float(truth), abs=0.1)
    assert posterior.get_ESS() > 50


def chain_model(small: SmallDiffusion, denoiser, size: int = 3):
    def model():
        with pyro.plate("data", size):
            return pyro.sample("x", small(denoiser, steps=3))

    return poutine.reparam(model, config={"x": ChainReparam()})


@every_kind
def test_condition_replay_and_do(small: SmallDiffusion):
    denoiser = small.denoiser()
    model, data = chain_model(small, denoiser), small.data((3,))
    trace = poutine.trace(poutine.condition(model, {"x": data})).get_trace()
    assert trace.nodes["x"]["is_observed"] and trace.nodes["x"]["value"] is data
    assert trace.log_prob_sum().isfinite()
    conditioned = poutine.condition(model, {"x": data})
    again = poutine.trace(poutine.replay(conditioned, trace=trace)).get_trace()
    for j in range(4):
        assert again.nodes[f"x_t{j}"]["value"].equal(trace.nodes[f"x_t{j}"]["value"])
    latent = trace.nodes["x_t1"]["value"]
    held = poutine.trace(poutine.condition(model, {"x_t1": latent})).get_trace()
    assert held.nodes["x_t1"]["is_observed"] and not held.nodes["x_t0"]["is_observed"]
    cut = poutine.trace(poutine.do(model, {"x_t1": latent})).get_trace()
    assert cut.nodes["x"]["value"].shape == data.shape


@every_kind
def test_sites_shapes_and_order(small: SmallDiffusion):
    denoiser, size = small.denoiser(), 3
    trace = poutine.trace(chain_model(small, denoiser)).get_trace()
    names = [name for name in trace.nodes if name.startswith("x")]
    assert names == ["x_t3", "x_t2", "x_t1", "x_t0", "x"]
    trace.compute_log_prob()
    for name in names:
        assert trace.nodes[name]["log_prob"].shape == (size,)
        assert trace.nodes[name]["value"].shape == (size, *small.event_shape)
        assert not trace.nodes[name]["is_observed"]


@every_kind
def test_chain_inside_nested_plates_and_under_vectorized_particles(small: SmallDiffusion):
    denoiser, data = small.denoiser(), small.data((2, 3))

    def model():
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("x", small(denoiser, steps=3), obs=data)

    def guide():
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            forward_chain("x", small(denoiser, steps=3), data)

    chain = poutine.reparam(model, config={"x": ChainReparam()})
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=2)
    p, _ = next(elbo._get_traces(chain, guide, (), {}))
    assert p.nodes["x_t1"]["value"].shape == (5, 2, 3, *small.event_shape)
    assert math.isfinite(elbo.loss(chain, guide))


@every_kind
@pytest.mark.parametrize("outside", [True, False], ids=["around", "inside"])
def test_chain_under_to_event(small: SmallDiffusion, outside):
    denoiser, data = small.denoiser(), small.data((4, 2))

    def build():
        return small(denoiser, steps=3).expand((2,)).to_event(1)

    def model():
        with pyro.plate("data", 4):
            if outside:
                pyro.sample("x", build(), obs=data)
            else:
                with poutine.reparam(config={"x": ChainReparam()}):
                    pyro.sample("x", build(), obs=data)

    def guide():
        with pyro.plate("data", 4):
            forward_chain("x", build(), data)

    chain = poutine.reparam(model, config={"x": ChainReparam()}) if outside else model
    trace = poutine.trace(chain).get_trace()
    trace.compute_log_prob()
    for name in ("x_t3", "x_t0", "x"):
        assert trace.nodes[name]["log_prob"].shape == (4,)
        assert trace.nodes[name]["value"].shape == (4, 2, *small.event_shape)
    assert math.isfinite(Trace_ELBO().loss(chain, guide))


def test_chain_in_a_subsampled_plate_is_scaled():
    small, data = SMALL_DIFFUSIONS[0], SMALL_DIFFUSIONS[0].data((20,))
    denoiser = small.denoiser()
    ddpm = DDPM(denoiser, small.event_shape, steps=2)
    trace = poutine.trace(ddpm.model).get_trace(data, subsample_size=5)
    assert trace.nodes["x"]["value"].shape == (5, 3)
    assert all(trace.nodes[name]["scale"] == 4 for name in ("x", "x_t0", "x_t2"))
    index = trace.nodes["x_plate"]["value"]
    assert trace.nodes["x"]["value"].equal(data[index])
    # The guide's rows become the model's.
    guide = poutine.trace(ddpm.guide).get_trace(data, subsample_size=5)
    replayed = poutine.replay(ddpm.model, trace=guide)
    model = poutine.trace(replayed).get_trace(data, subsample_size=5)
    assert model.nodes["x"]["value"].equal(data[guide.nodes["x_plate"]["value"]])


def test_labels_are_subsampled_with_their_data():
    denoiser = conditional()
    label, data = torch.arange(12) % 3, torch.randn(12, 3)
    ddpm = DDPM(denoiser, (3,), steps=2)
    seen = []
    denoiser.network.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(kwargs["label"]), with_kwargs=True
    )
    trace = poutine.trace(ddpm.model).get_trace(data, subsample_size=4, label=label)
    index = trace.nodes["x_plate"]["value"]
    assert len(seen) == 3 and all(row.equal(label[index]) for row in seen)


def test_model_and_guide_conditionals_meet_in_closed_form():
    # The exact denoiser of one Gaussian: reverse kernels average the bridges, so each term is known.
    process = GaussianProcess(Cosine(3.0, -3.0))
    denoiser = MixtureDenoiser(process, torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), 1.0)
    law = Diffusion(denoiser, (2,), times=uniform(3, F64))
    data = torch.randn(5, 2, dtype=F64)

    def model():
        with pyro.plate("data", 5):
            data_law = reverse_chain("x", law)
            pyro.sample("x", data_law, obs=data)

    def guide():
        with pyro.plate("data", 5):
            forward_chain("x", law, data)

    q = poutine.trace(guide).get_trace()
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace()
    times = law.times
    x0 = data
    for j in (3, 2, 1):
        xt = q.nodes[f"x_t{j}"]["value"]
        bridge = process.bridge(xt, x0, times[j - 1], times[j])
        kernel = process.reverse(xt, denoiser(xt, times[j]), times[j - 1], times[j])
        node = f"x_t{j - 1}"
        torch.testing.assert_close(
            kl_divergence(q.nodes[node]["fn"], p.nodes[node]["fn"]), kl_divergence(bridge, kernel)
        )
    end = q.nodes["x_t3"]["fn"]
    torch.testing.assert_close(end.mean, process.schedule.alpha(times[3]) * x0)


def test_auxiliary_sites_need_no_counterpart():
    small = SMALL_DIFFUSIONS[0]
    denoiser, data = small.denoiser(), small.data((3,))

    def guide():
        with pyro.plate("data", 3):
            forward_chain("x", small(denoiser), data, auxiliary=True)

    trace = poutine.trace(guide).get_trace()
    assert all(
        trace.nodes[name]["infer"]["is_auxiliary"]
        for name in trace.stochastic_nodes
        if "_t" in name
    )

    def model():
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(3))

    assert math.isfinite(Trace_ELBO().loss(model, guide))


@pytest.mark.parametrize(
    ("fn", "found"),
    [
        (dist.Normal(0.0, 1.0), "Normal"),
        (dist.Normal(torch.zeros(2), 1.0).to_event(1), "Normal"),
        (SMALL_DIFFUSIONS[0]().mask(False), "MaskedDistribution"),
    ],
)
def test_reparam_refuses_other_distributions(fn, found):
    def model():
        return pyro.sample("x", fn)

    with pytest.raises(ValueError, match=f"site 'x' has a {found}, expected a Diffusion"):
        poutine.reparam(model, config={"x": ChainReparam()})()
    with pytest.raises(ValueError, match=f"diffusion: got {found}, expected a Diffusion"):
        reverse_chain("x", fn)


def test_the_chain_refuses_bad_data():
    ddpm = DDPM(SMALL_DIFFUSIONS[0].denoiser(), (3,), steps=2)
    with pytest.raises(ValueError, match="value: got 1 NaN"):
        ddpm.guide(torch.tensor([[0.0, torch.nan, 0.0]]))
    with pytest.raises(ValueError, match="x: got shape"):
        ddpm.guide(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="steps: got 0"):
        DDPM(SMALL_DIFFUSIONS[0].denoiser(), (3,), steps=0)
