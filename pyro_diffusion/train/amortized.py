"""A recipe for the training of an amortized posterior."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.guidance import AmortizedTwist
from pyro_diffusion.infer import AutoAmortized, AutoJoint
from pyro_diffusion.infer.simulators.standardized import shuffled
from pyro_diffusion.train.history import History
from pyro_diffusion.train.trainer import Trainer
from pyro_diffusion.validation import check_number, check_positive_int

__all__ = ["fit_amortized"]

WARM_UP = 100


def fit_amortized(
    guide: AutoAmortized | AutoJoint | AmortizedTwist,
    simulations: Mapping[str, Tensor],
    *,
    steps: int | None = None,
    batch_size: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    held_out: float = 0.1,
    patience: int | None = 6,
    **options: Any,
) -> History:
    """Train an amortized posterior, joint distribution or twist on a fixed number of simulations.

    A recipe on top of :class:`Trainer`, which does it in full generality: AdamW along a cosine, clipped
    gradients, the average of the weights that was best on held-out simulations. The guide is then ready, in
    evaluation mode.

    Args:
        guide: an :class:`~pyro_diffusion.infer.AutoAmortized`, :class:`~pyro_diffusion.infer.AutoJoint` or
            :class:`~pyro_diffusion.guidance.AmortizedTwist`, whose ``training_model`` is trained.
        simulations: of ``guide.simulate`` or ``guide.accept``.
        steps: of the optimizer; 80 times the square root of the number of simulations, within 1000 and
            20,000, if None.
        batch_size: simulations of one step; all if there are fewer.
        lr: learning rate at its height.
        weight_decay: of AdamW.
        held_out: share of the simulations, at random, that is not trained on, in (0, 1).
        patience: validations (of twenty) without a new best one after which training stops.
        options: of :meth:`Trainer.fit`: ``checkpoint``, ``log``, ``progress``, ...

    Returns:
        What happened, in nats of the standardized, unconstrained latents (of a twist, readings).

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x=None):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> guide = AutoAmortized(model, observed=["x"])
        >>> history = fit_amortized(guide, guide.simulate(200), steps=20, patience=None, progress=False)
        >>> len(history.losses)
        20
    """
    if not isinstance(guide, AutoAmortized | AutoJoint | AmortizedTwist):
        raise ValueError(
            f"guide: got {type(guide).__name__}, expected an AutoAmortized, an AutoJoint or an AmortizedTwist"
        )
    if not isinstance(simulations, Mapping) or not all(
        isinstance(value, Tensor) and value.dim() for value in simulations.values()
    ):
        raise ValueError(
            f"simulations: got {type(simulations).__name__}, expected a dictionary of tensors, (n,) + the "
            "shape of each site, as guide.simulate and guide.accept return it"
        )
    if not 0 < check_number("held_out", held_out, above=0) < 1:
        raise ValueError(f"held_out: got {held_out}, expected a share in (0, 1)")
    check_positive_int("batch_size", batch_size)
    check_number("lr", lr, above=0, at_most=1)
    check_number("weight_decay", weight_decay, at_least=0, at_most=100)
    lengths = {name: len(value) for name, value in simulations.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"simulations: got {lengths} rows, expected as many of every site")
    rows = min(lengths.values(), default=0)
    kept = rows - math.ceil(held_out * rows)
    if kept < 1:
        raise ValueError(f"simulations: got {rows} rows, expected some to train on and to hold out")
    count = check_positive_int(
        "steps", min(max(round(80 * math.sqrt(rows)), 1000), 20_000) if steps is None else steps
    )
    rate = functools.partial(_rate, steps=count)
    trainer = Trainer(
        guide.training_model,
        optimizer=functools.partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay),
        schedule=functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=rate),
        clip_norm=5.0,
        ema=0.999 if count >= 2000 else 1 - 2 / max(count, 4),
    )
    order = shuffled(rows)
    return trainer.fit(
        {name: value[order[:kept].to(value.device)] for name, value in simulations.items()},
        steps=count,
        batch_size=min(batch_size, kept),
        validation={
            name: value[order[kept:].to(value.device)] for name, value in simulations.items()
        },
        patience=patience,
        **options,
    )


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: a cosine after a linear start."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
