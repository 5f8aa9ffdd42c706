"""A model is one file: every part by its name and arguments, with its weights, built again without code."""

import io
import json
import subprocess
import sys

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from pyro.nn.module import to_pyro_module_
from torch import nn

from pyro_diffusion import checkpoint
from pyro_diffusion.checkpoint import CheckpointError, load_model, register, save_model
from pyro_diffusion.checkpoint.building import Builder, Describer
from pyro_diffusion.denoisers import (
    NPR,
    CategoricalDenoiser,
    Denoiser,
    EDMPreconditioning,
    GaussianDenoiser,
    LearnedVariance,
    MixtureDenoiser,
    VarianceDenoiser,
    unit_variance,
)
from pyro_diffusion.distributions import (
    BasisDecoder,
    Dequantization,
    Diffusion,
    DiffusionCTMC,
    DiffusionSDE,
    ProbabilityFlow,
    QuantizedDecoder,
    Simple,
)
from pyro_diffusion.dynamics import Hutchinson, ODESolver, SDESolver
from pyro_diffusion.guidance import ClassifierFreeGuidance
from pyro_diffusion.nn import MLP, LabelContext, TensorContext, Transformer, UNet
from pyro_diffusion.optim import EMA
from pyro_diffusion.processes import (
    Absorbing,
    AnyNoise,
    Basis,
    Blurring,
    DegradedGaussian,
    GaussianProcess,
)
from pyro_diffusion.samplers import DDIM, AnnealedLangevin, PredictorCorrector, UniPC
from pyro_diffusion.schedules import (
    EDM,
    Cosine,
    LearnedSchedule,
    Rectified,
    TabulatedBetas,
    quadratic,
)
from tests.test_definitions import DEFINITIONS

LABELS = {"y": LabelContext(3, 4, dropout=0.5), "z": TensorContext(2, 4)}


def randomized(module):
    """Weights that no constructor gives."""
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)
    return module


def gaussian(network=None, schedule=None, event_dim=1, **options):
    process = GaussianProcess(schedule or Cosine(), event_dim=event_dim)
    return randomized(GaussianDenoiser(network or MLP(2, hidden=(4,)), process, **options))


def symbols():
    network = Transformer(4, 3, width=8, depth=1, heads=2, outputs=3)
    return randomized(CategoricalDenoiser(network, Absorbing(Rectified.full(), 3)))


def two_networks():
    base = gaussian().requires_grad_(False)
    return randomized(VarianceDenoiser(base, NPR(3.0), MLP(2, hidden=(4,)), show_noise=False))


def on_images():
    basis = Basis.dct((4, 4), dims=2)
    network = UNet(1, width=8, levels=(1,), attention=False, outputs=2)
    process = Blurring(Cosine(), Basis.dct((1, 4, 4), dims=2), sigma_max=2.0)
    del basis
    return randomized(GaussianDenoiser(network, process, variance=LearnedVariance(3.0)))


def bounded_data():
    chain = Diffusion(gaussian(), (2,), steps=3)
    parts = [
        transforms.AffineTransform(torch.ones(2), 2.0, event_dim=1),
        transforms.LowerCholeskyAffine(torch.ones(2), 0.5 + torch.eye(2).tril()),
        transforms.Permute(torch.tensor([1, 0])),
        transforms.SigmoidTransform(),
    ]
    return dist.TransformedDistribution(chain, parts)


