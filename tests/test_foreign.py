"""Models trained elsewhere, in closed form: what a configuration says, and what is refused."""

import json
import math
import types

import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from torch import nn

from pyro_diffusion import Diffusion, ProbabilityFlow, checkpoint
from pyro_diffusion.checkpoint import CheckpointError
from pyro_diffusion.denoisers import VarianceDenoiser
from pyro_diffusion.distributions import DiffusionCTMC, QuantizedDecoder
from pyro_diffusion.evaluate import log_likelihood
from pyro_diffusion.foreign import (
    from_azula,
    from_diffusers,
    from_edm,
    from_masked_lm,
    from_score_sde,
    load_diffusers,
)
from pyro_diffusion.samplers import DDIM, simulate
from tests.test_documented_programs import programs

SPREAD = 0.6  # the data are normal with it; every network below is exact for them
STEPS = 50
TABLE = {"num_train_timesteps": STEPS, "beta_start": 1e-3, "beta_end": 0.2, "clip_sample": False}


def alphas_of(config):
    """Signal levels by the formula of the paper, apart from what is tested."""
    start, end = config["beta_start"], config["beta_end"]
    betas = torch.linspace(start, end, config["num_train_timesteps"], dtype=torch.float64)
    return (1 - betas).cumprod(0)


class Exact(nn.Module):
    """E[x_0 | x_t] of normal data as a network of timesteps, in any of the outputs of the field."""

    def __init__(self, scales, output, seen=None):
        super().__init__()
        self.scales, self.output, self.seen = scales, output, seen
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, timestep, shift=None):
        assert timestep.shape == (len(x),)
        if self.seen is not None:
            self.seen.append(timestep)
        alpha, sigma = (s.reshape(-1, *(1,) * (x.dim() - 1)).to(x) for s in self.scales(timestep))
        mean = alpha * SPREAD**2 * x / (alpha**2 * SPREAD**2 + sigma**2)
        if shift is not None:
            mean = mean + shift.reshape(-1, *(1,) * (x.dim() - 1))
        noise = (x - alpha * mean) / sigma
        out = {
            "sample": mean,
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * mean,
            "flow": noise - mean,
            "score": -noise / sigma,
        }[self.output]
        return types.SimpleNamespace(sample=out + self.weight.to(x))


def table_scales(config):
    alphas = alphas_of(config)

    def scales(timestep):
        """Linear in the log-SNR between the levels."""
        left = timestep.long().clamp(0, len(alphas) - 2)
        log_snr = torch.logit(alphas)
        where = torch.lerp(log_snr[left], log_snr[left + 1], timestep.double() - left)
        return torch.sigmoid(where).sqrt(), torch.sigmoid(-where).sqrt()

    return scales


def table_model(output="epsilon", **changes):
    config = {**TABLE, "prediction_type": output, **changes}
    return from_diffusers(Exact(table_scales(config), output), config, event_dim=1)


def mean_of(alpha, sigma, x):
    return alpha * SPREAD**2 * x / (alpha**2 * SPREAD**2 + sigma**2)


# --- tables of betas


