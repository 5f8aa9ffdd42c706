"""Every script of examples/ runs, with tiny arguments, without a warning."""

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# What stands on the digits model trains a small one, inside its own folder.
PRIOR = "--prior prior --prior-settings='--steps 3 --batch 8 --width 8'"
TINY = {
    "digits": "--steps 3 --batch 8 --width 8 --chain 6 --draws 2 --weighted-images 2"
    " --weighted-steps 3 --weighted-samples 2 --samples 4",
    "blur": "--steps 3 --batch 8 --width 8 --chain 6 --draws 2 --samples 2",
    "moons": "--steps 3 --points 60 --held-out 40 --batch 16 --width 8 --chain 6 --short-chain 3"
    " --samples 2 --components 1 2",
    "bayesian_last_layer": "--steps 3 --points 20 40 --batch 8 --width 8 --draws 2 --cells 4",
    "latent_diffusion": "--steps 2 --batch 8 --width 8 --latent 2 --prior-width 8 --chain 6 --draws 2"
    " --check-every 2 --samples 4",
    "text": "--steps 3 --batch 4 --width 8 --depth 1 --chain 6 --draws 2 --check-every 3"
    " --sample-steps 2 --characters 40",
    "restoration": f"{PRIOR} --images 2 --steps 3 --particles 3 --draws 2 --shown 2",
    "counts": f"{PRIOR} --images 2 --steps 3 --particles 3 --shown 2",
    "noise_scale": f"{PRIOR} --steps 3 --grid 3 --particles 3 --svi-steps 4 --guide-particles 2 --sweeps 2"
    " --warmup 1 --gibbs-particles 2",
    "conditional_digits": "--steps 3 --classifier-steps 3 --batch 8 --width 8 --chain 3 --samples 2"
    " --scales 1 2",
    "unsupervised_classes": "--steps 3 --chain 6",
    "model_comparison": "--prior prior --prior-settings='--steps 3 --classifier-steps 3 --batch 8 --width 8'"
    " --images 2 --chain 3 --particles 2",
}
# Warnings are errors there too, but for the one by which ArviZ 0.23 announces its 1.x series.
STRICT = ["-W", "error", "-W", "ignore::FutureWarning:arviz"]


def run(name: str, out: Path, *more: str) -> dict:
    """Start the script as a user would; returns its metrics.json."""
    command = [sys.executable, *STRICT, str(EXAMPLES / f"{name}.py"), *shlex.split(TINY[name])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [*command, *more, "--no-progress", "--out", str(out)],
        env=environment,
        cwd=out,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return json.loads((out / "metrics.json").read_text())


def numbers(tree: object) -> list[float]:
    """Every number in nested dictionaries and lists."""
    if isinstance(tree, dict):
        return [x for value in tree.values() for x in numbers(value)]
    if isinstance(tree, list):
        return [x for value in tree for x in numbers(value)]
    return [tree] if isinstance(tree, int | float) else []


NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
TWICE = "moons"


def check(metrics: dict, out: Path) -> None:
    """The run left finite numbers and a figure."""
    found = numbers(metrics)
    assert found
    assert all(math.isfinite(x) for x in found), metrics
    assert any(out.glob("*.png"))


@pytest.mark.parametrize("name", [name for name in NAMES if name != TWICE])
def test_example_runs(name, tmp_path):
    assert name in TINY, f"examples/{name}.py: no tiny arguments in {Path(__file__).name}"
    check(run(name, tmp_path), tmp_path)


def test_same_seed_same_metrics(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        check(run(TWICE, folder, "--seed", "5"), folder)
    one, two = ((folder / "metrics.json").read_bytes() for folder in folders)
    assert one == two
