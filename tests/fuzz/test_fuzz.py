"""Spoilt arguments: each call works, or is refused by an error of the package that names the argument."""

import dataclasses
import importlib
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from tests.fuzz import catalogue, catalogue_inference
from tests.fuzz.mutations import can_mutate, mutated

# A call on tiny shapes takes milliseconds; one that has not come back by then would not.
SECONDS = 10

# name or names: got what it was, expected what would do
NAMED = re.compile(r"^[\w ,.:'\[\]()*-]{1,80}: got .+expected ", re.DOTALL)
# what torch's own distributions say of a parameter or a value
TORCH = re.compile(r"^Expected (value argument|parameter \w+) ")


class Endless(Exception):
    """A call that did not come back."""


def numbers(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Every real tensor and number inside a result."""
    if isinstance(value, Tensor):
        if not value.is_meta and (value.is_floating_point() or value.is_complex()):
            yield value.detach().to_dense()
    elif isinstance(value, float):
        yield torch.tensor(value)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from numbers(part, depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for part in dataclasses.fields(value):
            yield from numbers(getattr(value, part.name), depth + 1)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes) and depth < 5:
        for part in value:
            yield from numbers(part, depth + 1)


def is_finite(value: Any, infinite: bool = False) -> bool:
    bad = torch.isnan if infinite else lambda x: ~torch.isfinite(x)
    return not any(bool(bad(x).any()) for x in numbers(value))


def verdict(call: catalogue.Call, arguments: dict[str, Any]) -> tuple[str, str]:
    """What became of a call: fine, refused, obscure, endless or silent; and its message."""

    def stop(*_: Any) -> None:
        raise Endless

    finite = is_finite(arguments)
    pyro.clear_param_store()
    torch.manual_seed(0)
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = call.function(**arguments)
            signal.setitimer(signal.ITIMER_PROF, 0)
            if finite and not is_finite(result, call.infinite):
                return "silent", "a NaN or infinite number from finite ones"
        return "fine", ""
    except Endless:
        return "endless", f"no answer in {SECONDS} s of the processor"
    except Exception as error:
        # An error of the user's own network or program keeps its type; a note names the argument. Errors of
        # the system name the file.
        said = [str(error)] if isinstance(error, ValueError | TypeError) else []
        if isinstance(error, OSError) and error.filename is not None:
            return "refused", str(error)
        said += getattr(error, "__notes__", [])
        named = any(NAMED.match(line) or TORCH.match(line) for line in said)
        return "refused" if named else "obscure", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def every_call() -> list[catalogue.Call]:
    """The whole catalogue."""
    names = {**vars(catalogue), **vars(catalogue_inference)}
    return [call for name, part in names.items() if name.endswith("_calls") for call in part()]


def fuzz(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Verdicts of so many calls, and a line for each that is at fault."""
    random = Random(seed)
    calls = [c for c in every_call() if any(map(can_mutate, c.arguments().values()))]
    weights = [call.weight for call in calls]
    found: Counter[str] = Counter()
    faults = []
    for _ in range(count):
        (call,) = random.choices(calls, weights)
        good = call.arguments()
        name = random.choice([k for k in sorted(good) if can_mutate(good[k])])
        torch.manual_seed(0)
        bad = mutated(good[name], random)
        kind, message = verdict(call, {**good, name: bad})
        found[kind] += 1
        if kind not in ("fine", "refused"):
            faults.append(f"{kind}: {call.name}({name}={bad!r}): {message}"[:400])
    return found, faults


def public_names() -> set[str]:
    """What the package says is public, as module.name."""
    modules = (
        "schedules processes denoisers samplers distributions dynamics likelihoods guidance infer evaluate "
        "foreign nn optim train"
    )
    found = set()
    for module in modules.split():
        names = importlib.import_module(f"pyro_diffusion.{module}").__all__
        found |= {f"{module}.{name}" for name in names}
    return found


def test_every_good_call_works():
    bad = {c.name: v for c in every_call() if (v := verdict(c, c.arguments()))[0] != "fine"}
    assert not bad


def test_every_public_name_is_called():
    called = {".".join(call.name.split(".")[:2]) for call in every_call()}
    assert public_names() == called & public_names() | catalogue.NOT_CALLED.keys()
    assert not called & catalogue.NOT_CALLED.keys()


# Seconds for 5000 calls; the slow one is for after a change of many doors.
@pytest.mark.parametrize(
    ("count", "seed"), [(5000, 0), pytest.param(50_000, 1, marks=pytest.mark.slow)]
)
def test_spoilt_arguments(count, seed):
    found, faults = fuzz(count, seed)
    assert not faults, "\n".join(faults)
    # The catalogue is of no use if nothing is spoilt, or nothing survives it.
    assert min(found["fine"], found["refused"]) > count / 4
    assert found.total() == count


if __name__ == "__main__":
    counts, lines = fuzz(int(sys.argv[1]), int(sys.argv[2]))
    print(dict(counts), *sorted(lines), sep="\n")
