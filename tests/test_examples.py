"""Every script of examples/ runs, with tiny arguments, without a warning."""

import importlib
import json
import math
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_diffusion.nn import Transformer

EXAMPLES = Path(__file__).parent.parent / "examples"
# What stands on the digits model trains a small one, inside its own folder.
PRIOR = "--prior prior --prior-settings='--steps 3 --batch 8 --width 8'"
TINY = {
    "digits": "--steps 3 --batch 8 --width 8 --chain 6 --draws 2 --weighted-images 2"
    " --weighted-steps 3 --weighted-samples 2 --samples 4",
    "images": "--steps 3 --batch 4 --width 8 --levels 1 1 --features 4 --test-images 2 --validation-images 2"
    " --draws 2 --samples 2 --sample-steps 2",
    "binary_images": "--steps 3 --batch 8 --width 8 --test-images 4 --draws 2 --samples 2 --baseline-steps 3",
    "distributed": "--steps 3 --batch 8 --width 8 --chain 6 --draws 2 --samples 4",
    "blur": "--steps 3 --batch 8 --width 8 --chain 6 --draws 2 --samples 2",
    "heavy_tails": "--steps 3 --points 60 --held-out 20 --batch 16 --width 8 --solver-steps 4 --chain 6"
    " --samples 200",
    "moons": "--steps 3 --points 60 --held-out 40 --batch 16 --width 8 --chain 6 --short-chain 3"
    " --samples 2 --components 1 2",
    "bayesian_last_layer": "--steps 3 --points 20 40 --batch 8 --width 8 --draws 2 --cells 4",
    "latent_diffusion": "--steps 2 --batch 8 --width 8 --latent 2 --prior-width 8 --chain 6 --draws 2"
    " --evidence 4 --check-every 2 --samples 4",
    "text": "--steps 3 --batch 4 --length 16 --width 8 --depth 1 --checks 1 --draws 2 --sample-steps 2"
    " --characters 40 --weighted-windows 2 --weighted-steps 2 --weighted-samples 2",
    "words": "--steps 3 --batch 4 --width 8 --depth 1 --check-every 3 --check-draws 2 --draws 2"
    " --sample-steps 2 --words 3",
    "restoration": f"{PRIOR} --images 2 --steps 3 --particles 3 --draws 2 --shown 2",
    "counts": f"{PRIOR} --images 2 --steps 3 --particles 3 --shown 2",
    "noise_scale": f"{PRIOR} --steps 3 --grid 3 --particles 3 --svi-steps 4 --guide-particles 2 --sweeps 2"
    " --warmup 1 --gibbs-particles 2",
    "conditional_digits": "--steps 3 --classifier-steps 3 --batch 8 --width 8 --chain 3 --samples 2"
    " --scales 1 2",
    "unsupervised_classes": "--steps 3 --chain 6",
    "model_comparison": "--prior prior --prior-settings='--steps 3 --classifier-steps 3 --batch 8 --width 8'"
    " --images 2 --chain 3 --particles 2",
    "any_guide": "--steps 20 --particles 16 --samples 20",
    "label_switching": "--steps 20 --particles 8 --widen 1 --points 12 --samples 20 --clusters 1 3 --data 6",
    "sequential_bayes": "--steps 3 --batch 8 --width 8 --guide-steps 5 --first-particles 8 --particles 4"
    " --solver-steps 2 --points 20",
    "missing_data": "--steps 3 --batch 8 --width 8 --chain 4 --rows 3 --draws 4 --particles 4"
    " --components 1 2",
    "missing_covariates": "--prior prior --prior-settings='--steps 3 --batch 8 --width 8' --chain 4 --rows 4"
    " --sweeps 4 --warmup 4 --gibbs-particles 2 --reference-particles 4 --reference-draws 4"
    " --reference-sweeps 16",
    "epidemic": "--simulations 60 --steps 3 --draws 60 --weighted 20 --particles 5 --datasets 20",
    "schools": "--simulations 60 --steps 3 --schools 8 9 --draws 20 --warmup 10",
    "table": "--steps 3 --batch 8 --width 8 --terms 2 --components 1 2 --shown 2",
    "foreign_model": "--no-diffusers --steps 3 --batch 8 --width 8 --scored 4 --knots 3 --terms 2"
    " --chain 3 --particles 3 --images 2",
    "second_network": f"{PRIOR} --width 2 --classifier-steps 3 --drawn 4 --steps 3 --particles 3 --draws 3"
    " --prior-draws 5 --shown 2",
}
# Warnings are errors there too, but for that by which ArviZ 0.23 announces its 1.x series, that of pandas 3
# at what it does, and that of so few particles.
STRICT = ["-W", "error", "-W", "ignore::FutureWarning:arviz", "-W", "ignore:TwistedSMC"]
STRICT += ["-W", "ignore:The inplace keyword"]


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