# Whole models: parts of every kind, in the places that they take.
MODELS = {
    "denoiser": lambda: gaussian(parameterization=EDMPreconditioning(0.7), schedule=EDM(0.01, 20.0)),
    "chain": lambda: Diffusion(gaussian(), (2,), times=quadratic(4), sampler=DDIM(0.5)),
    "labels": lambda: Diffusion(
        gaussian(MLP(2, hidden=(4,), context=LABELS), context_event_dims={"z": 1}),
        (2,), steps=3, context={"y": torch.tensor([0, 2]), "z": torch.ones(2)}, sampler=UniPC(2),
    ),
    "langevin": lambda: Diffusion(gaussian(), (2,), steps=3, sampler=AnnealedLangevin(0.2, 1)),
    "corrected": lambda: Diffusion(gaussian(), (2,), 3, sampler=PredictorCorrector(DDIM())),
    "sde": lambda: DiffusionSDE(
        gaussian(schedule=LearnedSchedule(3)), (2,), solver=SDESolver("heun", steps=4)
    ),
    "regression": lambda: Diffusion(gaussian(), (2,), 3, objective=Simple()),
    "flow": lambda: ProbabilityFlow(
        gaussian(), (2,), solver=ODESolver("rk4", steps=4), trace=Hutchinson(2, seed=3)
    ),
    "symbols": lambda: Diffusion(symbols(), (3,), steps=3),
    "jumps": lambda: DiffusionCTMC(symbols(), (3,), steps=3),
    "two networks": two_networks,
    "function": lambda: VarianceDenoiser(gaussian(schedule=TabulatedBetas([0.1, 0.2, 0.3])), unit_variance),
    "blurred images": lambda: Diffusion(
        on_images(), (1, 4, 4), steps=3, decoder=BasisDecoder(Basis.dct((1, 4, 4), dims=2))
    ),
    "integers": lambda: Diffusion(gaussian(), (2,), steps=3, decoder=QuantizedDecoder(8)),
    "transformed": bounded_data,
    "dequantized": lambda: dist.TransformedDistribution(
        ProbabilityFlow(gaussian(), (2,), solver=ODESolver("rk4", steps=4)), [Dequantization(1)]
    ),
    "noise": lambda: gaussian().__class__(MLP(2), AnyNoise(Cosine(), dist.Laplace(0.0, 0.7))),
    "free guidance": lambda: ClassifierFreeGuidance(
        gaussian(MLP(2, hidden=(4,), context={"y": LabelContext(3, 4)})), 2.0
    ),
    "closed form": lambda: MixtureDenoiser(
        GaussianProcess(Cosine()), torch.ones(2), torch.eye(2), torch.tensor(0.1)
    ),
}  # fmt: skip


def denoiser_of(model):
    while type(model) is dist.TransformedDistribution:
        model = model.base_dist
    return model if isinstance(model, Denoiser) else model.denoiser


def draws(model):
    """What a model says: samples, or the moments of a denoiser's posterior."""
    torch.manual_seed(1)
    if not isinstance(model, Denoiser):
        return model.sample((2,))
    context = {"y": torch.tensor([0, 1, 2])} if isinstance(model, ClassifierFreeGuidance) else {}
    posterior = model(torch.randn(3, 2), torch.tensor([0.1, 0.5, 0.9]), **context)
    return torch.stack([posterior.mean, posterior.variance])


@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_comes_back(tmp_path, name):
    model = MODELS[name]()
    denoiser_of(model).eval()
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    other = load_model(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(other) is type(model)
    assert torch.equal(draws(other), draws(model))
    one, two = denoiser_of(model), denoiser_of(other)
    for part, copy in zip(one.modules(), two.modules(), strict=True):
        assert type(copy) is type(part) and not copy.training
        if hasattr(part, "definition"):
            assert copy.definition() == part.definition()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q) and p.dtype == q.dtype and p.requires_grad == q.requires_grad


@pytest.mark.parametrize("module", [m for m, _ in DEFINITIONS], ids=lambda m: type(m).__name__)
def test_every_public_class_is_built_again_by_its_arguments(module):
    if isinstance(module, DegradedGaussian):
        register(module.operator)
    describer = Describer()
    parts = describer.describe(module, "it")
    assert list(describer.roots) == ["it"] and describer.network is None
    other = Builder(None, lambda root, where: None).build(parts, "it")
    assert other is not module and other.definition() == module.definition()
    assert other.state_dict().keys() == module.state_dict().keys()


