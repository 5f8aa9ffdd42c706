"""What a guide's state says of its program: a table of numbers alone would fit any program of its size."""

import json
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_diffusion.infer.simulators.simulations import Simulator

__all__ = ["check_described", "described"]


def described(simulator: Simulator, trace: Any) -> Tensor:
    """Names of latents and data in their order, and where latents' supports are; bytes of JSON.

    A support is known by the mean of its values at unconstrained zeros and at ones, which is that of one row
    in plates of any size.

    Args:
        simulator: the program and its sites.
        trace: of a run.
    """
    latents = []
    for name in simulator.latents:
        node = trace.nodes[name]
        transform = biject_to(node["fn"].support)
        zeros = torch.zeros_like(transform.inv(node["value"]), dtype=torch.float64)
        ends = (float(transform(zeros + u).double().mean()) for u in (0, 1))
        latents.append([name, *(f"{end:.4g}" for end in ends)])
    text = json.dumps({"latents": latents, "observed": list(simulator.observed)})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def check_described(own: Tensor, stored: Tensor) -> None:
    """Refuse a state of other sites, or of the same in another order or support.

    Raises:
        ValueError: naming them.
    """
    if torch.equal(own.cpu(), stored.cpu()):
        return
    here, there = (json.loads(bytes(each.tolist())) for each in (own, stored))
    key = next(key for key in here if here[key] != there.get(key))
    raise ValueError(
        f"model: got {_words(here[key])} as {key}, expected {_words(there.get(key, []))}, those of the state "
        "that was loaded, in their order"
    )


def _words(sites: list[Any]) -> list[str]:
    return [s if isinstance(s, str) else f"{s[0]} ({s[1]} to {s[2]} at 0 and 1)" for s in sites]
