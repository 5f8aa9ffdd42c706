"""Every public call under a process that overrides its scales: it follows the override, or refuses by name.

The calls are those of the fuzz's catalogue, which has every public name. Patched in for all Gaussian
processes is another ``scales``: one that only writes the same numbers out for each coordinate, under which
no result may change, and one in which each coordinate has its own noise, under which every result must.
"""

import sys
from pathlib import Path

import pyro
import pytest
import torch

import pyro_diffusion
from pyro_diffusion.processes import Ability, ForwardProcess, GaussianProcess
from tests.fuzz import catalogue
from tests.fuzz.test_fuzz import every_call, numbers

WIDTH = 3  # of the data in the catalogue's calls
REFUSALS = tuple(f"which lacks {ability.value}" for ability in Ability)

# Calls that ask a process for levels and whose answer is free of them, and why.
FREE_OF_SCALES: dict[str, str] = {
    "likelihoods.ProgramLikelihood": "scores data; levels are asked for in its trial runs alone",
    "dynamics.KnownData": "a point mass at the data whatever the level",
    "evaluate.posterior_to_arviz": "scores draws that are given",
    "checkpoint.save_model": "writes a file; what it holds is checked on a copy",
    "foreign.load_diffusers": "the call returns the schedule's knots",
    "foreign.save_diffusers": "writes the schedule",
    "infer.AutoAmortized": "simulates, which no noise touches",
    "train.fit_truncated": "the call returns simulations, likewise",
    "foreign.from_azula": "the foreign denoiser takes its own scales, those of one clock",
}


def written_out(process, level):
    """The schedule's own scales, one number for each coordinate."""
    if process.event_dim != 1:
        return level
    wide = torch.ones(WIDTH, dtype=level.t.dtype, device=level.t.device)
    return level._replace(
        log_snr=level.log_snr * wide, alpha=level.alpha * wide, sigma=level.sigma * wide
    )


def tilted(process, level):
    """Another noise level in each coordinate."""
    if process.event_dim != 1:
        return level
    rate, shift = level.t.new_tensor([0.9, 0.8, 0.7]), level.t.new_tensor([0.5, 1.0, -0.5])
    log_snr = rate * level.clock + shift
    gain = torch.exp(0.3 * level.t)
    return level._replace(
        log_snr=log_snr,
        alpha=gain * torch.sigmoid(log_snr).sqrt(),
        sigma=gain * torch.sigmoid(-log_snr).sqrt(),
    )


def outcome(call):
    """A call's numbers, or its refusal, after one seed."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    try:
        return [x.double() for x in numbers(call.function(**call.arguments()))]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def settled(calls):
    """Outcomes of second calls: the first of an object may draw numbers to learn its shapes."""
    for call in calls:
        outcome(call)
    return {call.name: outcome(call) for call in calls}


@pytest.fixture
def under(monkeypatch):
    """Runs calls under a patched process, and says which of them asked it for levels."""

    def run(calls, scales):
        asked = set()

        def counted(process, level):
            asked.update({name} - {""})
            return scales(process, level)

        with monkeypatch.context() as patch:
            patch.setattr(GaussianProcess, "scales", counted)
            patch.setattr(
                GaussianProcess, "abilities", GaussianProcess.abilities - {Ability.ISOTROPIC}
            )
            name = ""
            patch.setattr(catalogue, "LEVEL", catalogue.PROCESS.level(torch.tensor([0.3, 0.6])))
            found = {}
            for call in calls:
                name = call.name
                catalogue.PROCESS.event_dim = 1  # an attribute that is set: nothing is kept
                found[name] = outcome(call)
        catalogue.PROCESS.event_dim = 1
        return found, asked

    return run


@pytest.mark.filterwarnings("ignore")
def test_scales_written_out_change_nothing(under):
    calls = every_call()
    plain = settled(calls)
    found, asked = under(calls, written_out)
    wrong = []
    for name in sorted(asked):
        before, after = plain[name], found[name]
        if isinstance(after, str):
            if not any(refusal in after for refusal in REFUSALS):
                wrong.append(f"{name}: {after}")
        elif isinstance(before, str) or not same(before, after):
            wrong.append(f"{name}: other numbers")
    assert len(asked) > 80
    assert not wrong, "\n".join(wrong)


@pytest.mark.filterwarnings("ignore")
def test_scales_of_each_coordinate_are_followed(under):
    calls = every_call()
    plain = settled(calls)
    found, asked = under(calls, tilted)
    deaf = []
    for name in sorted(asked - FREE_OF_SCALES.keys()):
        before, after = plain[name], found[name]
        if isinstance(after, str):
            if not any(refusal in after for refusal in REFUSALS):
                deaf.append(f"{name}: {after}")
        elif isinstance(before, str) or same(before, after, 1e-7):
            deaf.append(f"{name}: as without")
    assert not deaf, "\n".join(deaf)


def same(before, after, tolerance=1e-4):
    """Whether two results are the same numbers (shapes of levels apart)."""
    if len(before) != len(after):
        return False
    for a, b in zip(before, after, strict=True):
        try:
            a, b = torch.broadcast_tensors(a, b)
        except RuntimeError:
            return False
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
            return False
    return True


@pytest.mark.filterwarnings("ignore")
def test_nobody_reads_the_schedule_behind_the_process(monkeypatch):
    root = Path(pyro_diffusion.__file__).parent
    own = {root / "processes", root / "schedules"}
    culprits = set()
    getattr_of_module = torch.nn.Module.__getattr__

    def watched(process, name):
        if name == "schedule":
            file = Path(sys._getframe(1).f_code.co_filename)
            if root in file.parents and not own & set(file.parents):
                culprits.add(f"{file.relative_to(root)}:{sys._getframe(1).f_lineno}")
        return getattr_of_module(process, name)

    monkeypatch.setattr(ForwardProcess, "__getattr__", watched, raising=False)
    for call in every_call():
        outcome(call)
    assert not culprits
