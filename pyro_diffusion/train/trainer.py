"""A training run of any Pyro program."""

import contextlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_diffusion.optim import EMA
from pyro_diffusion.ranks import ProcessGroup
from pyro_diffusion.train.batches import Arguments, batches_of, rows_of, to_device
from pyro_diffusion.train.history import History
from pyro_diffusion.train.program import Program, check_program
from pyro_diffusion.train.run import Run
from pyro_diffusion.train.sharing import Sharing
from pyro_diffusion.train.units import Unit
from pyro_diffusion.train.updates import MakeOptimizer, MakeSchedule, Updates, check_updates
from pyro_diffusion.train.validation import Validation
from pyro_diffusion.train.weights import Weights
from pyro_diffusion.validation import check_number, check_positive_int

__all__ = ["Trainer"]


class Trainer:
    r"""Stochastic variational inference on minibatches, with all that a long run wants around it.

    A step follows the gradient of

    .. math:: -\frac{1}{c\,n} \operatorname{ELBO}(x_1, \dots, x_n),

    an unbiased estimate if the ELBO's is, in ``unit``. Here n is the number of data that the ELBO speaks of:
    the batch's rows, or the full size of a plate that says it holds a subsample of so many rows
    (``pyro.plate("data", 1000, subsample=index)``). c makes it nats or bits of a datum or of an observed
    coordinate. So the loss is what is printed, gradients of several batches are averaged, and a program needs
    no ``poutine.scale`` of its own.

    What is trained: parameters of ``model`` and ``guide`` where they are modules or methods of modules, and
    parameters that the program takes from Pyro's store (``pyro.param``, ``pyro.module``, autoguides), found
    by one run of it before the first step. With ``pyro.settings.set(module_local_params=True)`` the modules'
    own are all there are. They are updated in place, so the store and the modules agree.

    When :meth:`fit` returns, the modules are in evaluation mode and hold the averaged weights, the best of
    them if there was a validation. Training goes on from the unaveraged ones if it is called again.

    Args:
        model: a Pyro program, called with a batch; or ``Trace_ELBO()(model, guide)`` alone.
        guide: its guide; None for an empty one.
        optimizer: makes a torch optimizer of a list of parameters, e.g.
            ``functools.partial(torch.optim.AdamW, lr=1e-3)``; or makes several.
        schedule: makes a torch scheduler of an optimizer; it is stepped once a step.
        loss: an ELBO with a ``differentiable_loss``; ``Trace_ELBO()`` if None.
        unit: "nats/datum", "bits/datum", or nats or bits per observed coordinate by any name for one:
            "nats/dim", "bits/dim", "bits/char".
        ema: decay of the average of the weights (:class:`~pyro_diffusion.optim.EMA`), in [0, 1); None for
            no average.
        clip_norm: largest norm of the gradient of the loss in ``unit``, of all parameters together.
        accumulate: batches whose gradients make one step. Their mean, weighted by rows, is the gradient of
            one batch of all rows.
        autocast: a dtype, such as ``torch.bfloat16``, in which networks compute (:class:`torch.autocast`);
            parameters, and the loss of this package's distributions, stay as they are.
        allow_unused: whether parameters may be without a gradient.
        process_group: the processes that share each step, such as ``torch.distributed.group.WORLD`` (None
            before ``init_process_group``); each has the whole data, or a loader with a
            ``DistributedSampler``, and takes batches of its own of ``batch_size`` rows. Gradients are means
            over all rows, by ``DistributedDataParallel``; noise is that of
            :func:`~pyro_diffusion.processes.global_batch`; the first rank writes files and the bar. None for
            this process alone.

    Attributes:
        step: steps taken.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:
        >>> import functools, pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.zeros(2))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)
        >>> trainer = Trainer(model, optimizer=functools.partial(torch.optim.Adam, lr=0.1), ema=0.9)
        >>> history = trainer.fit(torch.randn(100, 2) + 3, steps=200, batch_size=20, progress=False)
        >>> bool((pyro.param("loc") - 3).abs().max() < 0.5)
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None = None,
        *,
        optimizer: MakeOptimizer,
        schedule: MakeSchedule | None = None,
        loss: ELBO | None = None,
        unit: str = "nats/datum",
        ema: float | None = 0.999,
        clip_norm: float | None = None,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
        allow_unused: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.sharing = Sharing(process_group)
        self.program = Program(*check_program(model, guide, loss), Unit(unit))
        check_updates(optimizer, schedule, clip_norm)
        if ema is not None and check_number("ema", ema, at_least=0) >= 1:
            raise ValueError(f"ema: got {ema}, expected a number in [0, 1), or None")
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"autocast: got {autocast!r}, expected torch.bfloat16, torch.float16, or None"
            )
        self.accumulate = check_positive_int("accumulate", accumulate)
        self.autocast = autocast
        self.step = 0
        self._history = History(unit)
        self._updating = (optimizer, schedule, clip_norm, allow_unused)
        self._settings = {
            "unit": unit,
            "ema": ema,
            "clip_norm": clip_norm,
            "accumulate": accumulate,
            "autocast": None if autocast is None else str(autocast),
        }
        self._losses: list[Tensor] = []  # on their device, not yet in the history
        self._weights: Weights | None = None
        self._updates: Updates | None = None

    def fit(
        self,
        data: Any = None,
        *,
        steps: int,
        batch_size: int | None = None,
        validation: Any = None,
        validate_every: int | None = None,
        patience: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        save_every: int | None = None,
        description: Mapping[str, Any] | None = None,
        log: str | os.PathLike[str] | None = None,
        log_every: int = 10,
        callback: Callable[["Trainer"], object] | None = None,
        progress: bool = True,
    ) -> History:
        """Train until ``steps`` steps were taken in all, those of earlier calls and of a checkpoint included.

        Args:
            data: a tensor of rows; a tuple of tensors, the program's arguments; a dictionary of them, its
                keyword arguments; a ``DataLoader`` of such batches; None for a program that draws its own
                subsample.
            steps: of the optimizer.
            batch_size: rows of one batch; all if None.
            validation: held-out data of the same kind, whose mean loss of a few passes is taken, or a
                function without arguments that returns a number, lower being better. Either runs with the
                averaged weights, in evaluation mode, without gradients and from the same seed each time.
            validate_every: steps between validations, a twentieth of ``steps`` by default; there is one after
                the last step, also if ``callback`` made it the last.
            patience: validations without a new best one after which training stops.
            checkpoint: a file ``*.safetensors``. If it exists, training goes on from it, and ends bit for bit
                where it would have ended; it is written every ``save_every`` steps and after the last.
            save_every: steps between checkpoints; only after the last if None.
            description: what else the checkpoint belongs to, as JSON: the arguments of networks, the seed.
            log: a file ``*.csv`` for a table of the run, or a folder for TensorBoard if that is installed.
            log_every: steps between rows of it, each with the mean loss; on an accelerator, losses are
                fetched no more often.
            callback: called with the trainer after every step, on every process; training stops if it returns
                True on any.
            progress: whether to show a bar.

        Raises:
            ValueError: naming the argument, what it was and what was expected; for parameters without a
                gradient and those that appear late.
            FloatingPointError: for a loss that is not finite, naming the step.
            CheckpointError: for the checkpoint of another run.
        """
        check_positive_int("steps", steps)
        for name, value in (("validate_every", validate_every), ("save_every", save_every)):
            if value is not None:
                check_positive_int(name, value)
        if checkpoint is None and steps <= self.step:
            raise ValueError(
                f"steps: got {steps} and a trainer that has taken {self.step}, expected more, counted in all"
            )
        self.sharing.agree(steps=steps, validate_every=validate_every, save_every=save_every)
        self._agree(patience, validation=validation, callback=callback, checkpoint=checkpoint)
        batches = batches_of(data, batch_size, self.sharing)
        first = batches.first()
        weights, updates = self._prepare(first)
        self.sharing.agree_on(updates.settings)
        size = rows_of(*first) if any(first) else 1
        check = None
        if validation is not None:
            check = Validation(validation, self._loss, size, self.program.device, self.sharing)
        state = (weights, updates, batches)
        run = Run(
            self, state, steps, check, validate_every, patience, callback, log_every, progress
        )
        settings = {**self._settings, **batches.settings, "dtype": weights.dtype}
        run.keep_in(checkpoint, save_every, settings, description)
        self._history.stopped = None
        run.resume()
        weights.resume()
        with run.reporting(log):
            run.train()
        weights.finish()
        return self.history

    @property
    def history(self) -> History:
        """What happened so far."""
        if self._losses:
            start = self.step - len(self._losses)
            losses = torch.stack(self._losses).double()
            found = (self.sharing.total(losses) / self.sharing.size).tolist()
            self._losses.clear()
            for step, value in enumerate(found, start + 1):
                _check_finite(value, step)
            self._history.losses += found
        return self._history

    @property
    def average(self) -> EMA | None:
        """The average of the weights; None before the first step, or if there is to be none."""
        return None if self._weights is None else self._weights.average

    def averaged(self) -> AbstractContextManager[None]:
        """Averaged weights and evaluation mode for the duration of a ``with`` block, for use in a callback.

        Raises:
            ValueError: before :meth:`fit`.
        """
        if self._weights is None:
            raise ValueError("averaged: got a trainer before its first step, expected one after")
        return self._weights.usable()

    def _agree(self, patience: int | None, **given: object) -> None:
        """Refuse ranks with other settings, or of which some were given what others were not."""
        found = {name: value is not None for name, value in given.items()}
        self.sharing.agree_on({**self._settings, "patience": patience, **found})

    def _prepare(self, batch: Arguments) -> tuple[Weights, Updates]:
        """Before the first step: find what there is to train."""
        if self._weights is not None and self._updates is not None:
            return self._weights, self._updates
        args, kwargs = batch
        with self._cast(_device_of(batch)):
            self.program.prepare(*args, **kwargs)
        double = [name for name, p in self.program.trained() if p.dtype == torch.float64]
        if self.autocast is not None and double:
            raise ValueError(
                f"autocast: got {self.autocast} and {double[0]} of torch.float64, which it leaves as it is; "
                "expected torch.float32"
            )
        self._module = self.sharing.wrap(self.program, self._updating[-1])
        self.sharing.seed = self.sharing.draw_seed() if self.sharing.group is not None else 0
        self._weights = Weights(self.program.parts, self._settings["ema"])  # type: ignore[arg-type]
        self._updates = Updates(self.program.trained(), *self._updating)
        return self._weights, self._updates

    def _cast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast)

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Of this process, without what it shares with others."""
        with self._cast(self.program.device):
            return self.program(*args, **kwargs)

    def _advance(self, batches: Any) -> None:
        """One step."""
        assert self._updates is not None and self._weights is not None
        device = self.program.device
        parts = [to_device(batches.next(), device) for _ in range(self.accumulate)]
        rows = [rows_of(*part) if any(part) else 1 for part in parts]
        # Gradients are averaged over ranks, so that a row weighs one over the mean rows of a rank.
        mean_rows = sum(rows) if batches.even else self.sharing.mean(sum(rows))
        loss, first = torch.zeros((), device=device), self.step * self.accumulate
        for i, ((args, kwargs), count) in enumerate(zip(parts, rows, strict=True)):
            with self.sharing.part(self._module, count, first + i, last=i + 1 == len(parts)):
                with self._cast(device):
                    share = self._module(*args, **kwargs) * (count / mean_rows)
                share.backward()
            loss = loss + share.detach()
        if self.step == 0:
            self._updates.check()
        if device.type == "cpu":  # where looking costs nothing
            _check_finite(float(loss), self.step + 1)
        self._updates.step()
        self._weights.update()
        self._losses.append(loss)
        self.step += 1


def _device_of(batch: Arguments) -> torch.device:
    args, kwargs = batch
    found = [part.device for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
    return found[0] if found else torch.get_default_device()


def _check_finite(loss: float, step: int) -> None:
    if not abs(loss) < float("inf"):
        raise FloatingPointError(
            f"loss: got {loss} at step {step}, expected a finite number; look for such numbers in the data, "
            "lower the learning rate, or set clip_norm; a checkpoint, if any, is of a step before"
        )
