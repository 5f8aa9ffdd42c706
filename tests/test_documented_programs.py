"""The programs printed in the README and in the documentation run as they stand, but for fewer iterations."""

import re
from pathlib import Path

import pyro
import pytest
import torch

from pyro_diffusion import evaluate
from pyro_diffusion.processes import Ability, CategoricalProcess, GaussianProcess
from tests.per_coordinate import PerCoordinate

ROOT = Path(__file__).parent.parent


def programs(page: str, heading: str = "") -> list[str]:
    """The Python blocks of a page, or of its part under a heading of second level."""
    text = (ROOT / page).read_text()
    if heading:
        text = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(page: str, shorter: dict[str, str], heading: str = "") -> dict:
    """All blocks of a page (or of a part of it), one after another, with some iterations left out."""
    source = "\n".join(programs(page, heading))
    for pattern, replacement in shorter.items():
        source, found = re.subn(pattern, replacement, source)
        assert found == 1, f"{pattern}: {found} times on {page}"
    namespace: dict[str, object] = {}
    exec(source, namespace)
    return namespace


@pytest.mark.parametrize("page", ["README.md", "docs/getting_started.md"])
def test_the_programs_of_a_first_page_train_and_sample(page: str) -> None:
    shorter = {r"range\(2000\)": "range(3)", r"num_samples=8": "num_samples=2"}
    namespace = run(page, shorter)
    assert namespace["samples"].shape == (500, 2)
    assert bool(torch.isfinite(namespace["samples"]).all())
    assert any(name.startswith("denoiser") for name in list(pyro.get_param_store()))
    assert namespace["posterior"].shape == (500, 2)


# Networks of two iterations guide nothing, and say so.
@pytest.mark.filterwarnings("ignore:TwistedSMC")
@pytest.mark.filterwarnings("ignore:data")
def test_our_side_of_programs_of_other_packages_runs() -> None:
    shorter = {
        r"\*args, iterations=1000": "*args, iterations=2",
        r"images, iterations=1000": "images, iterations=2",
        r"steps=2000": "steps=2, progress=False",
        r"num_terms=20": "num_terms=2",
        r"steps=20\)": "steps=2)",
        r"num_particles=8": "num_particles=2",
        r"num_samples=500, warmup_steps=200": "num_samples=3, warmup_steps=2",
    }
    page = run("docs/coming_from.md", shorter)
    assert page["samples"].shape == page["restored"].shape == (16, 1, 8, 8)
    assert page["bound"].value.shape == (4,)
    assert page["draws"].shape == (1000, 2) and page["x"].shape == (3, 2)
    assert all(bool(page[name].isfinite().all()) for name in ("samples", "restored", "draws", "x"))


def test_the_tutorial_on_conditioning_runs_and_finds_what_it_says() -> None:
    shorter = {
        r"range\(100\)": "range(2)",
        r"num_simulations=100": "num_simulations=10",
        r"losses\[-50:\]": "losses",
    }
    page = run("docs/tutorial_conditioning.md", shorter)
    exact = page["log_joint"](0.8)
    # Seven standard errors of a share of a thousand draws by weight, and what fifty steps leave.
    assert abs(page["shares"](page["x"]) - exact.softmax(0)).max() < 0.12
    evidence = page["particles"].log_evidence
    assert abs(evidence.value - exact.logsumexp(0)) < 6 * evidence.standard_error + 0.06
    guided = page["shares"](page["guided"](page["y"])["x"])  # MMPS, the last one
    assert abs(guided - exact.softmax(0)).max() > 0.15


def test_the_page_on_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shorter = {
        r"range\(200\)": "range(2)",
        r"steps=400": "steps=4, progress=False",
        r"validate_every=50": "validate_every=2",
        r"save_every=100": "save_every=2",
        r"steps=500": "steps=6, progress=False",
        r"trainer.step % 100": "trainer.step % 6",
    }
    page = run("docs/training.md", shorter)
    assert page["samples"].shape == (500, 2) and len(page["pictures"]) == 1
    assert list(page["history"].validations) == [2, 4, 5, 6]
    assert {path.name for path in tmp_path.iterdir()} == {"circle.safetensors", "circle.csv"}


@pytest.mark.filterwarnings("ignore:importance weights")  # of a network of four steps
@pytest.mark.filterwarnings("ignore:data")
def test_the_page_on_simulators_runs() -> None:
    shorter = {
        r"simulate\(10_000\)": "simulate(100)",
        r"steps=4000": "steps=4",
        r"range\(20\)": "range(2)",
        r"simulate\(256\)": "simulate(8)",
        r"num_samples=1000, parallel": "num_samples=20, parallel",
        r"num_samples=50,": "num_samples=2,",
        r"steps=50,": "steps=2,",
        r"steps=1000": "steps=4",
        r"steps=300": "steps=4",
    }
    page = run("docs/simulators.md", shorter)
    assert page["draws"].shape == (20, 2)
    assert page["draws"].abs().max() <= 1
    assert page["draws_of_many"].shape == (2, 100, 2)
    assert page["latents"]["mean"].shape == (100, 1, 1)
    assert page["latents"]["local"].shape == (100, 8, 1)
    assert page["corrected"].log_evidence.value.isfinite()
    assert bool((page["rates"] > 0).all())
    assert page["log_likelihood"].isfinite()
    assert page["draws_of_both"].shape == (1000, 2)
    assert page["draws_of_ten"].shape == (50, 2)


