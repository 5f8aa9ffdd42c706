"""What defines a model travels with its state dict, and is compared when that is loaded."""

import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn.module import to_pyro_module_
from torch import nn

import pyro_diffusion
from pyro_diffusion import checkpoint
from pyro_diffusion.checkpoint import CheckpointError
from pyro_diffusion.checkpoint.saving import restore_module
from pyro_diffusion.denoisers import (
    NPR,
    SN,
    CategoricalDenoiser,
    ComposedDenoiser,
    Data,
    EDMPreconditioning,
    EstimatedVariance,
    FourierDenoiser,
    GaussianDenoiser,
    InsertionDenoiser,
    LearnedVariance,
    LevelsDenoiser,
    MixtureDenoiser,
    Noise,
    NormalDenoiser,
    SpectralDenoiser,
    StringTableDenoiser,
    TableDenoiser,
    TimeVariance,
    VarianceDenoiser,
    unit_variance,
)
from pyro_diffusion.distributions import (
    BasisDecoder,
    CategoricalDecoder,
    NormalDecoder,
    OrderAgnostic,
    QuantizedDecoder,
)
from pyro_diffusion.nn import (
    MADE,
    MLP,
    NADE,
    ConditionalMLP,
    DiT,
    ImageEncoder,
    LabelContext,
    SeriesEncoder,
    SetEncoder,
    SetTransformer,
    SiteTransformer,
    TensorContext,
    Transformer,
    UNet,
)
from pyro_diffusion.nn.definition import DefinedModule
from pyro_diffusion.optim import EMA
from pyro_diffusion.processes import (
    Absorbing,
    AnyNoise,
    Basis,
    Blurring,
    CategoricalProcess,
    CoupledGaussian,
    DegradedGaussian,
    Deletion,
    DiscretizedGaussian,
    GaussianProcess,
    LearnedSpectralGaussian,
    SpectralGaussian,
    StudentTProcess,
    TransitionMatrix,
    Uniform,
    VaryingNoise,
)
from pyro_diffusion.schedules import (
    EDM,
    Cosine,
    LearnedSchedule,
    LinearBeta,
    LogLinear,
    Rectified,
    SubVP,
    TabulatedBetas,
    VarianceExploding,
)

KNOTS = torch.linspace(-5, 5, 4)
PLANE = Basis.dct((2,), dims=1)
ENDS = {"log_snr_max": 10.0, "log_snr_min": -10.0}


def gaussian(schedule=None, **options):
    outputs = 2 if isinstance(options.get("variance"), LearnedVariance) else 1
    network = MLP(2, hidden=(4,), outputs=outputs)
    return GaussianDenoiser(network, GaussianProcess(schedule or Cosine()), **options)


def mixture(**options):
    process = GaussianProcess(Cosine())
    return MixtureDenoiser(process, torch.ones(2), torch.eye(2), 0.1, **options)


def normal():
    return NormalDenoiser(GaussianProcess(Cosine()), torch.zeros(2), torch.eye(2))


def halved(x0, t):
    return x0 / (1 + t)


