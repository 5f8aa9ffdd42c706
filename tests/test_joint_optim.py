"""One optimizer for all parameters steps as Pyro's one per parameter does."""

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_diffusion.optim import JointOptim


def run(optim, steps, network=None, seed=0):
    """Fit a small network by SVI; its weights."""
    if network is None:
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)

    def model():
        pyro.module("network", network)
        pyro.factor("loss", -network(x).square().sum() - 0.1 * network(x).sum())

    svi = SVI(model, lambda: None, optim, Trace_ELBO())
    for _ in range(steps):
        svi.step()
        if isinstance(optim, JointOptim):
            optim.step()
    return network, torch.cat([p.detach().reshape(-1) for p in network.parameters()])


@pytest.mark.parametrize("fused", [False, True])
def test_same_steps_as_one_optimizer_per_parameter(fused):
    args = {"lr": 1e-2, "weight_decay": 0.1, "fused": fused}
    _, ours = run(JointOptim(torch.optim.AdamW, args), 20)
    pyro.clear_param_store()
    _, theirs = run(pyro.optim.AdamW(args), 20)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def make():
    return JointOptim(
        torch.optim.AdamW,
        {"lr": 1e-2},
        torch.optim.lr_scheduler.ExponentialLR,
        {"gamma": 0.9},
        clip_norm=0.5,
    )


def test_resumes_from_its_file(tmp_path):
    _, whole = run(make(), 12)
    pyro.clear_param_store()
    first = make()
    network, _ = run(first, 5)
    first.save(str(tmp_path / "optimizer.safetensors"))
    second = make()
    second.load(str(tmp_path / "optimizer.safetensors"))
    # Saving again before the first step loses nothing.
    assert second.get_state()["names"] == first.get_state()["names"]
    _, resumed = run(second, 7, network)
    assert torch.equal(whole, resumed)


def test_clips_the_global_norm_and_schedules():
    optim = JointOptim(
        torch.optim.SGD,
        {"lr": 1.0},
        torch.optim.lr_scheduler.ExponentialLR,
        {"gamma": 0.5},
        clip_norm=0.3,
    )
    network, start = run(optim, 0)
    _, one = run(optim, 1, network)
    _, two = run(optim, 1, network)
    assert float((one - start).norm()) == pytest.approx(0.3, rel=1e-5)
    assert float((two - one).norm()) == pytest.approx(0.15, rel=1e-5)


def test_parameters_join_late_and_untouched_ones_keep_still():
    optim = JointOptim(torch.optim.AdamW, {"lr": 0.1})
    which = ["a"]

    def model():
        value = pyro.param(which[0], torch.ones(2))
        pyro.factor("loss", -value.square().sum())

    svi = SVI(model, lambda: None, optim, Trace_ELBO())
    svi.step()
    which[0] = "b"
    before = pyro.param("a").detach().clone()
    svi.step()
    assert torch.equal(pyro.param("a"), before)
    assert not torch.equal(pyro.param("b"), torch.ones(2))


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="clip_norm: got 0"):
        JointOptim(torch.optim.Adam, {"lr": 0.1}, clip_norm=0)
    optim = JointOptim(torch.optim.Adam, {"lr": 0.1})
    optim.set_state({"names": ["other"], "optimizer": {}, "scheduler": None})
    with pytest.raises(ValueError, match=r"state: got parameters \['other'\]"):
        run(optim, 1)
    with pytest.raises(
        ValueError, match=r"state: got \['names'\], and misses \['optimizer', 'sched"
    ):
        optim.set_state({"names": []})


def joined():
    """An optimizer that met two parameters one after the other, and its model."""
    optim, which = JointOptim(torch.optim.Adam, {"lr": 0.1}), ["a"]

    def model():
        for name in which:
            pyro.factor(f"loss_{name}", -pyro.param(name, torch.ones(2)).square().sum())

    svi = SVI(model, lambda: None, optim, Trace_ELBO())
    svi.step()
    which.insert(0, "b")
    svi.step()
    return optim, model


def test_resumes_with_parameters_that_joined_late(tmp_path):
    first, model = joined()
    first.save(str(tmp_path / "a.safetensors"))
    start = {name: pyro.param(name).detach().clone() for name in "ab"}
    SVI(model, lambda: None, first, Trace_ELBO()).step()
    whole = {name: pyro.param(name).detach().clone() for name in "ab"}
    pyro.clear_param_store()
    for name, value in start.items():
        pyro.param(name, value)
    second = JointOptim(torch.optim.Adam, {"lr": 0.1})
    second.load(str(tmp_path / "a.safetensors"))
    SVI(model, lambda: None, second, Trace_ELBO()).step()
    assert all(torch.equal(pyro.param(name), whole[name]) for name in whole)


@pytest.mark.parametrize(
    "other, shape, error",
    [
        (
            lambda: JointOptim(torch.optim.Adam, {"lr": 0.1}),
            (3,),
            r"a of shape \(2,\), expected \(3,\)",
        ),
        (
            lambda: JointOptim(torch.optim.SGD, {"lr": 0.1}),
            (2,),
            "state of Adam, expected that of SGD",
        ),
        (make, (2,), "state of Adam, expected that of AdamW with ExponentialLR"),
    ],
)
def test_a_state_of_something_else_is_refused_whole(other, shape, error):
    state = joined()[0].get_state()
    pyro.clear_param_store()
    optim = other()
    optim.set_state(state)
    model = lambda: [pyro.param(name, torch.ones(shape)) for name in "ab"]  # noqa: E731
    parameters = {p.unconstrained() for p in model()}
    with pytest.raises(ValueError, match=error):
        optim(parameters)
    assert optim._optimizer is None and optim._names == {} and optim.get_state() == state
    assert all(bool((p == 1).all()) for p in parameters)
