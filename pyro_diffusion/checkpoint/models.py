"""Whole models in one file: what they are built of, with their weights."""

import copy
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pyro.distributions import TorchDistribution, TransformedDistribution
from torch import Tensor, nn

from pyro_diffusion.checkpoint.building import Builder, Describer
from pyro_diffusion.checkpoint.files import CheckpointError
from pyro_diffusion.checkpoint.saving import listed, load, module_differences, save
from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.base import DenoisedDistribution

__all__ = ["load_model", "save_model"]

# Of the description, not of the file.
VERSION = 1


def save_model(path: str | os.PathLike[str], model: nn.Module | TorchDistribution) -> None:
    """Writes a whole model to one file: everything that :func:`load_model` needs to build it again.

    That is the class and the arguments of every part (network, process, schedule, parameterization, variance,
    decoder, sampler, solver, transforms) as JSON, and the weights and buffers as safetensors. Classes and
    functions stand by name: those of pyro_diffusion, some transforms and noises of Pyro, and yours by
    :func:`register`. One network may be of an unknown class; it is left out but for its weights, and
    :func:`load_model` is given it.

    What is saved can be loaded: the model is built once more before anything is written, so this needs
    memory for a second copy.

    Args:
        path: the file, by convention ``*.safetensors``; replaced in one step, as :func:`save` has it.
        model: a denoiser, one of its distributions (:class:`~pyro_diffusion.distributions.Diffusion`,
            ``DiffusionSDE``, ``ProbabilityFlow``, ``DiffusionCTMC``), or a ``TransformedDistribution`` of
            one. To save averaged weights, call this within ``EMA.average_parameters()``.

    Raises:
        ValueError: naming a part that has no name or was changed after it was built, or weights that are
            NaN or infinite.

    Example:
        >>> import tempfile
        >>> from pyro_diffusion import Cosine, Diffusion, GaussianDenoiser, GaussianProcess, MLP
        >>> denoiser = GaussianDenoiser(MLP(2), GaussianProcess(Cosine()))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(f"{folder}/moons.safetensors", Diffusion(denoiser, (2,), steps=10))
        ...     model = load_model(f"{folder}/moons.safetensors")
        >>> model.sample((3,)).shape
        torch.Size([3, 2])
    """
    _check_model(model)
    describer = Describer()
    description = describer.describe(model, "model")
    roots = describer.roots
    state = {
        "model": {
            "version": VERSION,
            "pyro_diffusion": import_module("pyro_diffusion").__version__,
            "parts": description,
            "frozen": {where: _frozen(root) for where, root in roots.items()},
        },
        "weights": {where: root.state_dict() for where, root in roots.items()},
    }
    problems = [p for where, root in roots.items() for p in _not_finite(root, where)]
    if problems:
        raise ValueError(f"model: got {'; '.join(problems)}, expected finite weights")
    try:
        _built(state, copy.deepcopy(describer.network))
    except ValueError as error:
        raise ValueError(
            f"{error} (does not come back; was it changed after it was built?)"
        ) from error
    save(path, state)


