"""The moving average against its closed form."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_diffusion.optim import EMA


@pytest.fixture(autouse=True)
def seed():
    pyro.clear_param_store()
    torch.manual_seed(0)


def set_weights(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_formula(warmup, dtype):
    module = nn.Linear(2, 3).to(dtype)
    set_weights(module, 5.0)
    ema = EMA(module, decay=0.7, warmup=warmup)
    expected = 5.0
    for n in range(40):
        value = float(torch.randn(()))
        set_weights(module, value)
        ema.update()
        decay = min(0.7, (1 + n) / (10 + n)) if warmup else 0.7
        expected = decay * expected + (1 - decay) * value
    for average in ema.average.values():
        assert average.dtype == dtype
        torch.testing.assert_close(average, torch.full_like(average, expected))


def test_warmup_reaches_the_decay():
    ema = EMA(nn.Linear(1, 1), decay=0.9)
    decays = []
    for _ in range(90):
        decays.append(ema.current_decay())
        ema.update()
    assert decays[:2] == [0.1, 2 / 11]
    assert decays == sorted(decays) and decays[80:] == [0.9] * 10


def test_constant_weights_are_a_fixed_point():
    module = nn.Linear(2, 2).double()
    ema = EMA(module)
    for _ in range(10):
        ema.update()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(ema.average[name], value, rtol=0, atol=0)


def test_integer_buffers_are_copied():
    module = nn.BatchNorm1d(2)
    ema = EMA(module)
    module(torch.randn(8, 2) + 3)
    ema.update()
    assert ema.average["num_batches_tracked"] == 1
    assert ema.average["num_batches_tracked"].dtype == torch.int64
    torch.testing.assert_close(ema.average["running_mean"], 0.9 * module.running_mean)


def test_half_precision_is_averaged_in_single():
    module = nn.Linear(1, 1).to(torch.bfloat16)
    set_weights(module, 0.0)
    ema = EMA(module, decay=0.999, warmup=False)
    set_weights(module, 1.0)
    for _ in range(1000):
        ema.update()
    assert ema.average["weight"].dtype == torch.float32
    assert abs(float(ema.average["weight"]) - (1 - 0.999**1000)) < 1e-4
    with ema.average_parameters():
        assert module.weight.dtype == torch.bfloat16
        assert abs(module.weight.item() - 0.632) < 0.01


def test_average_shares_no_memory_with_the_module():
    module = nn.Linear(2, 2)
    ema = EMA(module)
    before = ema.average["weight"].clone()
    set_weights(module, 9.0)
    assert torch.equal(ema.average["weight"], before)


def test_swap_in_place_and_back():
    module = nn.Linear(2, 2)
    ema = EMA(module, decay=0.5, warmup=False)
    start = module.weight.detach().clone()
    set_weights(module, 1.0)
    ema.update()
    weight, pointer = module.weight, module.weight.data_ptr()
    with ema.average_parameters():
        assert module.weight is weight and module.weight.data_ptr() == pointer
        torch.testing.assert_close(module.weight, 0.5 * start + 0.5)
    assert (module.weight == 1).all()
    assert module.weight.requires_grad


def test_swap_back_after_an_exception():
    module = nn.Linear(2, 2)
    ema = EMA(module)
    set_weights(module, 1.0)
    with pytest.raises(KeyError), ema.average_parameters():
        assert not (module.weight == 1).all()
        raise KeyError("stop")
    assert (module.weight == 1).all()
    ema.update()


def test_no_update_nor_second_swap_while_swapped():
    ema = EMA(nn.Linear(2, 2))
    with ema.average_parameters():
        with pytest.raises(RuntimeError, match="within average_parameters"):
            ema.update()
        with pytest.raises(RuntimeError, match="entered twice"), ema.average_parameters():
            pass


def test_resume_is_exact():
    def train(module, ema, steps):
        for step in steps:
            set_weights(module, float(step) ** 0.5)
            ema.update()

    module = nn.Linear(2, 2)
    whole = EMA(module, decay=0.9)
    half = EMA(module, decay=0.9)
    train(module, whole, range(20))
    train(module, half, range(10))
    resumed = EMA(nn.Linear(2, 2), decay=0.9)
    resumed.load_state_dict(half.state_dict())
    assert resumed.updates == 10
    train(resumed.module, resumed, range(10, 20))
    for name, value in whole.average.items():
        assert torch.equal(value, resumed.average[name])


def test_wrong_states():
    ema = EMA(nn.Linear(2, 2))
    good = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    before = {name: value.clone() for name, value in ema.average.items()}
    for state, error in [
        (
            {"updates": 1, "average": {"weight": torch.zeros(2, 2)}},
            r"average'\].*misses \['bias'\]",
        ),
        (EMA(nn.Linear(2, 3)).state_dict(), r"'weight'\]: got shape \(3, 2\), expected \(2, 2\)"),
        ({"updates": 1}, "state: .*misses"),
        ([1], "state: got list, expected a mapping"),
        ({"updates": 1, "average": None}, r"state\['average'\]: got NoneType, expected a mapping"),
        (
            {"updates": 1, "average": good | {"bias": [1.0, 1.0]}},
            r"'bias'\]: got list, expected a te",
        ),
        (
            {"updates": 1, "average": good | {"bias": torch.ones(2) * 1j}},
            "got dtype torch.complex64, exp",
        ),
        ({"updates": "many", "average": good}, r"state\['updates'\]: got 'many', expected an int"),
        ({"updates": -1, "average": good}, r"state\['updates'\]: got -1"),
        ({"updates": None, "average": good}, r"state\['updates'\]: got None"),
    ]:
        with pytest.raises(ValueError, match=error):
            ema.load_state_dict(state)
        assert ema.updates == 0
        assert all(torch.equal(before[name], ema.average[name]) for name in before)
    with pytest.raises(ValueError, match="on the device 'meta'"):
        ema.load_state_dict(
            {"updates": 1, "average": good | {"bias": torch.ones(2, device="meta")}}
        )
    assert all(torch.equal(before[name], ema.average[name]) for name in before)
    ema.load_state_dict({"updates": 1, "average": good})
    assert ema.updates == 1 and all(torch.equal(good[name], ema.average[name]) for name in good)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_wrong_decay(decay):
    with pytest.raises(ValueError, match=f"decay: got {decay}"):
        EMA(nn.Linear(1, 1), decay=decay)


def test_module_that_changed():
    module = nn.Sequential(nn.Linear(1, 1))
    ema = EMA(module)
    module.append(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"module: got unexpected entries \['1.bias'"):
        ema.update()


def test_constrained_parameters_are_averaged_unconstrained():
    class Scale(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)

    module = Scale()
    ema = EMA(module, decay=0.5, warmup=False)
    module.scale = torch.tensor(4.0)
    ema.update()
    with ema.average_parameters():
        torch.testing.assert_close(module.scale.detach(), torch.tensor(2.0))
    torch.testing.assert_close(module.scale.detach(), torch.tensor(4.0))


def test_guide_survives_and_svi_goes_on():
    """A guide's parameters stay those of the parameter store and the optimizer."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.randn(50) + 3
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(x)
    ema, prototype = EMA(guide, decay=0.9), guide.model
    assert prototype is not None
    for _ in range(300):
        svi.step(x)
        ema.update()
        with ema.average_parameters():
            averaged = float(guide.median()["loc"])
    assert abs(averaged - float(x.mean())) < 0.15
    assert guide.model is prototype
    live = float(guide.median()["loc"])
    for _ in range(5):
        svi.step(x)
    assert float(guide.median()["loc"]) != live
