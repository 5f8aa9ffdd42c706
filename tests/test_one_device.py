"""Every public call keeps to one device, by the emulation of `one_device`: no GPU is needed."""

import ast
from pathlib import Path

import pyro
import pytest
import torch

import pyro_diffusion
from tests import one_device
from tests.fuzz.test_fuzz import every_call
from tests.one_device import OneDevice

PACKAGE = Path(pyro_diffusion.__file__).parent


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("default_on_host", [True, False])
def test_public_calls_keep_to_one_device(default_on_host):
    """Whether or not the user has made the accelerator torch's default device."""
    mixed = {}
    for call in every_call():
        pyro.clear_param_store()
        torch.manual_seed(0)
        arguments = call.arguments()
        with OneDevice(default_on_host) as mode:
            call.function(**arguments)
        for line, operation in mode.mixed.items():
            mixed.setdefault(f"{line} ({operation})", call.name)
    assert not mixed


def test_generators_are_of_the_device_of_what_they_draw():
    """A generator of the host refuses to draw on a default device that is another."""
    silent = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            said = {keyword.arg for keyword in node.keywords}
            factory = node.func.attr in {"rand", "randn", "randint", "randperm"}
            if factory and "generator" in said and "device" not in said:
                silent.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not silent


def of_a_line(source, default_on_host=True, **names):
    """What the emulation notes of a line, run as if it stood in the package."""
    code = compile(source, str(PACKAGE / "line.py"), "exec")
    with OneDevice(default_on_host) as mode:
        exec(code, {"torch": torch, **names})
    return list(mode.mixed.values())


@pytest.mark.parametrize(
    ("source", "noted"),
    [
        ("x + torch.ones(3)", ["add"]),
        ("x + torch.ones(3, device=x.device)", []),
        ("x + torch.ones(3).to(x)", []),
        ("x + torch.ones(3).to(x.device)", []),
        ("x + x.new_ones(3)", []),
        ("x + torch.ones(())", []),
        ("x[torch.arange(2)]", []),
        ("torch.arange(3).cumsum(0) * 2 + torch.ones(3)", []),
        ("torch.cat([x, torch.ones(3, 1).double().mT[0]])", ["cat"]),
        ("x.cpu() + x", ["add"]),
        ("x.to('cpu') + x", ["add"]),
        ("x.cpu() + torch.ones(3)", []),
        ("(lambda y: y + torch.ones(3, device=y.device))(x.cpu())", []),
        ("torch.nn.Linear(3, 3)(x)", []),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_emulation_does_as_torch(source, noted):
    assert of_a_line(source, x=torch.ones(3)) == noted


@pytest.mark.parametrize(
    ("source", "noted"),
    [
        ("x + torch.ones(3)", []),
        ("x.cpu() + torch.ones(3)", ["add"]),
        ("x.cpu() + torch.ones(3, device='cpu')", []),
    ],
)
def test_the_emulation_follows_the_default_device(source, noted):
    assert of_a_line(source, default_on_host=False, x=torch.ones(3)) == noted


def test_the_line_is_named():
    code = compile("\n\nx + torch.ones(3)", str(PACKAGE / "line.py"), "exec")
    with OneDevice() as mode:
        exec(code, {"torch": torch, "x": torch.ones(3)})
    assert next(iter(mode.mixed)).startswith("line.py:3:")
    assert one_device.where() == "outside the package"
