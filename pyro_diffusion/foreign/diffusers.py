"""Models of diffusers: a network and the configuration of a scheduler, from memory or a local folder."""

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from pyro_diffusion.checkpoint import CheckpointError
from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser, VarianceDenoiser, unit_variance
from pyro_diffusion.foreign.edm import check_module
from pyro_diffusion.foreign.folders import check_folder, load_weights, read_json
from pyro_diffusion.foreign.schedulers import meaning_of
from pyro_diffusion.foreign.timesteps import TimestepNetwork
from pyro_diffusion.processes import GaussianProcess

__all__ = ["from_diffusers", "load_diffusers"]

# What may be built by the name that a folder gives. Others are given as modules.
_NETWORKS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
_PLACES = ("unet", "transformer", ".")


def from_diffusers(
    network: nn.Module,
    scheduler: Any,
    event_dim: int = 3,
    context_event_dims: dict[str, int] | None = None,
) -> Denoiser:
    r"""A network of diffusers and the configuration of its scheduler as a denoiser.

    The configuration says under which process and as what the network was trained, and that is all that is
    taken from it; steps and samplers are ours to choose. A table of T betas becomes
    :class:`~pyro_diffusion.schedules.TabulatedBetas`: a uniform grid of T - 1 steps *is* its chain, on which
    ``Ancestral()`` takes the steps of their ``DDPMScheduler`` and ``DDIM()`` those of ``DDIMScheduler``. The
    network gets its own timesteps, whole numbers at the table's levels and between them linear in the
    log-SNR.

    ===========================  ============================================================
    of the configuration         becomes
    ===========================  ============================================================
    epsilon, sample, v, flow     ``Noise``, ``Data``, ``V``, ``Velocity``
    fixed_small, fixed_large     a point mass, ``unit_variance``
    learned_range                a variance with the same reverse steps (``LearnedRange``)
    clip_sample                  ``GaussianDenoiser(clip=)``
    zero terminal SNR            a last :math:`\bar\alpha` of at most :math:`2^{-24}`; refused for epsilon
    flow matching                ``Rectified`` from sigma = 1/T to 1 - 1/T
    EDM schedulers               ``EDMPreconditioning`` under ``EDM``
    score SDE (VE)               ``Score`` under ``VarianceExploding``
    ===========================  ============================================================

    Args:
        network: called as ``network(x_t, timestep, **context)``, such as a ``UNet2DModel``.
        scheduler: the configuration, a mapping as in ``scheduler_config.json``, or a scheduler, whose
            ``config`` it is. ``_class_name`` says which; ``DDPMScheduler`` if there is none.
        event_dim: number of dimensions of one datum, 3 for images.
        context_event_dims: event dimensions of context, ``{"encoder_hidden_states": 2}`` for texts.

    Raises:
        ValueError: naming the key of the configuration that cannot be read, and its value.

    Example:
        >>> import torch
        >>> class Zero(nn.Module):
        ...     def forward(self, x, timestep):
        ...         return torch.zeros_like(x)
        >>> denoiser = from_diffusers(Zero(), {"num_train_timesteps": 100, "clip_sample": False})
        >>> denoiser(torch.ones(1, 3, 8, 8), 0.5).mean.shape
        torch.Size([1, 3, 8, 8])
    """
    check_module(network)
    if hasattr(scheduler, "config"):
        name = type(scheduler).__name__
        scheduler = {"_class_name": name, **scheduler.config}
    if not isinstance(scheduler, Mapping):
        raise ValueError(
            f"scheduler: got {type(scheduler).__name__}, expected a mapping or a scheduler of diffusers"
        )
    meaning = meaning_of(scheduler)
    denoiser = GaussianDenoiser(
        TimestepNetwork(network, meaning.time, 1 if meaning.variance is None else 2),
        GaussianProcess(meaning.schedule, event_dim=event_dim),
        meaning.parameterization,
        meaning.variance,
        context_event_dims=context_event_dims,
        clip=meaning.clip,
    )
    return VarianceDenoiser(denoiser, unit_variance) if meaning.large_variance else denoiser


def load_diffusers(
    folder: str | os.PathLike[str],
    network: nn.Module | None = None,
    context_event_dims: dict[str, int] | None = None,
) -> Denoiser:
    """A model that ``save_pretrained`` of diffusers wrote, from a local folder of JSON and safetensors.

    Args:
        folder: with ``scheduler/scheduler_config.json`` and ``unet/`` or ``transformer/``, or with all files
            in the folder itself.
        network: a module for the weights; by default one of diffusers' (``UNet2DModel``,
            ``UNet2DConditionModel``, ``DiTTransformer2DModel``) by the folder's ``config.json``, which needs
            diffusers installed.
        context_event_dims: see :func:`from_diffusers`.

    Raises:
        OSError: if there is no such folder.
        CheckpointError: if there is a pickle in it, a file is missing or unreadable, the network is of
            another class, or tensors are missing, too many, of another shape, NaN or infinite.
        ValueError: as :func:`from_diffusers`.
        ImportError: if diffusers is needed and not installed.
    """
    root = Path(folder)
    check_folder(root)
    scheduler = read_json(_find(root, ("scheduler", "."), "scheduler_config.json"))
    config = _find(root, _PLACES, "config.json")
    if network is None:
        network = _build(config)
    check_module(network)
    denoiser = from_diffusers(network, scheduler, context_event_dims=context_event_dims)
    load_weights(config.parent, network)
    return denoiser.eval()


def _find(root: Path, places: tuple[str, ...], name: str) -> Path:
    found = [root / place / name for place in places if (root / place / name).is_file()]
    if not found:
        expected = ", ".join(str(Path(place) / name) for place in places)
        raise CheckpointError(f"{root}: got no {name}, expected {expected}")
    return found[0]


def _build(path: Path) -> nn.Module:
    """The network that a configuration describes, with random weights."""
    config = read_json(path)
    name = config.get("_class_name")
    if name not in _NETWORKS:
        raise CheckpointError(
            f"{path}: _class_name: got {name!r}, expected one of {', '.join(_NETWORKS)}; or give network=, a "
            "module for these weights"
        )
    try:
        diffusers: Any = import_module("diffusers")
    except ImportError as error:
        raise ImportError(
            f"{path}: a {name} needs diffusers: pip install diffusers; or give network=, a "
            "module for these weights"
        ) from error
    try:
        network: nn.Module = getattr(diffusers, name).from_config(config)
    except Exception as error:  # whatever it makes of what a file says
        raise CheckpointError(f"{path}: refused by diffusers' {name}: {error}") from error
    return network
