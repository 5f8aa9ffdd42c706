"""An amortized posterior in other processes: loaded it draws the same, and killed it ends the same."""

import signal
import subprocess
import sys

import pytest
import torch

from pyro_diffusion import checkpoint

PROGRAM = """
import os, signal, sys
import pyro, torch
from pyro.distributions import LogNormal, Normal
from pyro_diffusion import checkpoint
from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.infer import AutoAmortized
from pyro_diffusion.nn import ConditionalMLP
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear
from pyro_diffusion.train import fit_amortized

def model(x=None):
    scale = pyro.sample("scale", LogNormal(0.0, 1.0))
    with pyro.plate("data", 3):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        pyro.sample("x", Normal(mean, scale), obs=x)

def small(latents, features):
    network = ConditionalMLP(latents, features, width=16, depth=1, dropout=0.1)
    return GaussianDenoiser(network, GaussianProcess(LogLinear(10.0, -8.0)))

def draws(guide):
    pyro.set_rng_seed(1)
    x = torch.tensor([[0.5, 1.0, -0.3], [0.0, 0.2, 0.1]])
    found = guide.draw(20, {"x": x})
    return {**found, "log_prob": guide.log_prob({k: v[:3] for k, v in found.items()}, x).detach()}

task, state, run, stop = sys.argv[1:]
pyro.set_rng_seed(0)
guide = AutoAmortized(model, observed=["x"], denoiser=small)
if task == "train":
    simulations = guide.simulate(300)
    def kill(trainer):
        if trainer.step == int(stop):
            os.kill(os.getpid(), signal.SIGKILL)
    history = fit_amortized(
        guide, simulations, steps=24, batch_size=50, checkpoint=run, save_every=5, callback=kill,
        patience=None, progress=False,
    )
    checkpoint.save(state, guide.state_dict())
    kept = {"losses": history.losses, "validations": list(history.validations.values())}
else:
    guide.load_state_dict(checkpoint.load(state))
    guide.eval()
    guide(torch.zeros(3))  # sees its model
    kept = {}
checkpoint.save(state + "." + task, {**draws(guide), **kept})
"""


def process(task, folder, name, stop=0):
    """The exit status of one process."""
    paths = [folder / f"{name}.safetensors", folder / f"{name}.run.safetensors"]
    command = [sys.executable, "-c", PROGRAM, task, *map(str, paths), str(stop)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def found(folder, name, task="train"):
    return checkpoint.load(folder / f"{name}.safetensors.{task}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a guide that was trained without a break."""
    folder = tmp_path_factory.mktemp("whole")
    assert process("train", folder, "whole") == 0
    return folder


def test_a_new_process_draws_the_same(whole):
    assert process("load", whole, "whole") == 0
    trained, loaded = found(whole, "whole"), found(whole, "whole", "load")
    assert trained["scale"].shape == (20, 2)
    assert trained["mean"].shape == (20, 2, 3)
    assert all(torch.equal(trained[name], value) for name, value in loaded.items())
    assert set(loaded) == {"scale", "mean", "log_prob"}


def test_a_killed_training_ends_the_same(whole, tmp_path):
    """Killed once between checkpoints and once at one."""
    for stop in (7, 15):
        assert process("train", tmp_path, "killed", stop) == -signal.SIGKILL
        assert not (tmp_path / "killed.safetensors").exists()
    assert process("train", tmp_path, "killed") == 0
    one, other = found(whole, "whole"), found(tmp_path, "killed")
    assert len(one["losses"]) == 24
    assert one["losses"] == other["losses"]
    assert one["validations"] == other["validations"]
    assert all(torch.equal(one[name], other[name]) for name in ("scale", "mean", "log_prob"))