def test_a_fresh_process_samples_in_three_lines(tmp_path):
    path = tmp_path / "model.safetensors"
    model = MODELS["chain"]()
    save_model(path, model)
    program = (
        "import torch; torch.manual_seed(1)\n"
        "from pyro_diffusion import checkpoint\n"
        f"model = checkpoint.load_model({str(path)!r})\n"
        "print(model.sample((2,)).tolist())"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), draws(model), atol=1e-5)


def test_dtypes_modes_and_frozen_parts(tmp_path):
    path = tmp_path / "model.safetensors"
    model = gaussian(MLP(2, hidden=(4,), dropout=0.5)).double().train()
    model.network.last.requires_grad_(False)
    save_model(path, model)
    assert model.training and not model.network.last.weight.requires_grad
    other = load_model(path)
    assert other.network.last.weight.dtype == torch.float64 and not other.training
    assert (
        not other.network.last.weight.requires_grad
        and other.network.modulation.weight.requires_grad
    )
    assert torch.equal(other.network.last.weight, model.network.last.weight)
    save_model(path, gaussian().to(torch.bfloat16))
    other = load_model(path)
    assert other.network.last.weight.dtype == torch.bfloat16
    assert other(torch.zeros(2), 0.5).mean.dtype == torch.float32


def test_what_is_shared_stays_shared(tmp_path):
    path = tmp_path / "model.safetensors"
    network = MLP(2, hidden=(4,))
    base = gaussian(network)
    save_model(path, randomized(VarianceDenoiser(base, NPR(), network)))
    other = load_model(path)
    assert other.network is other.denoiser.network
    assert other.process is other.denoiser.process


def test_averaged_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    model = gaussian()
    ema = EMA(model, decay=0.9)
    average = model.network.last.weight.detach().clone()
    randomized(model)
    with ema.average_parameters():
        save_model(path, model)
    assert torch.equal(load_model(path).network.last.weight, average)
    assert not torch.equal(model.network.last.weight, average)


def test_a_network_of_pyro_modules_comes_back_as_the_plain_one(tmp_path):
    path = tmp_path / "model.safetensors"
    model = gaussian()
    to_pyro_module_(model.network)
    save_model(path, model)
    assert type(load_model(path).network) is MLP


# --- classes of the user's own


@register
class Wide(nn.Module):
    """A network as users write them: its arguments are kept nowhere."""

    def __init__(self, size, *, width=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(size, width), nn.Linear(width, size))

    def forward(self, x, log_snr):
        return self.layers(x)


@register
class Steep(Cosine):
    def __init__(self, power=1.0, **options):
        super().__init__(**options)
        self.power = power


class Unknown(Wide):
    pass


def test_registered_classes(tmp_path):
    path = tmp_path / "model.safetensors"
    model = gaussian(Wide(2, width=5), Steep(2.0, shift=0.5))
    save_model(path, model)
    other = load_model(path)
    assert type(other.network) is Wide and torch.equal(draws(other), draws(model))
    schedule = other.process.schedule
    assert type(schedule) is Steep and (schedule.power, schedule.shift) == (2.0, 0.5)


def test_a_network_of_an_unknown_class_is_given(tmp_path):
    path = tmp_path / "model.safetensors"
    model = Diffusion(gaussian(Unknown(2)).eval(), (2,), steps=3)
    save_model(path, model)
    with pytest.raises(
        CheckpointError, match=r"model\.denoiser\.network: got a network of class 'Unknown'"
    ):
        load_model(path)
    network = Unknown(2)
    other = load_model(path, network=network)
    assert other.denoiser.network is network
    assert torch.equal(draws(other), draws(model))
    before = network.state_dict()["layers.0.weight"].clone()
    with pytest.raises(
        CheckpointError, match=r"network\.layers\.0\.weight has shape \(3, 2\), expected \(4, 2\)"
    ):
        load_model(path, network=Unknown(2, width=4))
    with pytest.raises(TypeError, match="network: got type, expected a module"):
        load_model(path, network=Unknown)
    assert torch.equal(network.state_dict()["layers.0.weight"], before)
    save_model(path, gaussian())
    with pytest.raises(CheckpointError, match=r"network: got a Unknown, expected none"):
        load_model(path, network=network)


