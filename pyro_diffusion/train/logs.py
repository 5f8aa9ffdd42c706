"""Where the course of a training run is written: a table, or TensorBoard."""

import csv
import os
from pathlib import Path
from typing import Protocol

from pyro_diffusion.validation import kind_of

__all__ = ["Log", "open_log"]

COLUMNS = ("step", "loss", "validation", "learning_rate", "seconds")


class Log(Protocol):
    """Takes rows of figures."""

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One row: of COLUMNS, those that are known."""

    def close(self) -> None:
        """No more will come."""


def open_log(path: str | os.PathLike[str] | None, step: int, unit: str) -> Log | None:
    """A table for a path that ends in ``.csv``, TensorBoard's events for any other, a folder.

    Args:
        path: where to.
        step: rows of later steps, of a run that goes on from an earlier checkpoint, are dropped.
        unit: of the losses.

    Raises:
        ValueError: if TensorBoard is wanted and not installed.
    """
    if path is None:
        return None
    path = check_path("log", path)
    return Table(path, step) if path.suffix == ".csv" else _tensorboard(path, step, unit)


def check_path(name: str, path: object) -> Path:
    """A path in a folder that exists: what is written there last is not lost for want of one.

    Raises:
        ValueError: for any other.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{name}: got {kind_of(path)}, expected a path")
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{name}: got {str(path)!r}, expected a file in a folder that exists")
    return path


class Table:
    """A CSV file with one line for each row, written at once."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if step and path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != COLUMNS:
                    raise ValueError(
                        f"log: got {str(path)!r} with columns {reader.fieldnames}, expected the table of a "
                        "training run, or no file"
                    )
                kept = [row for row in reader if int(row["step"]) <= step]
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS, restval="")
        self.writer.writeheader()
        self.writer.writerows(kept)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One line."""
        self.writer.writerow({"step": step, **figures})
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _tensorboard(folder: Path, step: int, unit: str) -> Log:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"log: got the folder {str(folder)!r}, which is for TensorBoard, that is not installed; expected "
            "a file *.csv, or `pip install tensorboard`"
        ) from error
    return Events(SummaryWriter(str(folder), purge_step=step or None), unit)


class Events:
    """The same for TensorBoard."""

    def __init__(self, writer: "object", unit: str) -> None:
        self.writer, self.unit = writer, unit

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One point of each curve."""
        for name, value in figures.items():
            shown = f"{name} ({self.unit})" if name in ("loss", "validation") else name
            self.writer.add_scalar(shown, value, step)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()  # type: ignore[attr-defined]