@pytest.mark.parametrize("output", ["epsilon", "sample", "v_prediction"])
def test_every_output_is_the_same_mean(output):
    model, x = table_model(output), torch.linspace(-2, 2, 5).unsqueeze(-1)
    alphas = alphas_of(TABLE)
    for index in (0, 1, 17, STEPS - 1):
        signal, noise = float(alphas[index].sqrt()), float((1 - alphas[index]).sqrt())
        found = model(x, torch.tensor(index / (STEPS - 1))).mean
        torch.testing.assert_close(found, mean_of(signal, noise, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [10, 1000])
def test_the_tables_own_timesteps_are_whole_numbers(count):
    config = {**TABLE, "num_train_timesteps": count, "beta_end": 0.02}
    seen = []
    model = from_diffusers(Exact(table_scales(config), "epsilon", seen), config, event_dim=1)
    times = torch.linspace(0, 1, count)
    model(torch.ones(count, 1), times)
    assert torch.equal(seen[-1], torch.arange(count, dtype=torch.float32))
    model(torch.ones(count - 1, 1), (times[1:] + times[:-1]) / 2)
    middles = torch.arange(count - 1) + 0.5
    assert torch.allclose(seen[-1], middles, atol=0.01)
    levels = model.process.level(times, torch.ones(count, 1))
    torch.testing.assert_close(
        levels.alpha.squeeze(-1).double().square(), alphas_of(config), atol=1e-6, rtol=1e-4
    )


def reverse_step(model, index, x):
    """Mean and variance of a reverse step of the table."""
    t, s = (torch.tensor(i / (STEPS - 1), dtype=x.dtype) for i in (index, index - 1))
    kernel = model.process.reverse(x, model(x, t), s, t)
    return kernel.mean, kernel.variance


@pytest.mark.parametrize(
    "kind, share", [("fixed_small", 0.0), ("fixed_large", 1.0), ("learned_range", None)]
)
def test_reverse_steps_are_those_of_the_papers(kind, share):
    """Means and variances of arXiv 2006.11239 and 2102.09672, by their own formulas."""
    alphas, x = alphas_of(TABLE), torch.tensor([[-1.0], [0.3], [2.0]])
    head = torch.tensor([[-1.0], [0.2], [1.0]])

    class Headed(Exact):
        def forward(self, x, timestep):
            return torch.cat([super().forward(x, timestep).sample, head], 1)

    network = (Exact if kind != "learned_range" else Headed)(table_scales(TABLE), "epsilon")
    model = from_diffusers(network, {**TABLE, "variance_type": kind}, event_dim=1)
    assert isinstance(model, VarianceDenoiser) == (kind == "fixed_large")
    for index in (1, 20, STEPS - 1):
        now, before = float(alphas[index]), float(alphas[index - 1])
        beta = 1 - now / before
        least = beta * (1 - before) / (1 - now)
        part = (1 + head) / 2 if share is None else torch.tensor(share)
        expected = torch.exp(part * math.log(beta) + (1 - part) * math.log(least)).expand(3, 1)
        x0 = mean_of(now**0.5, (1 - now) ** 0.5, x)
        mean = (before**0.5 * beta * x0 + (now / before) ** 0.5 * (1 - before) * x) / (1 - now)
        found = reverse_step(model, index, x)
        torch.testing.assert_close(found[0], mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[1], expected, atol=1e-7, rtol=2e-3)
    first = model(x, torch.tensor(0.0))
    if share is None:
        beta, least = (
            1 - float(alphas[0]),
            (1 - float(alphas[1] / alphas[0])) * float((1 - alphas[0]) / (1 - alphas[1])),
        )
        expected = torch.exp(part * math.log(beta) + (1 - part) * math.log(least))
        torch.testing.assert_close(first.variance, expected, atol=1e-7, rtol=2e-3)


def test_clipping():
    x = torch.tensor([[-9.0], [0.1], [9.0]])
    for config, limit in [
        ({"clip_sample": True}, 1.0),
        ({"clip_sample": True, "clip_sample_range": 0.4}, 0.4),
    ]:
        found = table_model(**config)(x, torch.tensor(0.2)).mean
        torch.testing.assert_close(
            found, table_model()(x, torch.tensor(0.2)).mean.clamp(-limit, limit)
        )
        assert float(found.detach().abs().max()) == pytest.approx(limit)
    euler = {**TABLE, "_class_name": "EulerDiscreteScheduler"}
    del euler["clip_sample"]
    for config, clip in [(euler, None), ({**euler, "_class_name": "DDIMScheduler"}, 1.0)]:
        assert (
            from_diffusers(Exact(table_scales(TABLE), "epsilon"), config, event_dim=1).clip == clip
        )


@pytest.mark.parametrize("output", ["sample", "v_prediction"])
def test_zero_terminal_snr(output):
    model = table_model(output, rescale_betas_zero_snr=True)
    schedule = model.process.schedule
    assert schedule.log_snr_min == pytest.approx(math.log(2.0**-24), abs=1e-3)
    root = alphas_of(TABLE).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    found = schedule.alpha(torch.linspace(0, 1, STEPS, dtype=torch.float64))
    torch.testing.assert_close(found[:-1], root[:-1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "trained"]
)
def test_tables_by_name(name):
    config = {"num_train_timesteps": 1000, "beta_schedule": name}
    if name == "trained":
        config = {"trained_betas": torch.linspace(0.01, 0.1, 7).tolist()}
    model = from_diffusers(nn.Identity(), config)
    knots = model.process.schedule.knots
    u = torch.arange(1001, dtype=torch.float64) / 1000
    cosine = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    ends = {
        "linear": (1e-4, 0.02),
        "scaled_linear": (1e-4, 0.02),
        "squaredcos_cap_v2": (1 - float(cosine[1] / cosine[0]), 0.999),
        "sigmoid": (1e-4 + torch.tensor(-6.0).sigmoid().item() * 0.0199, None),
        "trained": (0.01, 0.1),
    }[name]
    alphas = torch.sigmoid(knots)
    assert 1 - float(alphas[0]) == pytest.approx(ends[0], rel=1e-3)
    if ends[1] is not None:
        assert 1 - float(alphas[-1] / alphas[-2]) == pytest.approx(ends[1], rel=1e-3)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid"])
def test_a_table_is_that_of_its_training_whatever_the_default_dtype(name):
    def knots():
        return from_diffusers(nn.Identity(), {"beta_schedule": name}).process.schedule.knots

    single, default = knots(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        double = knots()
    finally:
        torch.set_default_dtype(default)
    assert double.equal(single)


# --- likelihoods


def test_the_bound_is_the_formula_on_the_same_weights():
    """The table's chain by the formulas of the paper, summed over all of its levels; 5 standard errors."""
    model, value = table_model(variance_type="fixed_large"), torch.tensor([[0.4], [-1.1]])
    chain = Diffusion(model, (1,), steps=STEPS - 1)
    # x_t is one number, and the costs of an exact network are polynomials of it: quadrature is exact
    nodes, weights = (torch.from_numpy(v) for v in _hermite(20))
    alphas = alphas_of(TABLE)
    total = torch.zeros(2, dtype=torch.float64)
    x = value.squeeze(-1).double()
    for index in range(STEPS):
        now = float(alphas[index])
        xt = now**0.5 * x[:, None] + (1 - now) ** 0.5 * nodes
        x0 = mean_of(now**0.5, (1 - now) ** 0.5, xt)
        if index == 0:
            cost = -dist.Normal(x0, (1 - now) ** 0.5).log_prob(x[:, None])
        else:
            before = float(alphas[index - 1])
            beta = 1 - now / before
            least = beta * (1 - before) / (1 - now)
            gain = before**0.5 * beta / (1 - now)
            ratio = least / beta
            cost = 0.5 * (ratio - 1 - math.log(ratio) + gain**2 * (x[:, None] - x0) ** 2 / beta)
        total += (cost * weights).sum(-1)
    last = float(alphas[-1])
    prior = dist.Normal(last**0.5 * x, (1 - last) ** 0.5), dist.Normal(x.new_zeros(()), 1.0)
    total += torch.distributions.kl_divergence(*prior)
    torch.manual_seed(0)
    with torch.no_grad():
        rows = value.expand(2000, 2, 1)
        draws = sum(chain.bound_terms(rows, index) for index in range(STEPS + 1))
    error = draws.std(0) / len(draws) ** 0.5
    assert torch.all((draws.mean(0) - total).abs() < 5 * error), (draws.mean(0), total, error)
    assert float(error.max()) < 0.03


def _hermite(count):
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return nodes, weights / weights.sum()


FAMILIES = {
    "table": lambda: table_model("v_prediction"),
    "flow": lambda: from_diffusers(
        Exact(lambda t: (1 - t / 1000, t / 1000), "flow"),
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        event_dim=1,
    ),
    "ve": lambda: from_diffusers(
        Exact(lambda s: (torch.ones_like(s), s), "score"),
        {"_class_name": "ScoreSdeVeScheduler", "sigma_max": 50.0},
        event_dim=1,
    ),
    "edm": lambda: from_edm(
        Exact(lambda s: (torch.ones_like(s), s), "sample"), sigma_max=50.0, event_dim=1
    ),
    "score_sde": lambda: from_score_sde(Exact(vp_scales, "epsilon"), event_dim=1),
    "azula": lambda: from_azula(Azula(), event_dim=1, variance=True),
}


def vp_scales(labels):
    u = labels.double() / 999
    decay = 0.5 * u**2 * 19.9 + u * 0.1
    return torch.exp(-decay / 2), (-torch.expm1(-decay)).sqrt()


class Azula(nn.Module):
    """What azula's denoisers are: a schedule, and a posterior at a time of it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def schedule(self, t):
        """A variance-preserving schedule, alpha = 0.01^(t^2)."""
        alpha = torch.exp(math.log(1e-2) * t**2)
        return alpha, torch.sqrt(1 - alpha**2 + 1e-3**2)

    def forward(self, x_t, t, shift=None):
        assert t.shape in ((), (len(x_t),))
        alpha, sigma = (s.reshape(-1, 1).to(x_t) for s in self.schedule(t.double()))
        total = alpha**2 * SPREAD**2 + sigma**2
        mean = mean_of(alpha, sigma, x_t) + (0 if shift is None else shift[:, None])
        return types.SimpleNamespace(mean=mean, var=SPREAD**2 * sigma**2 / total)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_flow_has_the_density_of_the_data(name):
    """Every family is exact for normal data, up to what is left of noise at t = 0 and of data at t = 1."""
    model = FAMILIES[name]().double()
    flow = ProbabilityFlow(model, (1,))
    value = torch.tensor([[0.0], [0.5], [-1.2]], dtype=torch.float64)
    level = model.process.level(torch.tensor([0.0]).double(), value[:1])
    blurred = math.hypot(SPREAD, float(level.sigma / level.alpha))
    expected = dist.Normal(0.0, blurred).log_prob(value.squeeze(-1))
    torch.testing.assert_close(flow.log_prob(value), expected, atol=2e-2, rtol=1e-2)
    rows = torch.randn(4, 3, 1, dtype=torch.float64)
    times = torch.tensor([[0.2], [0.4], [0.6], [0.9]], dtype=torch.float64)
    whole = model(rows, times.expand(4, 3))
    torch.testing.assert_close(whole.mean[2], model(rows[2], torch.tensor(0.6).double()).mean)


@pytest.mark.parametrize("name", ["table", "score_sde", "azula"])
def test_context_reaches_the_network(name):
    model = FAMILIES[name]()
    shift, x, t = torch.tensor([0.0, 1.0, -1.0]), torch.zeros(3, 1), torch.tensor(0.5)
    moved = model(x, t, shift=shift.long()).mean - model(x, t).mean
    torch.testing.assert_close(moved.squeeze(-1), shift, atol=1e-4, rtol=1e-4)


def test_azula_without_a_variance_is_a_point_mass():
    model = from_azula(Azula(), event_dim=1)
    assert model.point_mass and model(torch.zeros(2, 1), 0.5).variance.eq(0).all()


def test_edm_schedulers_precondition():
    """c_skip x + c_out F(c_in x, log(sigma)/4), with the coefficients of arXiv 2206.00364."""

    class Third(nn.Module):
        def forward(self, x, timestep):
            return x / 3 + timestep[:, None]

    config = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.7, "prediction_type": "epsilon"}
    model = from_diffusers(Third(), config, event_dim=1)
    x, t = torch.tensor([[1.5]]), torch.tensor(0.6)
    sigma = float(model.process.schedule.sigma(t))
    total = sigma**2 + 0.7**2
    inner = x / total**0.5 / 3 + math.log(sigma) / 4
    expected = 0.49 / total * x + sigma * 0.7 / total**0.5 * inner
    torch.testing.assert_close(model(x, t).mean, expected, atol=1e-5, rtol=1e-5)


# --- masked language models


class Counts(nn.Module):
    """A masked language model that knows the tokens' frequencies alone; token 1 is the mask, 4 the pad."""

    def __init__(self, object_with_logits=True):
        super().__init__()
        self.wrap = object_with_logits
        self.logits = nn.Parameter(torch.tensor([0.5, 7.0, 0.3, 0.2, 9.0]).log())
        self.seen = []

    def forward(self, tokens):
        self.seen.append(tokens)
        out = self.logits.expand(*tokens.shape, 5)
        return types.SimpleNamespace(logits=out) if self.wrap else out


@pytest.mark.parametrize("wrap", [True, False])
def test_a_masked_language_model(wrap):
    network = Counts(wrap)
    model = from_masked_lm(network, vocabulary=5, mask_token=1, never=(4,))
    text = torch.tensor([[0, 2, 3, 0], [3, 3, 2, 0]])
    chain = DiffusionCTMC(model, (4,), steps=8)
    expected = torch.tensor([0.5, 0.0, 0.3, 0.2])[text].log().sum(-1)
    found = log_likelihood(chain, text, num_samples=60)
    assert torch.all((found.value - expected).abs() < 5 * found.standard_error + 1e-3)
    assert all(int(tokens.max()) < 5 for tokens in network.seen)
    draws = chain.sample((200,))
    assert set(draws.unique().tolist()) == {0, 2, 3}


# --- saved whole


def test_a_foreign_model_is_saved_whole(tmp_path):
    path = tmp_path / "model.safetensors"
    config = {**TABLE, "variance_type": "learned_range", "clip_sample": True}
    network = nn.Sequential(nn.Linear(2, 4))
    network.forward = lambda x, timestep: nn.Linear.forward(network[0], x)
    model = from_diffusers(network, config, event_dim=1)
    checkpoint.save_model(path, Diffusion(model, (2,), steps=3))
    other = checkpoint.load_model(path, network=network)
    assert torch.equal(other.denoiser.process.schedule.knots, model.process.schedule.knots)
    x = torch.ones(3, 2)
    assert torch.equal(other.denoiser(x, 0.4).variance, model(x, 0.4).variance)


@pytest.mark.parametrize("name", ["flow", "ve", "edm", "score_sde"])
def test_every_family_is_saved(tmp_path, name):
    path, model, x = tmp_path / "model.safetensors", FAMILIES[name](), torch.randn(3, 1)
    model.network.network.weight.data.fill_(0.1)
    checkpoint.save_model(path, model)
    network = FAMILIES[name]().network.network
    other = checkpoint.load_model(path, network=network)
    assert torch.equal(other(x, 0.4).mean, model(x, 0.4).mean)
    assert float(network.weight.detach()) == pytest.approx(0.1)


def test_a_masked_language_model_is_saved(tmp_path):
    path = tmp_path / "model.safetensors"
    model = from_masked_lm(Counts(), vocabulary=5, mask_token=1, never=(4,))
    checkpoint.save_model(path, DiffusionCTMC(model, (4,), steps=3))
    other = checkpoint.load_model(path, network=Counts())
    assert (other.denoiser.network.mask_token, other.denoiser.network.never) == (1, (4,))
    assert other.sample((2,)).shape == (2, 4)


def test_scales_without_a_name_are_no_part_of_a_file(tmp_path):
    with pytest.raises(
        ValueError, match=r"^model\.process\.schedule\.scales: got method, expected .*register"
    ):
        checkpoint.save_model(tmp_path / "a.safetensors", from_azula(Azula(), event_dim=1))


# --- folders


class Conv(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.layer = nn.Conv2d(1, width, 1)

    def forward(self, x, timestep):
        return (self.layer(x).mean(1, keepdim=True) * timestep[:, None, None, None] / 50,)


def folder(path, nested=True, network=None, config=None):
    """What save_pretrained writes."""
    network = Conv() if network is None else network
    places = (path / "unet", path / "scheduler") if nested else (path, path)
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    (places[0] / "config.json").write_text(json.dumps({"_class_name": "Conv"}))
    (places[1] / "scheduler_config.json").write_text(
        json.dumps(TABLE if config is None else config)
    )
    file = places[0] / "diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file(network.state_dict(), file)
    return network, file


@pytest.mark.parametrize("nested", [True, False])
def test_a_folder(tmp_path, nested):
    network, file = folder(tmp_path, nested)
    model = load_diffusers(tmp_path, network=Conv())
    assert not model.training
    x = torch.randn(2, 1, 3, 3)
    expected = from_diffusers(network, TABLE)(x, torch.tensor(0.3)).mean
    assert torch.equal(model(x, torch.tensor(0.3)).mean, expected)
    state = network.state_dict()
    parts = {f"part{i}.safetensors": {key: value} for i, (key, value) in enumerate(state.items())}
    for name, part in parts.items():
        safetensors.torch.save_file(part, file.parent / name)
    names = {key: name for name, part in parts.items() for key in part}
    file.unlink()
    index = file.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": names}))
    again = load_diffusers(str(tmp_path), network=Conv())
    assert torch.equal(again(x, torch.tensor(0.3)).mean, expected)
    for bad in ("../part0.safetensors", "/etc/x.safetensors", 3, "part0.bin"):
        index.write_text(json.dumps({"weight_map": {"layer.weight": bad}}))
        with pytest.raises(CheckpointError, match=r"weight_map .*expected files of this folder"):
            load_diffusers(tmp_path, network=Conv())


@pytest.mark.parametrize(
    "name", ["a.bin", "unet/b.pt", "deep/er/c.ckpt", "d.pkl", "e.pth", "F.BIN"]
)
def test_a_folder_with_a_pickle_is_refused(tmp_path, name):
    folder(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"got {name}, expected no pickles"):
        load_diffusers(tmp_path, network=Conv())


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(NotADirectoryError, match="no such folder"):
        load_diffusers(tmp_path / "none", network=Conv())
    network, file = folder(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"layer\.weight has shape \(2, 1, 1, 1\), expected \(3"
    ):
        load_diffusers(tmp_path, network=Conv(3))
    with pytest.raises(
        CheckpointError, match=r"_class_name: got 'Conv', expected one of UNet2DModel.*network="
    ):
        load_diffusers(tmp_path)
    cases = [
        ({"layer.weight": network.layer.weight.data}, r"misses layer\.bias"),
        ({**network.state_dict(), "x": torch.ones(1)}, "has unexpected x"),
        (
            {**network.state_dict(), "layer.bias": torch.tensor([0.0, math.nan])},
            r"layer\.bias has NaN",
        ),
    ]
    for state, error in cases:
        safetensors.torch.save_file(state, file)
        with pytest.raises(CheckpointError, match=error):
            load_diffusers(tmp_path, network=Conv())
    file.write_bytes(b"\x80\x02x")
    with pytest.raises(CheckpointError, match="got no readable safetensors"):
        load_diffusers(tmp_path, network=Conv())
    file.unlink()
    with pytest.raises(CheckpointError, match="got none, expected one file of safetensors"):
        load_diffusers(tmp_path, network=Conv())
    for text in ("[]", "{", ""):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"scheduler_config\.json: got"):
            load_diffusers(tmp_path, network=Conv())
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"got no scheduler_config\.json, expected scheduler"):
        load_diffusers(tmp_path, network=Conv())


# --- what cannot be read

UNREADABLE = [
    ({"_class_name": "KarrasVeScheduler"}, r"^_class_name: got 'KarrasVeScheduler', expected one of"),
    ({"_class_name": 3}, r"^_class_name: got 3"),
    ({"prediction_type": "x0"}, r"^prediction_type: got 'x0', expected one of 'epsilon'"),
    ({"prediction_type": ["epsilon"]}, r"^prediction_type: got \['epsilon'\]"),
    ({"beta_schedule": "square"}, r"^beta_schedule: got 'square'"),
    ({"variance_type": "learned"}, r"^variance_type: got 'learned', expected one of"),
    ({"variance_type": "fixed_large_log"}, r"^variance_type: got"),
    ({"thresholding": True}, r"^thresholding: got True, expected False"),
    ({"rescale_betas_zero_snr": True}, r"^rescale_betas_zero_snr: got True, expected False for epsilon"),
    ({"num_train_timesteps": 1}, r"^num_train_timesteps: got 1, expected an integer from 2"),
    ({"num_train_timesteps": 9.5}, r"^num_train_timesteps: got 9\.5"),
    ({"beta_start": -1e-4}, r"^beta_start: got -0\.0001, expected a number above 0"),
    ({"beta_end": 1.5}, r"^beta_end: got 1\.5, expected a number above 0 and below 1"),
    ({"beta_end": "0.02"}, r"^beta_end: got '0\.02'"),
    ({"beta_end": math.nan}, r"^beta_end: got nan"),
    ({"trained_betas": [0.1, 2.0]}, r"^trained_betas: got \[0\.1, 2\.0\], expected at least two"),
    ({"trained_betas": "linear"}, r"^trained_betas: got 'linear'"),
    ({"trained_betas": [0.1, None]}, r"^trained_betas: got"),
    ({"clip_sample": "yes"}, r"^clip_sample: got 'yes'"),
    ({"clip_sample_range": 0, "clip_sample": True}, r"^clip_sample_range: got 0"),
    ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, r"^prediction_type: got"),
    ({"_class_name": "EDMEulerScheduler", "sigma_data": 0}, r"^sigma_data: got 0"),
    ({"_class_name": "ScoreSdeVeScheduler", "sigma_min": None}, r"^sigma_min: got None"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, r"^invert_sigmas: got"),
    (3, r"^scheduler: got int, expected a mapping"),
]  # fmt: skip


