"""Folders of foreign models: JSON and safetensors are read, anything that would run code is refused."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from pyro_diffusion.checkpoint import CheckpointError
from pyro_diffusion.checkpoint.saving import listed, module_differences

__all__ = ["check_folder", "load_weights", "read_json"]

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_INDEX = ".safetensors.index.json"


def check_folder(folder: Path) -> None:
    """Refuse what is no folder, or has a pickle anywhere in it.

    Raises:
        NotADirectoryError: if there is none.
        CheckpointError: naming the pickles.
    """
    if not folder.is_dir():
        raise NotADirectoryError(
            20, "no such folder, expected one of a model (nothing is downloaded)", str(folder)
        )
    found = sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in _PICKLES
    )
    if found:
        raise CheckpointError(
            f"{folder}: got {', '.join(found[:5])}, expected no pickles, which run code when loaded; "
            "save the model as safetensors (save_pretrained does) and remove them"
        )


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        CheckpointError: for anything else.
    """
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: got no readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: got {type(found).__name__}, expected an object of JSON")
    return found


def load_weights(folder: Path, network: nn.Module) -> None:
    """Load the safetensors of a folder into a network, all or nothing.

    Raises:
        CheckpointError: naming every tensor that is missing, too many, of another shape, NaN or infinite.
    """
    state: dict[str, Tensor] = {}
    for path in _files(folder):
        try:
            part = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: got no readable safetensors: {error}") from error
        state |= part
    problems = module_differences(network, state)
    bad = [k for k, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    problems += [f"{key} has NaN or infinite numbers" for key in bad]
    if problems:
        raise CheckpointError(f"{folder}: of another {type(network).__name__}: {listed(problems)}")
    network.load_state_dict(state)


def _files(folder: Path) -> list[Path]:
    """The files of a network's weights: one, or those of an index."""
    indices = sorted(folder.glob(f"*{_INDEX}"))
    if len(indices) == 1:
        names = read_json(indices[0]).get("weight_map")
        if not isinstance(names, dict) or not all(_is_name(v) for v in names.values()):
            raise CheckpointError(
                f"{indices[0]}: got weight_map {names!r}, expected files of this folder"
            )
        return [folder / name for name in sorted(set(names.values()))]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names_found = ", ".join(p.name for p in found) or "none"
        raise CheckpointError(
            f"{folder}: got {names_found}, expected one file of safetensors, or an index of them"
        )
    return found


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and Path(value).name == value