# What a model is, and what its definition says of it.
DEFINITIONS = [
    (Cosine(shift=1.0), {**ENDS, "shift": 1.0}),
    (LogLinear(7, -7), {"log_snr_max": 7.0, "log_snr_min": -7.0}),
    (LinearBeta(0.2, 10), {"beta_min": 0.2, "beta_max": 10.0, "log_snr_max": 10.0}),
    (SubVP(0.2, 10), {"beta_min": 0.2, "beta_max": 10.0, "log_snr_max": 10.0}),
    (VarianceExploding(1.0, math.e), {"log_snr_max": 0.0, "log_snr_min": -2.0}),
    (EDM(1.0, math.e, rho=3), {"log_snr_max": 0.0, "log_snr_min": -2.0, "rho": 3.0}),
    (Rectified.full(), {"log_snr_max": math.inf, "log_snr_min": -math.inf}),
    (LearnedSchedule(4), ENDS),
    (TabulatedBetas([0.1, 0.2]), {}),  # the table is a buffer
    (GaussianProcess(Cosine(), event_dim=3), {"event_dim": 3, "schedule": {"module": "Cosine"}}),
    (CoupledGaussian(Cosine(), event_dim=2), {"event_dim": 2}),
    (
        StudentTProcess(Cosine(), 3.0, event_dim=2),
        {"degrees_of_freedom": 3.0, "event_dim": 2, "schedule": {"module": "Cosine"}},
    ),
    (AnyNoise(Cosine(), dist.Laplace(0.0, 1.0), event_dim=2), {"event_dim": 2}),
    (DegradedGaussian(Cosine(), halved, sigma=0.1, renewal=1.0), {"sigma": 0.1, "renewal": 1.0}),
    (Basis.dct((2, 3)), {"event_shape": [2, 3]}),
    (SpectralGaussian(Cosine(), PLANE), {"basis": {"module": "Basis"}}),
    (Blurring(Cosine(), PLANE, 3.0, 0.1), {"sigma_max": 3.0, "d_min": 0.1}),
    (LearnedSpectralGaussian(LogLinear(), PLANE), {"schedule": {"module": "LogLinear"}}),
    (SpectralDenoiser(MLP(2), SpectralGaussian(Cosine(), PLANE)), {"variance": None}),
    (BasisDecoder(PLANE), {"decoder": {"module": "NormalDecoder"}}),
    (Absorbing(Cosine(), 3), {"states": 3, "event_dim": 1, "schedule": {"module": "Cosine"}}),
    (Uniform(Cosine(), 3), {"states": 3, "event_dim": 1}),
    (CategoricalProcess(Cosine(), 2, torch.tensor([0.5, 0.5])), {"states": 2, "event_dim": 1}),
    (TransitionMatrix(Cosine(), 2, torch.ones(2, 2)), {"states": 2, "event_dim": 1}),
    (VaryingNoise(Cosine(), 2, torch.ones(2, 3) / 3), {"states": 2, "event_dim": 1}),
    (Deletion(Rectified.full(), 4), {"symbols": 4, "schedule": {"module": "Rectified"}}),
    (
        InsertionDenoiser(MLP(2), Deletion(Rectified.full(), 4)),
        {"process": {"module": "Deletion"}, "context_event_dims": {}},
    ),
    (
        StringTableDenoiser(Deletion(Rectified.full(), 1), torch.tensor([[0.5, 0.2], [0, 0.3]])),
        {"process": {"module": "Deletion"}},
    ),
    (DiscretizedGaussian(Cosine(), 4, 2.0), {"states": 4, "width": 2.0, "event_dim": 1}),
    (
        gaussian(parameterization=EDMPreconditioning(2.0), context_event_dims={"y": 2}),
        {
            "process": {"module": "GaussianProcess"},
            "parameterization": {"class": "EDMPreconditioning", "sigma_data": 2.0},
            "variance": None,
            "context_event_dims": {"y": 2},
        },
    ),
    (gaussian(variance=LearnedVariance()), {"variance": {"module": "LearnedVariance"}}),
    (FourierDenoiser(MLP(2), GaussianProcess(Cosine()), 3, 1.5), {"degree": 3, "scale": 1.5}),
    (LevelsDenoiser(MLP(2), GaussianProcess(Cosine()), KNOTS), {"context_event_dims": {}}),
    (CategoricalDenoiser(MLP(2), Uniform(Cosine(), 2)), {"process": {"module": "Uniform"}}),
    (mixture(), {"process": {"module": "GaussianProcess"}}),
    (normal(), {"process": {"module": "GaussianProcess"}}),
    (
        ComposedDenoiser(normal(), {}, torch.eye(2)[None], normal(), torch.eye(2)),
        {"denoiser": {"module": "NormalDenoiser"}, "prior": {"module": "NormalDenoiser"}},
    ),
    (TableDenoiser(Uniform(Cosine(), 2), torch.ones(2, 2)), {"process": {"module": "Uniform"}}),
    (
        VarianceDenoiser(mixture(), unit_variance),
        {"variance": {"function": "unit_variance"}, "show_noise": False},
    ),
    (LearnedVariance(3), {"limit": 3.0}),
    (TimeVariance(KNOTS), {}),
    (EstimatedVariance(KNOTS), {}),
    (NPR(4.0), {"limit": 4.0}),
    (SN(skip=False, largest=2.0), {"skip": False, "largest": 2.0}),
    (NormalDecoder(), {}),
    (QuantizedDecoder(8, 0, 1), {"levels": 8, "low": 0.0, "high": 1.0}),
    (CategoricalDecoder(5), {"states": 5}),
    (Transformer(4, 3, width=8, depth=1, heads=2), {"heads": 2, "states": 4, "length": 3}),
    (MLP(3, (4,), frequencies=(1, 2)), {"event_size": 3, "frequencies": [1.0, 2.0], "norm": False}),
    (ConditionalMLP(3, 2, width=4), {"event_size": 3, "context_size": 2, "depth": 3}),
    (UNet(1, width=8, levels=(1, 2)), {"levels": [1, 2], "attention": [1]}),
    (DiT(1, patch=2, width=8, depth=1, heads=2), {"patch": 2, "heads": 2, "channels": 1}),
    (
        SetTransformer(3, width=8, depth=1, heads=2),
        {"event_size": 3, "heads": 2, "frequencies": []},
    ),
    (MADE(2, (3,), skip=True), {"hidden": [3], "states": 2, "skip": True, "orders": [[0, 1]]}),
    (NADE(2, 3, 4), {"hidden": 3, "states": 4, "orders": [[0, 1]], "context_size": 0}),
    (
        OrderAgnostic(CategoricalDenoiser(MLP(2), Absorbing(Cosine(), 2)), 2),
        {"size": 2, "denoiser": {"module": "CategoricalDenoiser"}, "orders": [[0, 1]]},
    ),
    (
        SiteTransformer(3, width=8, depth=1, heads=2),
        {"event_size": 3, "heads": 2, "frequencies": []},
    ),
    (SetEncoder(3, 4, 8, blocks=1), {"event_size": 3, "features": 4, "heads": 4, "width": 8}),
    (SeriesEncoder(2, 4, 8, 1), {"channels": 2, "features": 4, "width": 8, "heads": 4}),
    (ImageEncoder(1, 4, 8), {"channels": 1, "features": 4, "width": 8, "levels": [1, 2, 4]}),
    (LabelContext(3, 4), {"classes": 3, "features": 4, "dropout": 0.1}),
    (TensorContext(2, 4, dropout=0.0), {"in_features": 2, "features": 4, "dropout": 0.0}),
]