def numbers(tree: object, error: bool = False) -> list[float]:
    """Every number in nested dictionaries and lists, but for errors that were "not estimated" (infinite)."""
    if isinstance(tree, dict):
        return [x for key, value in tree.items() for x in numbers(value, "error" in key)]
    if isinstance(tree, list):
        return [x for value in tree for x in numbers(value, error)]
    unknown = error and tree == math.inf
    return [tree] if isinstance(tree, int | float) and not unknown else []


SCRIPTS = [path for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()]
NAMES = sorted(path.stem for path in SCRIPTS)
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


def test_digits_take_images_of_a_file(tmp_path):
    """Five levels, twelve pixels wide: shapes and levels are those of the file."""
    images = np.random.default_rng(0).integers(0, 5, (20, 12, 12), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    metrics = run("digits", tmp_path, "--images", "images.npy", "--samples", "2")
    check(metrics, tmp_path)
    uniform = math.log2(5)  # independent pixels, two images to report
    assert abs(metrics["histogram"]["value"] - uniform) < 0.5


@pytest.mark.parametrize("name", ["blur", "latent_diffusion", "restoration"])
def test_examples_take_images_of_a_file(name, tmp_path, monkeypatch):
    """The same of three more, of other width and height: in this process, as that is quicker."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    shape = (20, 12, 8)
    np.save("images.npy", np.random.default_rng(0).integers(0, 5, shape, dtype=np.uint8))
    pick = ["--images", "images.npy"]
    if name == "restoration":  # the images are its prior's
        pick = [f"--prior-settings=--steps 3 --batch 8 --width 8 {' '.join(pick)}"]
    arguments = [*shlex.split(TINY[name]), *pick, "--no-progress", "--out", "out"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TwistedSMC")  # so few particles
        importlib.import_module(name).main(arguments)
    check(json.loads(Path("out/metrics.json").read_text()), Path("out"))


def test_binary_images_of_a_file_are_bits_or_packed_bits(tmp_path, monkeypatch):
    """Either way the same images; anything else is refused by the name of the file."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import binary_images

    bits = np.random.default_rng(0).integers(0, 2, (9, 16), dtype=np.uint8)
    parts = {"train": bits[:5], "valid": bits[5:7], "test": bits[7:]}
    np.savez(tmp_path / "plain.npz", **parts)
    np.savez(tmp_path / "packed.npz", **{k: np.packbits(v, axis=1) for k, v in parts.items()})
    for name in ("plain", "packed"):
        found = binary_images.read(tmp_path / f"{name}.npz")
        images = torch.cat([found[part] for part in ("train", "validation", "test")])
        assert torch.equal(images, torch.from_numpy(bits.astype(np.int64)).view(-1, 1, 4, 4)), name
    np.savez(tmp_path / "flat.npz", **{k: v[:, :15] for k, v in parts.items()})
    with pytest.raises(ValueError, match=r"flat.npz: got train of shape \(5, 15\)"):
        binary_images.read(tmp_path / "flat.npz")
    np.savez(tmp_path / "short.npz", train=bits)
    with pytest.raises(ValueError, match=r"short.npz: got no array \['test', 'valid'\]"):
        binary_images.read(tmp_path / "short.npz")
    np.save(tmp_path / "plain.npy", np.zeros((3, 4)))
    for name in ("plain.npy", "none.npz", "."):
        with pytest.raises(ValueError, match=r"--data: got .* no NumPy archive"):
            binary_images.read(tmp_path / name)


def test_rates_fall_to_zero_with_the_minutes_or_the_steps(monkeypatch):
    """Whichever are over first; and training stops."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import timed_training

    now = [100.0]
    monkeypatch.setattr(timed_training.time, "monotonic", lambda: now[0])
    clock = timed_training.Clock(minutes=1.0, steps=4000)
    assert not clock.over(1)
    now[0] += 100
    assert not clock.over(2)  # starts it
    assert clock.rate(99) == pytest.approx(0.5, rel=0.01)
    now[0] += 30
    assert clock.rate(1000) == pytest.approx(0.5)
    assert clock.rate(3000) == pytest.approx(np.cos(3 * np.pi / 8) ** 2)
    assert not clock.over(5)
    now[0] += 31
    assert clock.rate(1000) == pytest.approx(0, abs=1e-12)
    assert clock.over(5)


def test_text_models_may_be_trained_apart(tmp_path):
    """Either model alone, beside the n-grams; the weighted bound goes with the diffusion."""
    metrics = run("text", tmp_path, "--models", "autoregressive", "--weighted-windows", "1")
    assert set(metrics) == {"autoregressive", *(f"{order}-gram" for order in range(2, 7))}
    assert metrics["autoregressive"]["difference"] == 0
    metrics = run("text", tmp_path, "--models", "diffusion", "--weighted-windows", "1")
    assert {name: row["windows"] for name, row in metrics.items() if "gram" not in name} == {
        "diffusion": 139,
        "diffusion, weighted": 1,
    }


def test_kneser_ney_is_a_distribution_over_symbols(monkeypatch):
    """Every history, seen or not, has probabilities that add up to one; counts by hand for two symbols."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from text_baselines import KneserNey

    text = torch.randint(4, (300,), generator=torch.Generator().manual_seed(0))
    for order in (1, 2, 3, 5):
        model = KneserNey(text, order, 5)  # the last symbol is in no text
        histories = torch.cartesian_prod(*[torch.arange(5)] * order).view(-1, 5, order)
        total = model.log_prob(histories).exp().sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))
    # By hand: pairs 00 (twice), 01, 10, discounts 1/2 and 1/2; below, 0 after two symbols and 1 after one,
    # discounts 1 and 1/3, so probabilities 5/9 and 4/9.
    model = KneserNey(torch.tensor([0, 0, 0, 1, 0]), 2, 2)
    after_zero = model.log_prob(torch.tensor([[0, 0], [0, 1]])).exp()
    expected = torch.tensor([37 / 54, 17 / 54], dtype=torch.float64)
    torch.testing.assert_close(after_zero, expected)