def load_model(
    path: str | os.PathLike[str],
    network: nn.Module | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Builds the model that :func:`save_model` wrote, with its weights, dtypes and frozen parameters.

    It is in ``eval()`` mode. No code of the file is run, nothing is imported by a name in it, and torch's
    random state is left as it was.

    Args:
        path: the file.
        network: for a model whose network is of a class without a name: a module like the one that was
            saved, which becomes the model's own.
        device: where to put it, as torch names it; the CPU by default.

    Returns:
        A denoiser or a distribution, as saved.

    Raises:
        OSError: as :func:`load`.
        CheckpointError: if the file is damaged or no model, is of another version, has a part without a
            name or arguments that its class refuses, or has tensors that are missing, too many, of another
            shape, NaN or infinite; each by its name.
        ValueError: for a device that there is not.
    """
    if not isinstance(network, nn.Module | None):
        raise TypeError(f"network: got {type(network).__name__}, expected a module")
    _check_device(device)
    path = Path(path)
    state = load(path)
    try:
        return _built(state, network, device)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _built(state: Mapping[Any, Any], network: nn.Module | None, device: Any = None) -> Any:
    match state:
        case {"model": {"version": version}} if type(version) is not int or version != VERSION:
            raise ValueError(f"model: got version {version!r}, expected {VERSION}")
        case {
            "model": {"version": _, "parts": dict(parts), "frozen": dict(frozen)},
            "weights": dict(weights),
        }:
            pass
        case _:
            raise ValueError("got no model, expected a file of save_model")
    left = dict(weights)

    def ready(root: nn.Module, where: str) -> None:
        if not isinstance(left.get(where), Mapping):
            raise ValueError(f"{where}: got no weights, expected those of a {type(root).__name__}")
        _restore(root, left.pop(where), where)
        still = frozen.get(where)
        parameters = dict(root.named_parameters())
        if not isinstance(still, list) or any(name not in parameters for name in still):
            raise ValueError(f"{where}: got {still!r} as frozen, expected names of its parameters")
        for name, parameter in parameters.items():
            parameter.requires_grad_(name not in still)
        root.eval().to(device)

    builder = Builder(network, ready, device)
    with torch.random.fork_rng(devices=[]):
        model = builder.build(parts, "model")
    if left:
        raise ValueError(f"{', '.join(left)}: got weights, expected none")
    if network is not None and not builder.used:
        raise ValueError(
            f"network: got a {type(network).__name__}, expected none: all parts of the model have names"
        )
    _check_model(model)
    return model


def _restore(root: nn.Module, state: Mapping[str, Any], where: str) -> None:
    """Load weights in the dtype that they have, all or nothing."""
    problems = module_differences(root, state)
    parameters = dict(root.named_parameters())
    problems += _bad_numbers(state, parameters)
    problems += [
        f"{name} has {state[name].dtype}, expected {p.dtype}"
        for name, p in parameters.items()
        if isinstance(state.get(name), Tensor)
        and state[name].is_floating_point() != p.is_floating_point()
    ]
    if problems:
        raise ValueError(f"{where}: of another {type(root).__name__}: {listed(problems)}")
    for name, tensor in (*parameters.items(), *root.named_buffers()):
        if name in state and state[name].dtype != tensor.dtype:
            tensor.data = tensor.data.to(state[name].dtype)
    root.load_state_dict(state)


def _bad_numbers(state: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[str]:
    """Parameters that are not finite and buffers that are NaN (masks of a network may be infinite)."""
    found = []
    for name, value in state.items():
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            bad = ~value.isfinite() if name in parameters else value.isnan()
            if bool(bad.any()):
                kinds = "NaN or infinite" if name in parameters else "NaN"
                found.append(f"{name} with {int(bad.sum())} {kinds} of {value.numel()} numbers")
    return found


def _not_finite(root: nn.Module, where: str) -> list[str]:
    return [f"{where}: {p}" for p in _bad_numbers(root.state_dict(), dict(root.named_parameters()))]


def _frozen(root: nn.Module) -> list[str]:
    return [name for name, p in root.named_parameters() if not p.requires_grad]


def _check_device(device: Any) -> None:
    try:
        if device is not None and not isinstance(device, torch.device):
            device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device: got {device!r}, expected one that torch has here") from error


def _check_model(model: Any) -> None:
    """Refuse anything but a denoiser, a distribution of one, or a transformed one."""
    base = model
    while type(base) is TransformedDistribution:
        base = base.base_dist
    if not isinstance(base, Denoiser | DenoisedDistribution):
        raise ValueError(
            f"model: got {type(base).__name__}, expected a denoiser, a distribution of one (such as "
            "Diffusion) or a TransformedDistribution of that"
        )
    if isinstance(base, DenoisedDistribution) and base.batch_shape != base._given_batch:
        raise ValueError(
            f"model: got the expanded batch shape {tuple(base.batch_shape)}, expected "
            f"{tuple(base._given_batch)}, that of its context: save it before it is expanded"
        )