def test_the_page_on_conditioning_runs() -> None:
    shorter = {
        r"range\(1000\)": "range(2)",
        r"num_samples=500, warmup_steps=200": "num_samples=3, warmup_steps=2",
        r"steps=300": "steps=4",
    }
    page = run("docs/condition_anything.md", shorter)
    assert page["draws"].shape == (100, 2)
    assert page["samples"].shape == (100, 2)
    assert bool(torch.isfinite(page["samples"]).all())
    assert page["evidence"].standard_error > 0
    assert page["run"].ess.min() > 1
    assert page["mcmc"].get_samples()["x_base"].shape == (3, 2)


def test_the_three_ways_of_mixtures_run() -> None:
    heading = "Mixtures and enumerated latents"
    page = run("docs/inference.md", {r"range\(1000\)": "range(2)"}, heading)
    assert page["classes"].reshape(-1).shape == (192,)
    assert page["log_likelihood"] > page["bound"]
    assert {*pyro.get_param_store()} > {"weights", "classifier$$$0.weight"}


def test_the_page_on_blur_runs() -> None:
    page = run("docs/blurring.md", {})
    assert page["bound"].shape == (5,)
    assert bool((page["bound"] < 0).all())


def test_a_destruction_of_your_own_runs_in_under_forty_lines() -> None:
    shorter = {r"range\(1500\)": "range(3)", r"sample\(\(1000,\)\)": "sample((10,))"}
    page = run("docs/degradations.md", shorter)
    assert page["samples"].shape == (10, 2)
    assert page["bound"].shape == (2000,)
    assert page["restored"].shape == (5, 2)
    assert all(bool(page[k].isfinite().all()) for k in ("samples", "bound", "restored", "loss"))
    assert len(programs("docs/degradations.md")[0].splitlines()) < 40


def test_a_process_of_your_own_runs_and_what_needs_one_noise_level_refuses_it() -> None:
    page = run("docs/contracts.md", {})
    assert page["samples"].shape == (500, 2)
    assert bool(torch.isfinite(page["bound"]).all())
    level = page["process"].level(torch.tensor([0.5]))
    assert torch.equal(level.log_snr - level.clock, torch.tensor([[2.0, -2.0]]))
    with pytest.raises(ValueError, match="one noise level for all coordinates"):
        evaluate.wasserstein_bound(page["denoiser"], page["samples"])


def test_the_table_of_abilities_is_that_of_the_processes() -> None:
    lines = (ROOT / "docs/contracts.md").read_text().splitlines()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    found = {row[0]: row[-3:] for row in rows if row and row[0] in Ability.__members__}
    kinds = [GaussianProcess, PerCoordinate, CategoricalProcess]
    stated = {
        name: ["yes" * (a in kind.abilities) for kind in kinds]
        for name, a in Ability.__members__.items()
    }
    assert found == stated


def test_the_page_on_symbols_runs():
    page = run("docs/discrete.md", {})
    assert page["x"].shape == (5, 2)


def test_the_page_on_deletion_runs():
    page = run("docs/deletion.md", {})
    assert page["x"].shape == (5, 3) and page["bound"].shape == (5,)


def test_the_page_on_heavy_tails_runs():
    page = run("docs/heavy_tails.md", {})
    assert page["samples"].shape == (5, 3)
    for name in ("bound", "density", "laplace_density"):
        assert bool(torch.isfinite(page[name]).all())


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 under pandas 3
def test_the_page_on_evaluation_runs() -> None:
    shorter = {r"randn\(200, 2\)": "randn(20, 2)", r"simulations=200": "simulations=20"}
    page = run("docs/evaluation.md", shorter)
    assert page["exact"].kind == "exact" and page["weighted"].ess.min() >= 1
    jacobian = (
        page["result"].value
        - evaluate.log_likelihood(page["in_units"], page["units"](page["data"]), seed=0).value
    )
    torch.testing.assert_close(
        jacobian, torch.full((20,), 5.0).log().double(), rtol=0, atol=1e-3, check_dtype=False
    )
    assert len(page["by_arviz"]) == 2


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 under pandas 3
def test_the_page_on_tables_runs() -> None:
    shorter = {
        r"steps = 2000": "steps = 3",
        r"\(256, 256, 256\)": "(8, 8)",
        r"num_terms=256": "num_terms=2",
        r"patience=5": "progress=False",
        r"sample\(\(419,\)\)": "sample((3,))",
    }
    page = run("docs/tables.md", shorter)
    assert page["history"].best_step and len(page["table"]) == 2
    scores = [page[name].value for name in ("density", "bound", "mixture")]
    assert all(score.shape == (100,) and score.isfinite().all() for score in scores)


def test_the_page_on_categoricals_by_noise_runs() -> None:
    page = run("docs/argmax.md", {})
    assert page["y"].shape == (1000, 4) and bool(page["mu"].grad.isfinite().all())


def test_the_page_on_fourier_densities_runs() -> None:
    page = run("docs/fourier.md", {r"range\(300\)": "range(3)"})
    assert page["x"].shape == (1000,) and bool(page["samples"].isfinite().all())


def test_particles_of_a_stock_guide() -> None:
    """Log evidence -31.31; an error bar of .03 (a guide of 1000 steps is far off); a chain's ELBO below."""
    page = run("docs/guides.md", {})
    weights = page["weights"]
    assert -33 < weights.mean() < -31.3113 < weights.exp().mean().log() + 0.5
    evidence = page["particles"].log_evidence
    assert abs(evidence.value + 31.3113) < 4.5 * evidence.standard_error < 0.5
    assert page["draws"]["raw"].shape == (1000, 8)
