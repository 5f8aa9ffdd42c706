"""What a cell of the table is made of: draws of one method, trained on one task's simulations."""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.infer import AutoAmortized
from pyro_diffusion.train import fit_amortized
from sbi_parts import peer, task
from sbi_parts.programs import LATENTS, base

__all__ = ["DRAWS", "OURS", "cell", "trained"]

DRAWS = 2000
OURS = "ours"

Trained = tuple[AutoAmortized, dict[str, Tensor], dict[str, Any]]
_TRAINED: dict[tuple[Any, ...], Trained] = {}  # parts of one run share guides


def latents(name: str) -> list[str]:
    """A task's latents of interest."""
    return LATENTS.get(base(name), ["theta"])


def vectors(name: str, values: dict[str, Tensor]) -> Tensor:
    """A task's latents in one vector."""
    sites = latents(name)
    return values[sites[0]] if len(sites) == 1 else torch.stack([values[n] for n in sites], -1)


def simulated(
    name: str, count: int, seed: int, folder: Path | None, solver: ODESolver | None = None
) -> tuple[AutoAmortized, dict[str, Tensor], dict[str, Tensor]]:
    """A guide before its training, its simulations and the references: a function of the seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, data = task(name, folder)
    guide = AutoAmortized(model, observed=["x"], latents=latents(name), solver=solver)
    return guide, guide.simulate(count), data


def trained(
    name: str, count: int, seed: int, args: argparse.Namespace, solver: ODESolver | None = None
) -> Trained:
    """A guide, the references, and what its training took."""
    if (name, count, seed, solver) in _TRAINED:
        return _TRAINED[name, count, seed, solver]
    start, cpu = time.perf_counter(), time.process_time()
    guide, simulations, data = simulated(name, count, seed, args.data, solver)
    options: dict[str, Any] = {} if args.steps is None else {"steps": args.steps}
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        kept = args.keep / f"{name}-{count}-{OURS}-{seed}.safetensors"
        options |= {"checkpoint": kept, "save_every": 1000}
    history = fit_amortized(guide, simulations, progress=args.progress, **options)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    whole = max(seconds, history.seconds)  # longer if a killed run was taken up
    took = {
        "steps": len(history.losses),
        "seconds": whole,
        "cpu": cpu * whole / seconds,
        "parameters": sum(each.numel() for each in guide.parameters()),
    }
    _TRAINED[name, count, seed, solver] = guide, data, took
    return guide, data, took


def own_draws(name: str, guide: AutoAmortized, observations: Tensor, device: str) -> list[Tensor]:
    """Draws of the guide at every observation."""
    guide.to(device)
    with torch.device(device), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")  # of observations at the edge: one in a thousand
        draws = [vectors(name, guide.draw(DRAWS, {"x": x.to(device)})).cpu() for x in observations]
    guide.to("cpu")
    for each in dict.fromkeys(str(warning.message) for warning in told):
        print(f"{name}: {each}", flush=True)
    return draws


def on(device: str, draw: Callable[[str], list[Tensor]]) -> list[Tensor]:
    """What is drawn on a device, or on the processor where a method knows no other."""
    try:
        return draw(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        if device == "cpu":
            raise
        print(f"drawn on the processor, not on {device}: {error}", flush=True)
        return draw("cpu")


def cell(
    name: str, count: int, seed: int, method: str, args: argparse.Namespace
) -> tuple[list[Tensor], dict[str, Any]]:
    """Draws at the ten observations and what their training took, kept in a folder if one is named."""
    kept = args.keep and args.keep / f"{name}-{count}-{method}-{seed}.npz"
    if kept and kept.exists():
        with np.load(kept, allow_pickle=False) as file:
            took = {key: file[key].item() for key in file if key != "draws"}
            return list(torch.from_numpy(file["draws"])), took
    if method == OURS:
        guide, data, took = trained(name, count, seed, args)
        chosen = data["observations"][: args.observations]
        start = time.perf_counter()
        draws = on(args.device, lambda device: own_draws(name, guide, chosen, device))
    else:
        seconds = args.seconds or cell(name, count, seed, OURS, args)[1]["cpu"]
        guide, simulations, data = simulated(name, count, seed, args.data)
        parameters = sum(each.numel() for each in guide.parameters())
        posterior, took = peer.fit(method, name, simulations, parameters, seconds)
        start = time.perf_counter()
        draws = on(
            args.device,
            lambda device: [
                peer.draw(posterior(device), DRAWS, x.to(device)).cpu()
                for x in data["observations"][: args.observations]
            ],
        )
    took["drawing"] = time.perf_counter() - start
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(kept, draws=torch.stack(draws).numpy(), **took)
    return draws, took