def test_kneser_ney_discounts_by_counts(monkeypatch):
    """By hand: 8 symbols once, 4 twice, 2 three times, 1 four times; discounts 1/2, 5/4, 2 and 2 again."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from text_baselines import KneserNey

    counts = torch.tensor([1] * 8 + [2] * 4 + [3] * 2 + [4])
    model = KneserNey(torch.arange(15).repeat_interleave(counts), 1, 15)
    probs = model.log_prob(torch.tensor([[0], [8], [12], [14]])).exp()
    # What is taken adds up to 15, one for each symbol.
    expected = torch.tensor([1 - 0.5 + 1, 2 - 1.25 + 1, 3 - 2 + 1, 4 - 2 + 1]).double() / 26
    torch.testing.assert_close(probs, expected)


def test_kneser_ney_scores_windows_from_a_growing_past(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from text_baselines import KneserNey, kneser_ney

    text = torch.randint(3, (200,), generator=torch.Generator().manual_seed(1)).cummax(0).values
    text = torch.cat([text, text.flip(0) * torch.randint(2, (200,))])
    windows = text.unfold(0, 5, 31)
    one, two, three = (KneserNey(text, k, 3).log_prob for k in (1, 2, 3))
    expected = one(windows[:, :1]) + two(windows[:, :2])
    expected = expected + sum(three(windows[:, i : i + 3]) for i in range(3))
    torch.testing.assert_close(kneser_ney(text, windows, 3, 3), expected)


def test_autoregression_scores_each_symbol_from_those_before(monkeypatch):
    """Summed over all strings, the probabilities are one; each is that of the network, asked in turn."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from text_baselines import Autoregressive

    torch.manual_seed(0)
    network = Transformer(4, 4, width=8, depth=1, heads=2, outputs=3, relative=True, causal=True)
    torch.nn.init.normal_(network.last.weight)
    strings = torch.cartesian_prod(*[torch.arange(3)] * 4)
    log_p = Autoregressive(network.double(), 4, start=3).log_prob(strings)
    assert abs(log_p.double().exp().sum() - 1) < 1e-5
    assert log_p.std() > 0.1
    in_turn, before = 0.0, torch.full_like(strings, 3)
    for i in range(4):
        logits = network(before, torch.zeros(len(strings)))[:, i]
        in_turn = in_turn + logits.log_softmax(-1).gather(-1, strings[:, i : i + 1]).squeeze(-1)
        before[:, i + 1 : i + 2] = strings[:, i : i + 1]
    torch.testing.assert_close(log_p.double(), in_turn.double(), rtol=1e-5, atol=1e-5)
