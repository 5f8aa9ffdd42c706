"""Models of diffusers, trained further here, back to a folder that diffusers reads."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from pyro_diffusion.denoisers import (
    Denoiser,
    GaussianDenoiser,
    VarianceDenoiser,
    unit_variance,
)
from pyro_diffusion.foreign.folders import check_folder
from pyro_diffusion.foreign.learned_range import LearnedRange
from pyro_diffusion.foreign.schedulers import (
    EXPLODING,
    FLOWS,
    KARRAS,
    PREDICTIONS,
    meaning_of,
)
from pyro_diffusion.foreign.timesteps import (
    FlowTime,
    QuarterLogSigma,
    Sigma,
    TableTime,
    TimestepNetwork,
)
from pyro_diffusion.processes import ForwardProcess, GaussianProcess
from pyro_diffusion.schedules import EDM, Schedule, TabulatedBetas

__all__ = ["save_diffusers"]

# What their pipelines look for; those of other networks have parts that no denoiser has.
PIPELINE = {
    "_class_name": "DDPMPipeline",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


def save_diffusers(folder: str | os.PathLike[str], denoiser: Denoiser) -> None:
    r"""Write a denoiser on a network of diffusers as a folder that diffusers reads: JSON and safetensors.

    What :func:`~pyro_diffusion.foreign.load_diffusers` or ``from_diffusers`` made goes back, trained further
    or not. The scheduler follows from the denoiser: a table of betas is a ``DDPMScheduler`` with
    ``trained_betas``, a straight path a ``FlowMatchEulerDiscreteScheduler``, and EDM and VE their own. Its
    choices of sampling (spacing, shift, number of steps) are not part of a denoiser and are diffusers'
    defaults. A ``UNet2DModel`` under a table is saved as a whole ``DDPMPipeline``.

    A network of this package takes the log-SNR and no timestep, so no class of diffusers can load it; nor has
    a folder of diffusers a place for a variance that was measured or has a network of its own.

    Args:
        folder: is made if it is not there; files of those names in it are overwritten.
        denoiser: with a network that has ``save_pretrained``.

    Raises:
        ValueError: naming what diffusers has no place for.
        CheckpointError: if the folder has a pickle in it, with which it could not be read back.
    """
    inner, large = _parts(denoiser)
    network: Any = inner.network.network
    if not callable(getattr(network, "save_pretrained", None)):
        raise ValueError(
            f"denoiser: got a network {type(network).__name__} without save_pretrained, expected one of "
            "diffusers"
        )
    config = _config(inner, large)
    root = Path(folder)
    if root.exists():
        check_folder(root)
    whole = config["_class_name"] == PIPELINE["scheduler"][1]
    whole &= type(network).__name__ == PIPELINE["unet"][1]
    place = "transformer" if "Transformer" in type(network).__name__ else "unet"
    network.save_pretrained(root / place, safe_serialization=True)
    _write(root / "scheduler" / "scheduler_config.json", config)
    if whole:
        _write(root / "model_index.json", PIPELINE)


def _parts(denoiser: Denoiser) -> tuple[GaussianDenoiser, bool]:
    """The denoiser on the foreign network, and whether it has the larger of the two fixed variances."""
    large = isinstance(denoiser, VarianceDenoiser) and denoiser.variance is unit_variance
    inner: Any = denoiser.denoiser if large else denoiser
    if isinstance(inner, VarianceDenoiser):
        raise ValueError(
            f"denoiser: got the variance {inner.variance!r}, expected that of a scheduler: none, "
            "unit_variance or a learned range"
        )
    if not (isinstance(inner, GaussianDenoiser) and isinstance(inner.network, TimestepNetwork)):
        found = type(getattr(inner, "network", inner)).__name__
        raise ValueError(
            f"denoiser: got {type(inner).__name__} on {found}, expected one of load_diffusers or "
            "from_diffusers, whose network takes timesteps"
        )
    return inner, large


def _config(denoiser: GaussianDenoiser, large: bool) -> dict[str, Any]:
    """The configuration of a scheduler under which reading gives this denoiser."""
    time, schedule = denoiser.network.time, _schedule(denoiser.process)
    parameterization = denoiser.parameterization
    config: dict[str, Any] = {}
    if isinstance(time, TableTime) and isinstance(schedule, TabulatedBetas):
        names = {value: name for name, value in PREDICTIONS.items()}
        learned = isinstance(denoiser.variance, LearnedRange)
        fixed = "fixed_large" if large else "fixed_small"
        config = {
            "_class_name": "DDPMScheduler",
            **_table(schedule),
            "prediction_type": names.get(parameterization),
            "variance_type": "learned_range" if learned else fixed,
            "clip_sample": denoiser.clip is not None,
            "clip_sample_range": denoiser.clip or 1.0,
        }
    elif isinstance(time, FlowTime):
        config = {"_class_name": FLOWS[0], "num_train_timesteps": round(time.factor)}
    elif isinstance(time, QuarterLogSigma) and isinstance(schedule, EDM):
        sigma_data = getattr(parameterization, "sigma_data", 0.5)
        config = {"_class_name": KARRAS[0], **_ends(schedule), "rho": schedule.rho}
        config |= {"sigma_data": sigma_data, "prediction_type": "epsilon"}
    elif isinstance(time, Sigma) and not isinstance(schedule, EDM):
        config = {"_class_name": EXPLODING[0], **_ends(schedule)}
    if not config or not _reads_as(config, denoiser, large):
        raise ValueError(
            f"denoiser: got {schedule}, {parameterization}, variance {denoiser.variance}, clip "
            f"{denoiser.clip} on the time {type(time).__name__}, expected what from_diffusers makes of a "
            "scheduler"
        )
    return config


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _schedule(process: ForwardProcess) -> Schedule:
    """The part of a process that a folder has a place for: all of it but the event's dimensions."""
    if type(process) is not GaussianProcess:
        raise ValueError(
            f"denoiser: got a process {type(process).__name__}, expected a GaussianProcess itself"
        )
    parts: dict[str, Any] = dict(process.named_children())
    return parts["schedule"]


def _table(schedule: TabulatedBetas) -> dict[str, Any]:
    """Its betas, in single precision as schedulers have them."""
    signal = torch.sigmoid(schedule.knots)
    betas = 1 - signal / torch.cat([torch.ones_like(signal[:1]), signal[:-1]])
    return {"num_train_timesteps": len(betas), "trained_betas": betas.float().tolist()}


def _ends(schedule: Schedule) -> dict[str, float]:
    """The noise scales at both ends."""
    ends = schedule.log_snr_max, schedule.log_snr_min
    small, large = (math.exp(-end / 2) for end in ends)
    return {"sigma_min": small, "sigma_max": large}


def _reads_as(config: dict[str, Any], denoiser: GaussianDenoiser, large: bool) -> bool:
    """Whether a configuration is read as this denoiser."""
    try:
        found = meaning_of(config)
    except ValueError:
        return False
    times, schedule = torch.linspace(0, 1, 65, dtype=torch.float64), _schedule(denoiser.process)
    levels = found.schedule.log_snr(times), schedule.log_snr(times)
    return (
        type(found.schedule) is type(schedule)
        and torch.allclose(levels[0], levels[1].to(levels[0]), rtol=0, atol=0.01)
        and found.parameterization == denoiser.parameterization
        and type(found.variance) is type(denoiser.variance)
        and (found.large_variance, found.clip) == (large, denoiser.clip)
    )
