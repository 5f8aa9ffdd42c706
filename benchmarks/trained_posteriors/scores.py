"""What draws of a posterior are worth: accuracy, calibration and misfit, image by image."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trained_posteriors.problems import Problem

OUTSIDE = 3.0  # grey levels lie in [-1, 1]; a draw with a pixel beyond has left the model


@dataclass
class Scores:
    """One number an image, (n,).

    Attributes:
        psnr: of the mean of the draws, dB.
        crps: continuous ranked probability score a pixel, unbiased in the number of draws.
        coverage: share of the pixels within the central ranks, see :func:`central_ranks`.
        misfit: chi^2 of a draw, per observation; NaN of diverged draws left out.
        diverged: share of the draws that are not finite or leave the range of grey levels by far.
    """

    psnr: Tensor
    crps: Tensor
    coverage: Tensor
    misfit: Tensor
    diverged: Tensor

    def means(self) -> dict[str, float]:
        """Averages over images."""
        return {f.name: float(getattr(self, f.name).nanmean()) for f in fields(self)}


def central_ranks(count: int) -> tuple[int, float]:
    """Ranks left out on either side for a central 90 % interval of draws, and the exact coverage."""
    out = max(round(0.05 * (count + 1)), 1)
    return out, 1 - 2 * out / (count + 1)


def score(problem: Problem, draws: Tensor, truth: Tensor, y: Tensor) -> Scores:
    """Scores of draws (count, n, 1, side, side) of the posteriors of n images."""
    count, flat, x = len(draws), draws.flatten(2), truth.flatten(1)
    bad = ~(flat.isfinite() & (flat.abs() <= OUTSIDE)).all(-1)
    flat = torch.nan_to_num(flat, 0.0, OUTSIDE, -OUTSIDE).clamp(-OUTSIDE, OUTSIDE)
    psnr = 10 * torch.log10(4 / (flat.mean(0) - x).square().mean(-1))
    ordered = flat.sort(0).values
    weights = 2 * torch.arange(1, count + 1, device=flat.device) - count - 1.0
    spread = (weights[:, None, None] * ordered).sum(0) / (count * (count - 1))
    crps = ((flat - x).abs().mean(0) - spread).mean(-1)
    out, _ = central_ranks(count)
    rank = (flat < x).sum(0)
    coverage = ((rank >= out) & (rank <= count - out)).float().mean(-1)
    misfit = torch.where(bad, torch.nan, problem.misfit(draws, y)).nanmean(0)
    return Scores(psnr, crps, coverage, misfit, bad.float().mean(0))


def paired(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean difference a - b over images, and its standard error."""
    gap = (a - b).double()
    return float(gap.mean()), float(gap.std()) / math.sqrt(max(len(gap), 1))
