"""The loop of one call of ``Trainer.fit``."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pyro_diffusion import checkpoint
from pyro_diffusion.train.batches import Batches, LoaderBatches, check_repeatable
from pyro_diffusion.train.logs import Log, check_path, open_log
from pyro_diffusion.train.randomness import rng_state, set_rng_state
from pyro_diffusion.train.updates import Updates
from pyro_diffusion.train.validation import Validation
from pyro_diffusion.train.weights import Weights
from pyro_diffusion.validation import check_positive_int, kind_of

if TYPE_CHECKING:
    from pyro_diffusion.train.trainer import Trainer

__all__ = ["Run"]


class Run:
    """What happens when: steps, validations, rows of the log, checkpoints.

    Args: as those of ``Trainer.fit``, checked here.
    """

    def __init__(
        self,
        trainer: "Trainer",
        state: tuple[Weights, Updates, Batches],
        steps: int,
        validation: Validation | None,
        validate_every: int | None,
        patience: int | None,
        callback: Callable[["Trainer"], object] | None,
        log_every: int,
        progress: bool,
    ) -> None:
        self.trainer, self.steps = trainer, steps
        self.weights, self.updates, self.batches = state
        self.validation, self.callback, self.progress = validation, callback, progress
        self.log_every = check_positive_int("log_every", log_every)
        for name, value in (("validate_every", validate_every), ("patience", patience)):
            if value is not None:
                check_positive_int(name, value)
                if validation is None:
                    raise ValueError(f"{name}: got {value} and no validation, expected None")
        if callback is not None and not callable(callback):
            raise ValueError(f"callback: got {kind_of(callback)}, expected a function")
        self.validate_every = validate_every or max(steps // 20, 1)
        self.patience = patience
        self.path: Path | None = None
        self.save_every: int | None = None
        self.log: Log | None = None
        self.bar: Any = None
        self.logged = len(trainer.history.losses)  # losses that are in a row of the log

    def keep_in(
        self,
        path: str | os.PathLike[str] | None,
        save_every: int | None,
        settings: dict[str, Any],
        description: Mapping[str, Any] | None,
    ) -> None:
        """Write checkpoints.

        Raises:
            ValueError: for data whose order cannot be repeated.
        """
        if save_every is not None:
            check_positive_int("save_every", save_every)
        if path is None:
            if save_every is not None:
                raise ValueError(f"save_every: got {save_every} and no checkpoint, expected None")
            return
        if not isinstance(description, Mapping | None):
            raise ValueError(f"description: got {kind_of(description)}, expected a dictionary")
        self.path, self.save_every = check_path("checkpoint", path), save_every
        self.description = {"trainer": settings, "description": dict(description or {})}
        try:
            json.dumps(self.description["description"], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"description: got {description}, expected JSON: {error}") from error
        if isinstance(self.batches, LoaderBatches):
            check_repeatable(self.batches.loader)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one of a later step."""
        trainer = self.trainer
        if self.path is None or not self.path.exists():
            return
        state = checkpoint.load(self.path, self.description)
        trainer.sharing.agree(step=state["step"])
        if state["step"] < trainer.step:
            raise checkpoint.CheckpointError(
                f"{self.path}: of step {state['step']}, expected one of step {trainer.step} or later"
            )
        self.updates.compare(state["updates"])  # before anything changes
        self.weights.load_state_dict(state["weights"])
        self.updates.load_state_dict(state["updates"])
        trainer._history.load_state_dict(state["history"])
        trainer.step, self.logged = state["step"], state["logged"]
        trainer.sharing.seed = state["seed"]
        self.batches.load_state_dict(state["batches"])
        set_rng_state(state["rng"])  # last: all else may draw

    def save(self) -> None:
        """Write everything that the rest of the run depends on."""
        if self.path is None:
            return
        trainer, history = self.trainer, self.trainer.history
        if not trainer.sharing.first:
            return
        state = {
            "step": trainer.step,
            "seed": trainer.sharing.seed,
            "logged": self.logged,
            "weights": self.weights.state_dict(),
            "updates": self.updates.state_dict(),
            "history": history.state_dict(),
            "batches": self.batches.state_dict(),
            "rng": rng_state(),
        }
        checkpoint.save(self.path, state, self.description)

    @contextmanager
    def reporting(self, log: str | os.PathLike[str] | None) -> Iterator[None]:
        """A bar and a log while training."""
        trainer = self.trainer
        history, first = trainer.history, trainer.sharing.first
        self.log = open_log(log if first else None, trainer.step, history.unit)
        self.bar = tqdm(
            total=self.steps,
            initial=trainer.step,
            desc="training",
            disable=not (self.progress and first),
        )
        try:
            yield
        finally:
            self.bar.close()
            if self.log is not None:
                self.log.close()

    def train(self) -> None:
        """To the last step, or until something stops it."""
        trainer, history = self.trainer, self.trainer.history
        start = time.perf_counter()
        while trainer.step < self.steps and history.stopped is None:
            trainer._advance(self.batches)
            self.bar.update()
            step = trainer.step
            last = step == self.steps
            due = self.validation is not None and (last or step % self.validate_every == 0)
            if due or last or step % self.log_every == 0:
                losses = trainer.history.losses  # here the losses are fetched
                history.seconds += time.perf_counter() - start
                self.report(self.validate() if due else None, losses)
                start = time.perf_counter()
            if self.callback and trainer.sharing.any(_is_true(self.callback(trainer))):
                stopped = history.stopped or "callback"
                if self.validation is not None and not due:  # this is the last step after all
                    history.seconds += time.perf_counter() - start
                    self.report(self.validate(), trainer.history.losses)
                    start = time.perf_counter()
                history.stopped = stopped
            ends = last or history.stopped is not None
            if ends or (self.save_every and step % self.save_every == 0):
                history.seconds += time.perf_counter() - start
                self.save()
                start = time.perf_counter()

    def validate(self) -> float:
        """The figure of the weights to use; the best are kept."""
        assert self.validation is not None
        trainer, history = self.trainer, self.trainer.history
        with trainer.averaged():
            found = self.validation()
        if history.note(trainer.step, found):
            self.weights.keep()
        if self.patience is not None and history.since_best() >= self.patience:
            history.stopped = "patience"
        return found

    def report(self, validation: float | None, losses: list[float]) -> None:
        """A row of the log, and what the bar shows."""
        history, recent = self.trainer.history, losses[self.logged :]
        figures = {"loss": sum(recent) / len(recent)} if recent else {}
        self.logged = len(losses)
        shown = f"loss {figures['loss']:.4g} {history.unit}" if figures else ""
        if history.validations:
            shown += f", validation {list(history.validations.values())[-1]:.4g}"
        self.bar.set_postfix_str(shown, refresh=False)
        if self.log is not None:
            if validation is not None:
                figures["validation"] = validation
            rate = self.updates.learning_rate
            figures |= {"learning_rate": rate, "seconds": history.seconds}
            self.log.write(self.trainer.step, figures)


def _is_true(found: object) -> bool:
    """True of Python, numpy or torch; not whatever else a function may return."""
    scalar = getattr(found, "shape", None) == () and "bool" in str(getattr(found, "dtype", ""))
    return found is True or (scalar and bool(found))
