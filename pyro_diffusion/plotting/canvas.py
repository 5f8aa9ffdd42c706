"""What every figure shares: colours, numbers as numpy arrays, empty axes."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_diffusion.validation import check_tensor

# Okabe and Ito's colours, told apart by colour-blind readers
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8c8c8c"

Array = Tensor | np.ndarray | Sequence[float]


def as_numpy(values: Array) -> np.ndarray:
    """Numbers as float64 on the host."""
    if isinstance(values, Tensor):
        check_tensor("values", values, boolean=True)
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def finite_or_nan(values: np.ndarray) -> np.ndarray:
    """Values with NaN, which matplotlib leaves out, in place of infinite ones."""
    return np.where(np.isfinite(values), values, np.nan)


def new_axes(size: tuple[float, float]) -> Axes:
    """The Axes of a new figure, its size in inches."""
    return Figure(figsize=size, layout="constrained").subplots()


def whole_figure(ax: Axes) -> Figure:
    """The Figure that Axes belong to, also where they lie in a subfigure."""
    figure = ax.figure
    return figure if isinstance(figure, Figure) else figure.get_figure(root=True)


def hide_spines(ax: Axes) -> Axes:
    """Hides the frame above and to the right."""
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def short(t: float) -> str:
    """A time as the label of a tick."""
    return f"{t:.2f}" if t == 0 or t >= 0.01 else f"{t:.0e}"
