"""The part of a conditional denoiser that is linear: known from a regression of latents on data."""

from collections.abc import Sequence
from enum import Enum

import torch
from pyro.distributions import Delta, TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.infer.simulators.standardized import Standardized
from pyro_diffusion.schedules import Level

__all__ = ["MOST", "Column", "LinearlyRegressed", "regressed"]

MOST = 64  # latents and values up to which there is a regression
FEWEST = 10  # simulations for each coefficient of a latent
HEAVY = 4.0  # kurtosis of what is left, 3 of normals, above which sizes do not say how wide it is
RIDGE = 1e-4  # of unit variances: data, and latents given data, may be functions of others


class Column(Enum):
    """What a number of a context is to a regression."""

    VALUE = "value"
    COUNT = "count"
    LEARNED = "learned"


class LinearlyRegressed(Denoiser):
    r"""A denoiser whose network adds to that of latents which are normal given the data, with a linear mean.

    For :math:`x_0 | y \sim \mathcal N(B \varphi(y), U \Lambda(y) U^\top)`, seen as :math:`x_t = \alpha x_0 +
    \sigma \epsilon`,

    .. math:: E[x_0 | x_t, y] = U (\sigma^2 U^\top B \varphi + \alpha \Lambda U^\top x_t)
              / (\alpha^2 \Lambda + \sigma^2) .

    What this has beyond :math:`\alpha x_t / (\alpha^2 + \sigma^2)`, that of independent standard normals, is
    added to the mean of the denoiser it is made of. So the network learns what is not linear; whatever it
    is, that changes how fast it learns and not what it can learn. Before :meth:`fit` it adds 0.

    Of the context y, *values* v enter linearly. How much they weigh depends on how many data they stand for,
    as a group's mean does that is drawn to the mean of all: with functions c of such *counts*, standardized,

    .. math:: \varphi = (v \otimes (1, c), c, 1), \qquad \Lambda_k = \lambda_k \exp(\gamma_k^\top c).

    Statistics of sets, such as logarithms of sds of few data, and products with counts are not centred: hence
    the constant. Without counts v is standardized, :math:`\varphi = v` and :math:`\Lambda` is one matrix:
    jointly normal latents and data are right without training, as are normal rows in sets of any size. If
    what the regression leaves has heavy tails instead, its variances depend on more than counts, as on a
    noise that is a latent: then there is no linear part with counts, as a network takes longer to undo a
    wrong one than to learn without. Learned features are the network's.

    Args:
        denoiser: one whose posterior is a point mass, with the data as context ``y``.
        latents: number of coordinates of x_0.
        columns: what every number of y is; at least one value.
    """

    point_mass = True
    basis: Tensor
    variances: Tensor
    widths: Tensor
    slopes: Tensor
    values: Tensor
    counts: Tensor

    def __init__(self, denoiser: Denoiser, latents: int, columns: Sequence[Column]) -> None:
        super().__init__(denoiser.process)
        self.denoiser = denoiser
        of = {kind: [i for i, c in enumerate(columns) if c is kind] for kind in Column}
        v, c = len(of[Column.VALUE]), len(of[Column.COUNT])
        self.register_buffer("values", torch.tensor(of[Column.VALUE]), persistent=False)
        self.register_buffer("counts", torch.tensor(of[Column.COUNT]).long(), persistent=False)
        self.scale = Standardized((c,)) if c else None
        self.register_buffer("basis", torch.eye(latents))
        self.register_buffer("variances", torch.ones(latents))
        self.register_buffer("widths", torch.zeros(c, latents))  # gamma
        # U^T B phi is phi times these
        self.register_buffer("slopes", torch.zeros(v * (1 + c) + (c + 1 if c else 0), latents))

    def _counts(self, y: Tensor) -> Tensor:
        """Standardized functions of counts, (..., counts)."""
        own = y[..., self.counts]
        return own if self.scale is None else self.scale(own).to(y)

    def _features(self, y: Tensor, counts: Tensor) -> Tensor:
        """phi, (..., features)."""
        values = y[..., self.values]
        if self.scale is None:
            return values
        products = [values * counts[..., k, None] for k in range(counts.shape[-1])]
        return torch.cat([values, *products, counts, torch.ones_like(values[..., :1])], -1)

    def fit(self, latents: Tensor, data: Tensor) -> None:
        """Regress standardized latents (n, latents) on contexts (n, context), if n is large."""
        size, count = len(self.slopes), len(data)
        if count < FEWEST * (size + 1):
            return
        x0, data = latents.double(), data.double()
        if self.scale is not None:
            self.scale.fit(data[:, self.counts])
        c = self._counts(data)
        y = self._features(data, c)
        weights = torch.ones_like(y[:, :1])
        # where variances differ, rows weigh by them, which takes one regression to know; a third adds nothing
        for _ in range(1 if self.scale is None else 2):
            slopes = _least_squares(y, x0, weights / weights.mean())
            left = x0 - y @ slopes
            basis = torch.linalg.eigh(left.mT @ (weights * left)).eigenvectors
            squares = (left @ basis).square()
            widths = torch.zeros_like(self.widths, dtype=y.dtype)
            if self.scale is not None:
                # logarithms' regression for the shape, then means for the size
                logs = squares.clamp(min=RIDGE**2).log()
                widths = _least_squares(c, logs - logs.mean(0), torch.ones_like(weights))
                squares = squares / (c @ widths).exp()
                weights = (-(c @ widths).mean(1, keepdim=True)).exp()
        variances = (squares.sum(0) / (count - size)).clamp(min=RIDGE)
        if self.scale is not None and bool(((squares / variances).square().mean(0) > HEAVY).any()):
            return
        self.widths.copy_(widths)
        self.variances.copy_(variances)
        self.basis.copy_(basis)
        self.slopes.copy_(slopes @ basis)

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The point mass at the sum."""
        level = self.process.level(t, xt, state="xt")
        alpha, noise = level.alpha, level.sigma.square()
        own = self.denoiser(xt, level, **context).mean
        basis, variances, widths, slopes = (
            each.to(xt) for each in (self.basis, self.variances, self.widths, self.slopes)
        )
        y = context["y"].to(xt)
        counts = self._counts(y)
        if self.scale is not None:
            variances = (variances * (counts @ widths).exp()).clamp(min=RIDGE)
        expected = noise * (self._features(y, counts) @ slopes) + alpha * variances * (xt @ basis)
        linear = (expected / (alpha.square() * variances + noise)) @ basis.mT
        alone = alpha / (alpha.square() + noise) * xt
        return Delta(own + linear - alone, event_dim=1, validate_args=False)

    def context_event_dim(self, name: str, value: Tensor) -> int:
        """That of the denoiser it is made of."""
        return self.denoiser.context_event_dim(name, value)


def regressed(denoiser: Denoiser, latents: int, columns: Sequence[Column]) -> Denoiser:
    """A denoiser of so many coordinates with a linear part, or itself where it can have none."""
    values = sum(each is Column.VALUE for each in columns)
    if not bool(denoiser.point_mass) or latents > MOST or not 0 < values <= MOST:
        return denoiser
    return LinearlyRegressed(denoiser, latents, columns)


def _least_squares(inputs: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
    """Coefficients (inputs, outputs) of weighted rows, with a ridge."""
    own = weights * inputs / len(inputs)
    ridge = RIDGE * torch.eye(inputs.shape[1]).to(inputs)
    return torch.linalg.solve(own.mT @ inputs + ridge, own.mT @ outputs)