@pytest.mark.parametrize("module, expected", DEFINITIONS, ids=lambda v: type(v).__name__)
def test_definition(module, expected):
    found = module.definition()
    assert found["class"] == type(module).__name__
    assert {name: found[name] for name in expected} == expected


def test_every_public_class_has_its_row():
    """A new class joins the table above, where its definition is looked at."""
    modules = (pyro_diffusion.schedules, pyro_diffusion.processes, pyro_diffusion.denoisers)
    modules += (pyro_diffusion.distributions, pyro_diffusion.nn)
    public = {getattr(module, name) for module in modules for name in module.__all__}
    kinds = {c for c in public if isinstance(c, type) and issubclass(c, DefinedModule)}
    abstract = "Schedule VariancePreserving ForwardProcess Denoiser NetworkDenoiser Variance"
    names = {c.__name__ for c in kinds} - {*abstract.split(), "Decoder"}
    assert names == {type(module).__name__ for module, _ in DEFINITIONS}


OTHERS = [
    (lambda: gaussian(LogLinear(7, -7)), lambda: gaussian(LogLinear(10, -7)),
     r"process\.schedule\.log_snr_max: got 7\.0, expected 10\.0$"),
    (gaussian, lambda: gaussian(LogLinear()), r"process\.schedule: got Cosine, expected LogLinear$"),
    (gaussian, lambda: gaussian(Cosine(shift=0.5)), r"schedule\.shift: got 0\.0, expected 0\.5$"),
    (lambda: gaussian(EDM()), lambda: gaussian(EDM(rho=6)), r"schedule\.rho: got 7\.0, expected 6\.0$"),
    (lambda: gaussian(parameterization=Noise()), lambda: gaussian(parameterization=Data()),
     r": parameterization: got Noise\(\), expected Data\(\)$"),
    (lambda: gaussian(parameterization=EDMPreconditioning()),
     lambda: gaussian(parameterization=EDMPreconditioning(1.0)),
     r"got EDMPreconditioning\(sigma_data=0\.5\), expected EDMPreconditioning\(sigma_data=1\.0\)$"),
    (lambda: gaussian(variance=LearnedVariance()), lambda: gaussian(variance=LearnedVariance(5)),
     r"variance\.limit: got 15\.0, expected 5\.0$"),
    (lambda: VarianceDenoiser(mixture()), lambda: VarianceDenoiser(mixture(), unit_variance),
     r"variance: got None, expected unit_variance$"),
    (lambda: VarianceDenoiser(mixture(), NPR(), MLP(2)),
     lambda: VarianceDenoiser(mixture(), SN(), MLP(2)), r": variance: got NPR, expected SN$"),
    (lambda: CategoricalDenoiser(MLP(2), Absorbing(Cosine(), 4)),
     lambda: CategoricalDenoiser(MLP(2), Uniform(Cosine(), 5)), ": process: got Absorbing, expected Unif"),
    (lambda: GaussianProcess(Cosine()), lambda: GaussianProcess(Cosine(), event_dim=2),
     r": event_dim: got 1, expected 2$"),
    (Cosine, LogLinear, r": the module: got Cosine, expected LogLinear$"),
    (lambda: QuantizedDecoder(4), lambda: QuantizedDecoder(8), "levels: got 4, expected 8$"),
    (lambda: Transformer(4, 3, width=8, depth=1, heads=2),
     lambda: Transformer(4, 3, width=8, depth=1, heads=4), "heads: got 2, expected 4$"),
    (lambda: Transformer(4, 3, width=8, depth=1, causal=True),
     lambda: Transformer(4, 3, width=8, depth=1), "causal: got True, expected False$"),
    (lambda: MLP(2, (4,), frequencies=(1, 2)), lambda: MLP(2, (4,), frequencies=(1, 4)),
     r"frequencies: got \[1.0, 2.0\], expected \[1.0, 4.0\]$"),
]  # fmt: skip


