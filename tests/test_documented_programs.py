"""The programs printed in the README and in the first page of the documentation run as they stand."""

import re
from pathlib import Path

import pyro
import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/getting_started.md"])
def test_the_first_program_of_a_page_trains_and_samples(page: str) -> None:
    program = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert program is not None
    source, shortened = re.subn(r"range\(2000\)", "range(3)", program[1])
    assert shortened == 1
    namespace: dict[str, object] = {}
    exec(source, namespace)
    assert namespace["samples"].shape == (500, 2)
    assert bool(torch.isfinite(namespace["samples"]).all())
    assert any(name.startswith("denoiser") for name in list(pyro.get_param_store()))
