"""Fixtures of every test: one seed, an empty parameter store, and global settings left alone."""

import os
import sys
from collections.abc import Iterator

# Before anything imports matplotlib, and inherited by the scripts that tests start.
os.environ.setdefault("MPLBACKEND", "Agg")

import pyro
import pytest
import torch

torch.set_num_threads(1)


def _globals() -> dict[str, object]:
    """What a library must not change behind its user's back."""
    return {
        "torch.distributions validation": torch.distributions.Distribution._validate_args,
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradient mode": torch.is_grad_enabled(),
        **{f"pyro setting {name}": value for name, value in pyro.settings.get().items()},
    }


def _restore(before: dict[str, object]) -> None:
    prefix = "pyro setting "
    pyro.settings.set(
        **{k.removeprefix(prefix): v for k, v in before.items() if k.startswith(prefix)}
    )
    # Last, because Pyro's own switches write to this flag too.
    torch.distributions.Distribution.set_default_validate_args(
        before["torch.distributions validation"]
    )
    torch.set_default_dtype(before["default dtype"])
    torch.set_default_device(before["default device"])
    torch.set_grad_enabled(before["gradient mode"])


# Taken before the package is imported, so that the first test fails if the import changes them.
_AT_START = _globals()


@pytest.fixture(autouse=True)
def isolation() -> Iterator[None]:
    """Start from seed 0 and an empty store; fail a test that leaves a global setting changed.

    A test that needs another setting uses `pyro.settings.context(...)`, which puts it back.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    after = _globals()
    if after != _AT_START:
        changed = [
            f"{name}: was {value}, is {after[name]}"
            for name, value in _AT_START.items()
            if after[name] != value
        ]
        _restore(_AT_START)
        pytest.fail("the test left global settings changed; " + "; ".join(changed))


@pytest.fixture(params=[False, True], ids=["global_params", "local_params"])
def module_local_params(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Run the test in both of Pyro's parameter modes."""
    with pyro.settings.context(module_local_params=request.param):
        yield request.param