@pytest.mark.parametrize("value", [3, lambda x: x, Wide(2)])
def test_register_wants_a_name(value):
    with pytest.raises(
        TypeError, match=r"(?s)value: got .*expected a class or a function with a name"
    ):
        register(value)


# --- what is refused


class Local(Cosine):
    pass


class Compiled(nn.Module):
    """What torch.compile returns, as far as it matters here."""

    def __init__(self):
        super().__init__()
        self._orig_mod = MLP(2)

    def forward(self, *inputs):
        return self._orig_mod(*inputs)


def changed():
    model = gaussian()
    model.variance = LearnedVariance()
    return model


def spoilt(value):
    model = gaussian()
    model.network.last.weight.data[0, 1] = value
    return model


def weight(level):
    return 1.0


NOT_SAVED = [
    (lambda: nn.Linear(2, 2), r"^model: got Linear, expected a denoiser"),
    (lambda: dist.Normal(0.0, 1.0), r"^model: got Normal, expected a denoiser"),
    (lambda: MODELS["chain"]().expand((5,)), r"^model: got the expanded batch shape \(5,\)"),
    (lambda: gaussian(schedule=Local()), r"^model\.process\.schedule: got Local, expected .*register"),
    (lambda: VarianceDenoiser(gaussian(), weight), r"^model\.variance: got weight, expected .*register"),
    (lambda: VarianceDenoiser(gaussian(Unknown(2)), NPR(), Unknown(2)),
     r"^model\.network: got a Unknown beside a Unknown at model\.denoiser\.network"),
    (changed, r"^model: of another GaussianDenoiser: variance: got .*LearnedVar.*expected None.*changed"),
    (lambda: gaussian(Compiled()), r"^model\.network: got what torch\.compile returned"),
    (lambda: spoilt(torch.nan), r"^model: got model: network\.last\.weight with 1 NaN or infinite of 8"),
    (lambda: spoilt(torch.inf), r"network\.last\.weight with 1 NaN or infinite"),
]  # fmt: skip


@pytest.mark.parametrize("build, error", NOT_SAVED)
def test_what_would_not_come_back_is_not_saved(tmp_path, build, error):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=error):
        save_model(path, build())
    assert not path.exists()


def edited(path, edit):
    """A file of a model, with its state changed by hand."""
    save_model(path, Diffusion(gaussian(), (2,), steps=3, decoder=QuantizedDecoder(8)))
    state = checkpoint.load(path)
    edit(state, state["model"]["parts"]["arguments"], state["weights"]["model.denoiser"])
    checkpoint.save(path, state)


def with_class(name):
    return lambda state, parts, weights: parts["denoiser"]["arguments"]["network"].update(
        {"class": name}
    )


def put(where, key, value):
    def edit(state, parts, weights):
        {
            "state": state,
            "model": state["model"],
            "parts": parts,
            "weights": weights,
            "mlp": parts["denoiser"]["arguments"]["network"]["arguments"],
        }[where][key] = value

    return edit  # fmt: skip


def without(key):
    return lambda state, parts, weights: weights.pop(key)


