"""The table of processes: its estimate of a gap, and what its verdict finds."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from pyro.distributions import Normal

from pyro_diffusion.denoisers import MixtureDenoiser, TableDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionCTMC, DiffusionSDE
from pyro_diffusion.processes import GaussianProcess, Uniform
from pyro_diffusion.schedules import LogLinear, Rectified

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
F64 = torch.float64


@pytest.fixture(scope="module")
def table():
    """The command, and the package of its rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location("table", BENCHMARKS / "processes.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def right(table, **changes):
    gaps = {"1": (0.4, 0.004), "1000": (0.01, 0.004), "inf": (0.002, 0.004)}
    fields = {
        "name": "any",
        "markov": True,
        "gaps": gaps,
        "samples": {"ancestral": 2.9},
        "ode": 9e-4,
        "claims": {"limit": (1.0, 1.0)},
    }
    for name, value in changes.items():
        fields[name] = {**fields[name], **value} if isinstance(value, dict) else value
    return table.Row(**fields)


def test_a_right_row_is_as_wanted(table):
    assert table.faults(right(table)) == []
    assert table.faults(right(table, markov=False, gaps={"1000": (5.0, 0.01)})) == []
    assert table.faults(table.Row("no bound", False, {}, {"ancestral": -9.0})) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"gaps": {"1": (-0.013, 0.004)}}, "K = 1: above log p"),
        ({"gaps": {"1000": (0.03, 0.004)}}, "K = 1000: not closed"),
        ({"gaps": {"inf": (0.013, 0.004)}}, "K = inf: not closed"),
        ({"gaps": {"1": (0.4, 0.02)}}, "K = 1: too coarse to tell"),
        ({"gaps": {"1": (math.nan, 0.004)}}, "K = 1: above log p"),
        ({"samples": {"ancestral": 3.1}}, "ancestral samples"),
        ({"samples": {"ancestral": math.nan}}, "ancestral samples"),
        ({"ode": 2e-3}, "ODE"),
        ({"claims": {"limit": (1.1, 1.0)}}, "limit"),
    ],
)
def test_a_wrong_row_is_found(table, changes, fault):
    assert table.faults(right(table, **changes)) == [fault]


def normal(table, mean, control):
    """Gaps of normal data N(0.5, 0.3^2) in the plane, whose denoiser believes a mean."""
    process = GaussianProcess(LogLinear(12.0, -12.0))

    def denoiser(mean, scale):
        return MixtureDenoiser(
            process, torch.ones(1), torch.full((1, 2), mean, dtype=F64), scale**2
        )

    def log_p(mean, scale, x):
        return Normal(torch.tensor(mean, dtype=F64), scale).log_prob(x).sum(-1)

    def view(denoiser, steps):
        return DiffusionSDE(denoiser, (2,)) if steps is None else Diffusion(denoiser, (2,), steps)

    x = 0.5 + 0.3 * torch.randn(1000, 2, dtype=F64)
    other = (denoiser(0.0, 1.0), log_p(0.0, 1.0, x)) if control else None
    exact = (denoiser(mean, 0.3), log_p(0.5, 0.3, x))
    return table.process_rows.bound_gaps(view, exact, x, other, steps=(3, None))


def test_the_control_has_no_bias_and_less_noise(table):
    """The bound of normal data is tight at any number of steps: four numbers within 3.5 errors."""
    plain, controlled = (normal(table, 0.5, control) for control in (False, True))
    for steps, (gap, error) in controlled.items():
        assert error < 0.6 * plain[steps][1]
        assert abs(gap) < 3.5 * error
        assert abs(plain[steps][0]) < 3.5 * plain[steps][1]


def test_a_wrong_denoiser_shows(table):
    """A mean that is one standard deviation off costs 2 (1 / 2) nats in continuous time."""
    gap, error = normal(table, 0.8, True)["inf"]
    assert gap == pytest.approx(1, abs=3.5 * error)
    assert gap > 5 * error


@pytest.mark.parametrize("steps", [1, 4, None])
def test_independent_symbols_are_tight_at_any_number_of_steps(table, steps):
    """What the control of symbols rests on: with it or for it, the gap is zero within 3.5 errors."""
    process = Uniform(Rectified.full(), 3)
    alone = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    joint = alone[:, None] * alone
    index = torch.multinomial(joint.flatten(), 2000, replacement=True)
    data = torch.stack([index // 3, index % 3], -1)

    def view(denoiser, count):
        return DiffusionCTMC(denoiser, (2,)) if count is None else Diffusion(denoiser, (2,), count)

    exact = (TableDenoiser(process, joint), joint.flatten().log()[index])
    ((gap, error),) = table.process_rows.bound_gaps(view, exact, data, steps=(steps,)).values()
    assert abs(gap) <= max(3.5 * error, 1e-9)