def in_memory(state, path):
    return state


def of_torch(state, path):
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def of_checkpoint(state, path):
    checkpoint.save(path, {"model": state})
    return checkpoint.load(path)["model"]


@pytest.mark.parametrize("travel", [in_memory, of_torch, of_checkpoint])
@pytest.mark.parametrize("build, other, error", OTHERS)
def test_another_model_is_refused_and_the_same_is_not(tmp_path, travel, build, other, error):
    path = tmp_path / "a.safetensors"
    state = travel(build().state_dict(), path)
    build().load_state_dict(state)
    wrong = other()
    before = {name: value.clone() for name, value in wrong.state_dict().items()}
    with pytest.raises(ValueError, match=error):
        wrong.load_state_dict(state)
    with pytest.raises(CheckpointError, match=error):
        restore_module(wrong, state)
    checkpoint.save_module(path, build())
    checkpoint.load_module(path, build())
    with pytest.raises(CheckpointError, match=error):
        checkpoint.load_module(path, wrong)
    assert all(torch.equal(before[name], value) for name, value in wrong.state_dict().items())


def test_weights_alone_go_where_you_want_them():
    """Older files say nothing of the model, and a plain dict says nothing on purpose."""
    trained, other = gaussian(LogLinear(7, -7)), gaussian(LogLinear(10, -7))
    other.load_state_dict(dict(trained.state_dict()))
    assert torch.equal(other.network.last.weight, trained.network.last.weight)
    assert other.process.schedule.log_snr_max == 10
    other.network.load_state_dict(trained.network.state_dict())