EDITS = [
    (with_class("Missing"), r"model\.denoiser\.network: got the class 'Missing', expected .*register"),
    (with_class("os.system"), "got the class 'os.system', expected"),
    (with_class("pyro_diffusion.nn.MLP"), r"got the class 'pyro_diffusion\.nn\.MLP', expected"),
    (with_class("nn.UNet"), r"network: got arguments event_size.*missing a required.*expected UNet"),
    (with_class("denoisers.unit_variance"), "got the class 'denoisers.unit_variance', expected"),
    (put("model", "version", 2), "model: got version 2, expected 1$"),
    (put("model", "version", "1"), "model: got version '1', expected 1$"),
    (put("model", "frozen", {"model.denoiser": "network"}), r"model\.denoiser: got 'network' as frozen"),
    (put("model", "frozen", {"model.denoiser": ["x"]}), r"model\.denoiser: got \['x'\] as frozen"),
    (put("model", "frozen", {}), r"model\.denoiser: got None as frozen"),
    (put("mlp", "hidden", (2,) * 30), r"denoiser: of another .*; and \d+ more$"),
    (put("weights", "network.last.bias", torch.ones(2).long()), r"last\.bias has torch\.int64, expected"),
    (put("weights", "network.last.bias", torch.ones(2).bool()), r"last\.bias has torch\.bool, expected"),
    (put("model", "parts", 3), "got no model, expected a file of save_model"),
    (put("state", "model", None), "got no model, expected a file of save_model"),
    (put("mlp", "later", 1), "network: got arguments .*unexpected.*'later'.*of this version"),
    (put("mlp", "event_size", 0), r"network: refused by MLP: event_size: got 0"),
    (put("mlp", "context", {"mapping": {"y": {"class": "nn.DiT", "arguments": {"channels": 1}}}}),
     r"network: refused by MLP: .*no attribute 'features'"),
    (put("mlp", 3, 3), r"network: got arguments .*must be strings"),
    (put("mlp", "event_size", "two"), r"network: refused by MLP: event_size: got 'two'"),
    (put("mlp", "hidden", (5,)), r"network\.layers\.0\.weight has shape \(4, 2\), expected \(5, 2\)"),
    (put("parts", "sampler", {"class": "samplers.DDIM"}), r"model\.sampler: got the entry .*expected a part"),
    (put("parts", "sampler", {"same": "elsewhere"}), r"model\.sampler: got the entry .*expected a part"),
    (put("parts", "sampler", 3), r"model: refused by Diffusion: sampler: got 3"),
    (put("parts", "denoiser", {"function": "samplers.DDIM"}), r"got the function 'samplers\.DDIM'"),
    (without("network.last.weight"), r"model\.denoiser: of another Gaussian.*: misses network\.last\.w"),
    (put("weights", "more", torch.ones(1)), r"has unexpected more"),
    (put("weights", "network.last.bias", torch.ones(3)), r"last\.bias has shape \(3,\), expected \(2,\)"),
    (put("weights", "network.last.bias", torch.ones(2).long() * 1j), r"last\.bias has torch\.complex64"),
    (put("weights", "network.last.bias", torch.tensor([torch.nan, 0])), r"bias with 1 NaN or infinite of 2"),
    (put("weights", "network.last.bias", 3), r"last\.bias has shape int"),
    (lambda state, *_: state["weights"].pop("model.denoiser"), r"model\.denoiser: got no weights"),
    (lambda state, *_: state["weights"].update({"model.x": {}}), r"model\.x: got weights, expected none"),
]  # fmt: skip


@pytest.mark.parametrize("edit, error", EDITS)
def test_a_file_that_is_no_such_model_is_refused(tmp_path, edit, error):
    path = tmp_path / "model.safetensors"
    edited(path, edit)
    with pytest.raises(CheckpointError, match=error) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("device", ["gpu", 3.5, "cuda:99"])
def test_a_device_that_there_is_not_is_named(tmp_path, device):
    save_model(tmp_path / "model.safetensors", gaussian())
    with pytest.raises(ValueError, match=r"^device: got .*, expected one that torch has"):
        load_model(tmp_path / "model.safetensors", device=device)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save_module(path, gaussian())
    with pytest.raises(CheckpointError, match="got no model, expected a file of save_model"):
        load_model(path)
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none")
    for zipped in (True, False):
        stream = io.BytesIO()
        torch.save({"x": torch.ones(1)}, stream, _use_new_zipfile_serialization=zipped)
        path.write_bytes(stream.getvalue())
        with pytest.raises(CheckpointError, match="got a pickle"):
            load_model(path)
