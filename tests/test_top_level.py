"""The package's top level: its names, and what importing it does not import."""

import importlib
import subprocess
import sys

import pytest

import pyro_diffusion

SUBMODULES = [
    "checkpoint",
    "denoisers",
    "distributions",
    "dynamics",
    "evaluate",
    "foreign",
    "guidance",
    "infer",
    "likelihoods",
    "nn",
    "optim",
    "plotting",
    "processes",
    "samplers",
    "schedules",
    "train",
]


def fresh(*lines: str) -> list[str]:
    """The lines that a program prints in an interpreter that has imported nothing yet."""
    command = [sys.executable, "-W", "error", "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_about_twenty_names_are_those_of_the_submodules():
    names = set(pyro_diffusion.__all__) - set(SUBMODULES)
    assert 18 <= len(names) <= 24
    for name in names:
        value = getattr(pyro_diffusion, name)
        submodule = getattr(pyro_diffusion, value.__module__.split(".")[1])
        assert name in submodule.__all__
        assert getattr(submodule, name) is value


def test_the_submodules_export_few_names():
    """What a program spells; results and machinery stay in their modules."""
    exported = [importlib.import_module(f"pyro_diffusion.{name}").__all__ for name in SUBMODULES]
    # with what simulators need beyond one guide: ensembles, composed posteriors, truncated rounds
    assert sum(map(len, exported)) <= 225


@pytest.mark.parametrize("name", SUBMODULES)
def test_submodules(name):
    assert name in pyro_diffusion.__all__
    assert getattr(pyro_diffusion, name) is importlib.import_module(f"pyro_diffusion.{name}")


def test_heavy_parts_are_imported_when_first_used():
    heavy = ("matplotlib", "arviz", "pyro_diffusion.evaluate", "pyro_diffusion.plotting")
    seen = f"print([n for n in {heavy} if n in sys.modules])"
    printed = fresh(
        "import sys, pyro_diffusion",
        seen,
        "print(sorted(set(pyro_diffusion.__all__) - set(dir(pyro_diffusion))))",
        seen,
        "pyro_diffusion.plotting.sample_grid, pyro_diffusion.log_likelihood",
        seen,
    )
    assert printed == ["[]", "[]", "[]", str(list(heavy))]


def test_one_import_line():
    names = ", ".join(pyro_diffusion.__all__)
    assert fresh(f"from pyro_diffusion import {names}", "print(plotting.__name__)") == [
        "pyro_diffusion.plotting"
    ]


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="module 'pyro_diffusion' has no attribute 'Difusion'"):
        _ = pyro_diffusion.Difusion
