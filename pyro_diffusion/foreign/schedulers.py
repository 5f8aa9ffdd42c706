"""What the configuration of a scheduler of diffusers says of the model: process, output, variance."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.denoisers import (
    Data,
    EDMPreconditioning,
    Noise,
    Parameterization,
    Score,
    V,
    Velocity,
)
from pyro_diffusion.foreign.learned_range import LearnedRange
from pyro_diffusion.foreign.timesteps import FlowTime, QuarterLogSigma, Sigma, TableTime, cut_at
from pyro_diffusion.schedules import EDM, Rectified, Schedule, TabulatedBetas, VarianceExploding

__all__ = ["Meaning", "meaning_of"]

CLIPPING = ("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler")
TABLES = (
    *CLIPPING,
    "DDIMInverseScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
KARRAS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
EXPLODING = ("ScoreSdeVeScheduler",)

PREDICTIONS: dict[str, Parameterization] = {
    "epsilon": Noise(),
    "sample": Data(),
    "v_prediction": V(),
}
# In place of an alpha-bar of zero, as their Euler schedulers have it, or less if the level before is near.
LEAST_SIGNAL = 2.0**-24


@dataclass(frozen=True)
class Meaning:
    """What a network of such a scheduler is.

    Attributes:
        schedule: of its process.
        time: the timestep of a level.
        parameterization: the meaning of its output.
        variance: of a head, or None.
        large_variance: whether the variance is the larger of the two fixed ones.
        clip: largest absolute value of an estimate of the data, or None.
    """

    schedule: Schedule
    time: Any
    parameterization: Parameterization
    variance: LearnedRange | None = None
    large_variance: bool = False
    clip: float | None = None


class _Config:
    """A configuration whose values are checked as they are asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def refuse(self, key: str, expected: str) -> ValueError:
        return ValueError(f"{key}: got {self.values.get(key)!r}, expected {expected}")

    def choice(self, key: str, default: Any, allowed: Sequence[Any]) -> Any:
        value = self.values.get(key, default)
        if not isinstance(value, str | bool | None) or value not in allowed:
            raise self.refuse(key, f"one of {', '.join(map(repr, allowed))}")
        return value

    def number(
        self, key: str, default: float, above: float = 0.0, below: float = math.inf
    ) -> float:
        value = self.values.get(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not above < value < below
        ):
            raise self.refuse(
                key,
                f"a number above {above:g}" + (f" and below {below:g}" if below < math.inf else ""),
            )
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.choice(key, default, (True, False, None)))

    def count(self, key: str, default: int) -> int:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 10**6:
            raise self.refuse(key, "an integer from 2 to 1000000")
        return value


def meaning_of(values: Mapping[str, Any]) -> Meaning:
    """What a configuration says.

    Raises:
        ValueError: naming a key that cannot be read, and its value.
    """
    config = _Config(values)
    known = (*TABLES, *FLOWS, *KARRAS, *EXPLODING)
    kind = config.choice("_class_name", "DDPMScheduler", known)
    if config.flag("thresholding"):
        raise config.refuse(
            "thresholding", "False: a quantile of a picture is no bound of the data"
        )
    if kind in FLOWS:
        return _flow(config)
    if kind in KARRAS:
        return _karras(config)
    if kind in EXPLODING:
        ends = config.number("sigma_min", 0.01), config.number("sigma_max", 1348.0)
        return Meaning(VarianceExploding(*ends), Sigma(), Score())
    return _table(config, clips=kind in CLIPPING)


def _flow(config: _Config) -> Meaning:
    count = config.count("num_train_timesteps", 1000)
    if config.flag("invert_sigmas"):
        raise config.refuse("invert_sigmas", "False")
    end = cut_at(1 / max(count, 3))
    return Meaning(Rectified(end, -end), FlowTime(float(count)), Velocity())


def _karras(config: _Config) -> Meaning:
    config.choice("prediction_type", "epsilon", ("epsilon",))
    ends = config.number("sigma_min", 0.002), config.number("sigma_max", 80.0)
    schedule = EDM(*ends, rho=config.number("rho", 7.0))
    return Meaning(
        schedule, QuarterLogSigma(), EDMPreconditioning(config.number("sigma_data", 0.5))
    )


def _table(config: _Config, clips: bool) -> Meaning:
    prediction = config.choice("prediction_type", "epsilon", tuple(PREDICTIONS))
    variance = config.choice(
        "variance_type",
        None,
        (None, "fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
    )
    betas = _betas(config)
    zero = config.flag("rescale_betas_zero_snr")
    if zero:
        if prediction == "epsilon":
            raise config.refuse(
                "rescale_betas_zero_snr", "False for epsilon: pure noise says nothing of the data"
            )
        betas = _without_last_signal(betas)
    alphas = (1 - betas).cumprod(0).double()
    if zero:  # below the level before, whatever that is: the table decreases
        alphas[-1] = (alphas[-2] / 4).clamp(max=LEAST_SIGNAL)
    schedule = TabulatedBetas(1 - alphas / torch.cat([torch.ones(1).double(), alphas[:-1]]))
    return Meaning(
        schedule,
        TableTime(schedule.knots),
        PREDICTIONS[prediction],
        LearnedRange(schedule.knots) if variance == "learned_range" else None,
        variance == "fixed_large",
        config.number("clip_sample_range", 1.0) if config.flag("clip_sample", clips) else None,
    )


def _betas(config: _Config) -> Tensor:
    """The table in single precision, as it was computed for training."""
    given = config.values.get("trained_betas")
    if given is not None:
        refusal = config.refuse("trained_betas", "at least two numbers between 0 and 1")
        try:
            betas = torch.as_tensor(given, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise refusal from error
        if betas.dim() != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise refusal
        return betas
    count = config.count("num_train_timesteps", 1000)
    names = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
    name = config.choice("beta_schedule", "linear", names)
    if name == "squaredcos_cap_v2":
        u = torch.arange(count + 1, dtype=torch.float64) / count
        signal = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - signal[1:] / signal[:-1]).clamp(max=0.999).float()
    start, end = (
        config.number("beta_start", 1e-4, below=1),
        config.number("beta_end", 0.02, below=1),
    )
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32).square()
    if name == "sigmoid":
        return (
            torch.sigmoid(torch.linspace(-6, 6, count, dtype=torch.float32)) * (end - start) + start
        )
    return torch.linspace(start, end, count, dtype=torch.float32)


def _without_last_signal(betas: Tensor) -> Tensor:
    """Betas of signal scales that are shifted so that the last is zero (arXiv 2305.08891)."""
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas = root.square()
    return 1 - torch.cat([alphas[:1], alphas[1:] / alphas[:-1]])