@pytest.mark.parametrize("config, error", UNREADABLE)
def test_a_configuration_that_cannot_be_read(config, error):
    with pytest.raises(ValueError, match=error):
        from_diffusers(nn.Identity(), config if config == 3 else {**TABLE, **config})


class Still(nn.Module):
    def schedule(self, t):
        return torch.ones_like(t), torch.ones_like(t)


OTHERS = [
    (lambda: from_diffusers(len, TABLE), r"^network: got builtin_function_or_method, expected a module"),
    (lambda: from_edm(None), r"^network: got NoneType"),
    (lambda: from_edm(nn.Identity(), sigma_min=3.0, sigma_max=1.0), r"^sigma_min, sigma_max: got"),
    (lambda: from_score_sde(nn.Identity(), eps=0.5), r"^eps: got 0\.5"),
    (lambda: from_score_sde(nn.Identity(), beta_max=0.05), r"^beta_max: got 0\.05"),
    (lambda: from_azula(nn.Identity()), r"^denoiser: got a Identity without a schedule"),
    (lambda: from_azula(Still()), r"^schedule: got log-SNRs from 0 to 0"),
    (lambda: from_masked_lm(Counts(), 5, 5), r"^mask_token: got 5, expected a token id from 0 to 4"),
    (lambda: from_masked_lm(Counts(), 5, 1, never=(-1,)), r"^never: got -1"),
    (lambda: from_masked_lm(Counts(), 2, 1, never=(0,)), r"^never: got all 2 ids"),
    (lambda: from_masked_lm(Counts(), 6, 1)(torch.zeros(1, 4).long(), 0.5),
     r"^network: got logits of shape \(1, 4, 5\), expected \(1, 4, 6\)"),
    (lambda: table_model(variance_type="learned_range")(torch.zeros(3, 1), 0.5),
     r"^network: got an output of shape \(3, 1\), expected \(3, 2\)"),
]  # fmt: skip


