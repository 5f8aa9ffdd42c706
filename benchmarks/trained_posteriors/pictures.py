"""Pictures to look at: truths, observations, and what each method made of them."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from trained_posteriors.problems import Problem


class Pictures:
    """Rows of images, gathered one method after the other, in a file."""

    def __init__(self, problem: Problem, truth: Tensor, y: Tensor) -> None:
        self.problem = problem
        self.rows: list[tuple[str, Tensor]] = [("truth", truth.cpu())]
        if problem.matrix is not None:
            seen = y @ torch.linalg.pinv(problem.matrix).T  # noise where the operator says nothing
            if problem.matrix.shape[0] == problem.images.pixels:
                seen = y
            known = problem.matrix.abs().sum(0) > 0
            seen = torch.where(known, seen, torch.nan).reshape(truth.shape)
            self.rows.append(("observed", seen.cpu()))

    def add(self, name: str, draws: Tensor) -> None:
        """A method's mean and its first two draws (count, n, 1, side, side)."""
        draws = draws.cpu()
        self.rows.append((f"{name}, mean", draws.mean(0)))
        self.rows += [("a draw", draw) for draw in draws[:2]]

    def save(self, path: Path) -> None:
        """One row of images a row, in grey levels; what nothing is known of is blue."""
        count = len(self.rows[0][1])
        figure = Figure(figsize=(0.8 * count + 1.7, 0.8 * len(self.rows)), layout="constrained")
        axes = figure.subplots(len(self.rows), count, squeeze=False)
        for row, (name, pictures) in zip(axes, self.rows, strict=True):
            for ax, picture in zip(row, pictures, strict=True):
                ax.set_facecolor("tab:blue")
                ax.imshow(picture[0], cmap="gray", vmin=-1, vmax=1)
                ax.set(xticks=[], yticks=[])
            row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        figure.suptitle(self.problem.name, fontsize=9)
        figure.savefig(path, dpi=110)