def test_settings_of_another_version_say_nothing():
    state = Cosine().state_dict()
    state._metadata[""]["definition"] = {"class": "Cosine", "shift": 0.0, "since_removed": 1}
    Cosine().load_state_dict(state)


def test_computed_settings_may_differ_by_rounding():
    state = Cosine(10.0).state_dict()
    Cosine(math.nextafter(10.0, 11.0)).load_state_dict(state)
    with pytest.raises(ValueError, match="log_snr_max"):
        Cosine(10.00001).load_state_dict(state)


def test_within_a_module_of_another_kind():
    """torch raises its own error there, and the checkpoint one that changes nothing."""
    state = nn.ModuleDict({"prior": gaussian(LogLinear(7, -7))}).state_dict()
    other = nn.ModuleDict({"prior": gaussian(LogLinear(10, -7))})
    error = r"prior\.process\.schedule\.log_snr_max: got 7\.0, expected 10\.0"
    with pytest.raises(RuntimeError, match=error):
        other.load_state_dict(state)
    with pytest.raises(CheckpointError, match=error):
        restore_module(other, state)


def test_an_average_says_what_it_is_an_average_of():
    module = nn.ModuleDict({"prior": gaussian(LogLinear(7, -7))})
    state = EMA(module).state_dict()
    EMA(nn.ModuleDict({"prior": gaussian(LogLinear(7, -7))})).load_state_dict(state)
    other = EMA(nn.ModuleDict({"prior": gaussian(LogLinear(10, -7))}))
    with pytest.raises(ValueError, match=r"average'\]: of another model: prior\.process\.schedule"):
        other.load_state_dict(state)
    with pytest.raises(CheckpointError, match="log_snr_max"):
        restore_module(other.module, state["average"])
    restore_module(module, state["average"])


def test_a_pyro_module_is_the_module_it_was_made_of():
    pyro.clear_param_store()
    plain, turned = gaussian(), gaussian()
    to_pyro_module_(turned)
    assert turned.definition() == plain.definition()
    turned.load_state_dict(plain.state_dict())
    plain.load_state_dict(turned.state_dict())
    other = gaussian(LogLinear())
    to_pyro_module_(other)
    with pytest.raises(ValueError, match=r"schedule: got Cosine, expected LogLinear$"):
        other.load_state_dict(plain.state_dict())


def test_a_subclass_of_yours_is_compared_by_its_own_arguments():
    class Steep(Cosine):
        def __init__(self, power=1.0, table=None, **options):
            super().__init__(**options)
            self.power, self.table = power, object()

    assert Steep(2.0).definition() == {"class": "Steep", "power": 2.0, "shift": 0.0, **ENDS}
    with pytest.raises(ValueError, match=r"power: got 1\.0, expected 2\.0"):
        Steep(2.0).load_state_dict(Steep().state_dict())


def test_a_table_takes_its_ends_from_the_state_and_refuses_a_broken_one():
    table, other = TabulatedBetas([0.1, 0.2, 0.3]), TabulatedBetas([0.2, 0.3, 0.4])
    table.load_state_dict(other.state_dict())
    assert table.log_snr_max == other.log_snr_max and table.log_snr_min == other.log_snr_min
    for knots in ([1.0, 2.0, 3.0], [1.0, math.nan, -1.0]):
        with pytest.raises(RuntimeError, match="knots: expected a finite log-SNR that decreases"):
            table.load_state_dict({"knots": torch.tensor(knots)})
    assert torch.equal(table.knots, other.knots) and table.log_snr_max == other.log_snr_max


@pytest.mark.parametrize(
    "metadata", [{"dict": [["", 1]]}, {"dict": [["", {"dict": [["definition", 1]]}]]}]
)
def test_damaged_metadata(tmp_path, monkeypatch, metadata):
    path = tmp_path / "a.safetensors"
    monkeypatch.setattr(
        "pyro_diffusion.checkpoint.saving.encode", lambda *args: {"dict": [], "metadata": metadata}
    )
    checkpoint.save(path, {})
    with pytest.raises(CheckpointError, match="unknown metadata"):
        checkpoint.load(path)
