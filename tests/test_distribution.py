"""What is shipped: the source distribution, the wheel built from it, and that wheel installed by itself."""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import yaml

from pyro_diffusion import __version__
from tests.test_examples import TINY

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIPPED = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CITATION.cff",
    "CHANGELOG.md",
    "pyro_diffusion",
    "tests",
    "examples",
    "docs",
    "benchmarks",
    "constraints.txt",
    "Makefile",
)
PROGRAM = """
import pyro, torch
from pyro.infer import SVI, Trace_ELBO
import pyro_diffusion
from pyro_diffusion import MLP, Cosine, Diffusion, GaussianDenoiser, GaussianProcess, evaluate, plotting

denoiser = GaussianDenoiser(MLP(2), GaussianProcess(Cosine()))
diffusion = Diffusion(denoiser, event_shape=(2,), steps=3)

def model(x):
    pyro.module("denoiser", denoiser)
    with pyro.plate("data", len(x)):
        pyro.sample("x", diffusion, obs=x)

SVI(model, lambda x: None, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(torch.randn(8, 2))
samples = diffusion.sample((4,))
print(pyro_diffusion.__file__, pyro_diffusion.__version__, tuple(samples.shape))
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what is shipped, since a checkout has much beside it."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns("__pycache__", "_build", "results")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignored)
        else:
            shutil.copy(source, tree)
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", out, cwd=tree)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution alone, as pip builds it."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=tree)
    return next(folder.glob("*.whl"))


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def metadata(wheel: Path) -> Message:
    name = f"pyro_diffusion-{__version__}.dist-info/METADATA"
    return email.message_from_bytes(zipfile.ZipFile(wheel).read(name))


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation["version"] == __version__
    assert newest is not None and newest[1] == __version__
    assert citation["license"] == PROJECT["license"]


def test_the_source_distribution_has_what_its_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        found = {Path(name).parts[1] for name in archive.getnames()}
    assert found >= {*SHIPPED, "PKG-INFO"}


def test_the_wheel_is_the_package_its_type_marker_and_its_licence(wheel):
    info = f"pyro_diffusion-{__version__}.dist-info"
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "pyro_diffusion").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "pyro_diffusion/py.typed" in package
    expected = {*package, f"{info}/METADATA", f"{info}/RECORD", f"{info}/WHEEL"}
    assert names(wheel) == expected | {f"{info}/licenses/LICENSE"}


def test_the_wheel_says_what_it_is(wheel):
    found = metadata(wheel)
    assert found["Version"] == __version__
    assert found["Requires-Python"] == PROJECT["requires-python"]
    assert found["License-Expression"] == "Apache-2.0"
    readme = found.get_payload(decode=True).decode()
    assert readme.strip() == (ROOT / "README.md").read_text().strip()


def test_every_import_of_the_package_is_a_requirement():
    imported = set()
    for path in (ROOT / "pyro_diffusion").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    required = {re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]}
    required = {"pyro" if name == "pyro-ppl" else name for name in required}
    assert imported - {*sys.stdlib_module_names, "pyro_diffusion"} == required


def test_the_wheel_installed_by_itself_trains_and_samples(wheel, tmp_path):
    """By pip into a folder of its own; the interpreter starts where no checkout is."""
    target = tmp_path / "site"
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet"]
    run(sys.executable, "-m", "pip", "install", *options, "--target", target, wheel, cwd=tmp_path)
    printed = run(sys.executable, "-c", PROGRAM, cwd=tmp_path, PYTHONPATH=str(target)).split(" ", 1)
    assert Path(printed[0]).is_relative_to(target)
    assert printed[1] == f"{__version__} (4, 2)\n"


@pytest.mark.slow  # it downloads and installs torch
@pytest.mark.parametrize("python, arviz", [("3.11", "0.23.4"), ("3.13", "1.3.0")])
def test_the_wheel_in_a_clean_environment_runs_the_digits(wheel, tmp_path, python, arviz):
    interpreter = shutil.which(f"python{python}")
    # A version manager may have the name and not the interpreter.
    if interpreter is None or subprocess.run([interpreter, "-V"], capture_output=True).returncode:
        pytest.skip(f"no python{python} on this machine")
    environment = tmp_path / "environment"
    run(interpreter, "-m", "venv", environment, cwd=tmp_path)
    own = environment / "bin" / "python"
    # torch first, by its exact version, as in the Makefile.
    constraints = (ROOT / "constraints.txt").read_text()
    torch_pin = re.search(r"^torch==.*$", constraints, re.MULTILINE)[0]
    run(own, "-m", "pip", "install", torch_pin, cwd=tmp_path)
    run(own, "-m", "pip", "install", f"{wheel}[examples]", f"arviz=={arviz}", cwd=tmp_path)
    scripts = shutil.copytree(ROOT / "examples", tmp_path / "examples")
    small = [*TINY["digits"].split(), "--no-progress", "--out", tmp_path / "out"]
    run(own, scripts / "digits.py", *small, cwd=tmp_path)
    assert (tmp_path / "out" / "metrics.json").exists()
    assert f"arviz=={arviz}" in run(own, "-m", "pip", "freeze", cwd=tmp_path).split()