@pytest.mark.parametrize("build, error", OTHERS)
def test_other_bad_input(build, error):
    with pytest.raises(ValueError, match=error):
        build()


def test_integers_and_samplers():
    """A foreign model of pixels has the likelihood of integers, and every sampler."""
    model = table_model(clip_sample=True)
    chain = Diffusion(model, (1,), steps=STEPS - 1, decoder=QuantizedDecoder(8), sampler=DDIM())
    assert set(chain.sample((50,)).unique().tolist()) <= set(range(8))
    x = simulate(model, torch.linspace(0, 1, 9), torch.randn(400, 1), DDIM())
    assert 0.4 < float(x.detach().std()) < 0.8


def test_the_programs_of_the_page_run(monkeypatch):
    model = from_diffusers(Conv(), TABLE)
    monkeypatch.setattr("pyro_diffusion.foreign.load_diffusers", lambda folder: model)
    saved = {}
    monkeypatch.setattr("pyro_diffusion.foreign.save_diffusers", saved.__setitem__)
    source = "\n".join(programs("docs/foreign_models.md"))
    source = source.replace("28", "4").replace("14", "2").replace("steps=999", "steps=3")
    assert source.count("steps=100") == 1 and source.count("range(8)") == 1
    source = source.replace("steps=100", "steps=2").replace("range(8)", "range(1)")
    namespace = {
        "images": torch.randint(256, (2, 1, 4, 4)),
        "x": torch.randn(2, 1, 4, 4),
        "y": torch.zeros(1, 4, 2),
    }
    with torch.no_grad():
        exec(source, namespace)
    assert namespace["samples"].shape == (16, 1, 4, 4)
    assert namespace["bound"].value.isfinite().all() and namespace["density"].isfinite().all()
    assert namespace["posterior"][0].shape == (1, 4, 4)
    assert saved == {"ddpm-digits-tuned": model}
