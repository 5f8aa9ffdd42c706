"""What a fuzzed argument is replaced by: the right type with bad content."""

import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion import denoisers, distributions, dynamics, processes, samplers, schedules
from tests.small_diffusions import Tiny

NUMBERS = [0.0, -1.0, 0.5, 1.0, 1e-30, 1e30, math.nan, math.inf, -math.inf, 2, -3]
COUNTS = [0, -1, 1, 2, 7, 10**20, -(10**20), True]
SHAPES = [(), (0,), (-1,), (3, 0), (2, 2), (10**20,), [2], (3,), (1, 2, 2)]
NAMES = ["", "no such name", "euler", "x"]

PROCESS = processes.GaussianProcess(schedules.Cosine())
FULL = schedules.Rectified.full()
# Sound objects of the right type that may not fit where they are put.
OBJECTS: dict[type, list[Callable[[], Any]]] = {
    schedules.Schedule: [
        schedules.Cosine,
        schedules.EDM,
        schedules.LearnedSchedule,
        lambda: FULL,
        lambda: schedules.LogLinear(14.0, -14.0),
    ],
    processes.ForwardProcess: [
        lambda: processes.Absorbing(FULL, 4),
        lambda: processes.Uniform(FULL, 3),
        lambda: processes.Deletion(FULL, 4),
        lambda: processes.GaussianProcess(schedules.EDM()),
        lambda: processes.GaussianProcess(FULL),
        lambda: processes.GaussianProcess(schedules.Cosine(), 0),
        lambda: processes.GaussianProcess(schedules.Cosine(), 3),
    ],
    denoisers.Denoiser: [
        lambda: denoisers.GaussianDenoiser(Tiny((3,)), PROCESS),
        lambda: denoisers.GaussianDenoiser(Tiny((2,), 2), PROCESS),
        lambda: denoisers.LevelsDenoiser(Tiny((3,), 4), PROCESS, denoisers.uniform_levels(4)),
        lambda: denoisers.CategoricalDenoiser(Tiny((3,), 4), processes.Absorbing(FULL, 4)),
        lambda: denoisers.MixtureDenoiser(PROCESS, torch.ones(1), torch.zeros(1, 2), 1.0),
        lambda: denoisers.MixtureDenoiser(PROCESS, torch.ones(1), torch.zeros(1, 3), 1.0),
    ],
    distributions.Decoder: [
        distributions.NormalDecoder,
        lambda: distributions.QuantizedDecoder(4),
        lambda: distributions.CategoricalDecoder(4),
    ],
    distributions.Objective: [
        distributions.Bound,
        distributions.Simple,
        distributions.FlowMatching,
        distributions.Hybrid,
        distributions.RedDiff,
        distributions.MomentRegression,
    ],
    samplers.Sampler: [
        samplers.Ancestral,
        samplers.DDIM,
        samplers.Heun,
        samplers.UniPC,
        samplers.RePaint,
        lambda: samplers.PredictorCorrector(samplers.Ancestral()),
    ],
    dynamics.ODESolver: [
        lambda: dynamics.ODESolver("euler", steps=2),
        lambda: dynamics.ODESolver("bosh3", rtol=0.1, atol=0.1, adjoint=True),
    ],
    dynamics.SDESolver: [
        lambda: dynamics.SDESolver("srk", steps=2),
        lambda: dynamics.SDESolver("heun", adaptive=True, rtol=0.1, atol=0.1),
    ],
    dynamics.TraceEstimator: [
        dynamics.ExactTrace,
        dynamics.Hutchinson,
        lambda: dynamics.HutchPlusPlus(7),
        lambda: dynamics.Hutchinson(seed=0),
    ],
}


def _alternatives(value: Any) -> list[Any] | None:
    """What a value may be replaced by; None if it is left alone."""
    if isinstance(value, bool):
        return [True, False]
    if isinstance(value, int):
        return COUNTS
    if isinstance(value, float):
        return NUMBERS
    if isinstance(value, str):
        return NAMES
    for kind, makers in OBJECTS.items():
        if isinstance(value, kind):
            return makers
    return None


def can_mutate(value: Any) -> bool:
    """Whether there is another value of its kind."""
    if isinstance(value, tuple | list | dict | torch.Size):
        entries = value.values() if isinstance(value, dict) else value
        return bool(value) and any(map(can_mutate, entries))
    return isinstance(value, Tensor) or _alternatives(value) is not None


def mutated(value: Any, random: Random) -> Any:
    """Another value of the same kind."""
    if isinstance(value, Tensor):
        return random.choice(TENSORS)(value, random)
    if isinstance(value, torch.Size | tuple) and all(isinstance(v, int) for v in value):
        return random.choice(SHAPES)
    if isinstance(value, tuple | list):
        return _one_entry(value, random)
    if isinstance(value, dict):
        key = random.choice([k for k in sorted(value) if can_mutate(value[k])])
        return {**value, key: mutated(value[key], random)}
    found = random.choice(_alternatives(value) or [value])
    return found() if callable(found) else found


def _one_entry(value: Any, random: Random) -> Any:
    """A sequence with one entry replaced, one less, or none."""
    entries = list(value)
    where = random.randrange(len(entries))
    kind = random.randrange(4)
    if kind == 0:
        return type(value)(entries[:-1])
    if kind == 1:
        return type(value)()
    if can_mutate(entries[where]):
        entries[where] = mutated(entries[where], random)
    return type(value)(entries)


def _filled(number: float):
    """Put a number at one place."""

    def replace(x: Tensor, random: Random) -> Tensor:
        kind = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        y = x.detach().to(kind).clone().reshape(-1)
        if y.numel():
            y[random.randrange(y.numel())] = number
        return y.reshape(x.shape)

    return replace


def _offset(number: int):
    def replace(x: Tensor, random: Random) -> Tensor:
        y = x.detach().clone().reshape(-1)
        if y.numel():
            i = random.randrange(y.numel())
            y[i] = ~y[i] if y.dtype is torch.bool else y[i] + number
        return y.reshape(x.shape)

    return replace


def _without_last(x: Tensor, random: Random) -> Tensor:
    return x[..., :-1] if x.dim() else x.new_zeros(0)


TENSORS = [
    _filled(math.nan),
    _filled(math.inf),
    _filled(-math.inf),
    _filled(0.5),
    _filled(1e6),
    _offset(-1),
    _offset(1),
    _offset(1000),
    lambda x, random: x.double() if x.is_floating_point() else x.int(),
    lambda x, random: x.half() if x.is_floating_point() else x.float(),
    lambda x, random: x.bfloat16() if x.is_floating_point() else x.to(torch.uint8),
    lambda x, random: x != 0,
    lambda x, random: x.long() if x.is_floating_point() else x.double(),
    lambda x, random: x.to(torch.complex64),
    lambda x, random: x.to_sparse() if x.dim() else x.to("meta"),
    lambda x, random: x.to("meta"),
    lambda x, random: x[:0] if x.dim() else x.new_zeros(0),
    _without_last,
    lambda x, random: x.unsqueeze(0),
    lambda x, random: x.unsqueeze(-1),
    lambda x, random: x.new_zeros(()),
    lambda x, random: x.expand(3, *x.shape),
    lambda x, random: torch.cat([x, x, x], 0) if x.dim() else x.reshape(1),
    lambda x, random: -x if x.dtype != torch.bool else ~x,
    lambda x, random: x.flip(0) if x.dim() else x,
    lambda x, random: x.detach().clone().requires_grad_() if x.is_floating_point() else x,
]
