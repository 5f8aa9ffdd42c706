"""What is observed of an image: the operator, once, and the distribution of the observations."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_diffusion.distributions import Diffusion
from trained_posteriors.images import Images

PEAK = 10.0  # counts of a white pixel


@dataclass
class Problem:
    """Observations y of images x.

    Attributes:
        name: as printed.
        images: what is observed, and the data that the prior was trained on.
        operator: x -> the distribution's location, (..., 1, side, side) -> (..., m).
        noise: location -> distribution of y, over (..., m).
        sd: of the noise, None for counts.
        matrix: (m, pixels) where the operator is linear.
    """

    name: str
    images: Images
    operator: Callable[[Tensor], Tensor]
    noise: Callable[[Tensor], dist.TorchDistribution]
    sd: float | None = None
    matrix: Tensor | None = None

    def program(self, prior: Diffusion, y: Tensor) -> Callable[[], None]:
        """The model that every method of ours conditions."""

        def model() -> None:
            with pyro.plate("images", len(y)):
                x = pyro.sample("x", prior)
                pyro.sample("y", self.noise(self.operator(x)).to_event(1), obs=y)

        return model

    def observe(self, images: Tensor, seed: int = 0) -> Tensor:
        """Observations of images, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Drawn on the processor: the same on every device.
            return self.noise(self.operator(images).cpu()).sample().to(images.device)

    def misfit(self, x: Tensor, y: Tensor) -> Tensor:
        """Squared standardized residuals, averaged over the observations of each image: 1 at the truth."""
        found = self.noise(self.operator(x))
        return ((y - found.mean).square() / found.variance).mean(-1)


def matrices(side: int) -> dict[str, Tensor]:
    """The linear operators on images of a size; the blur is one pixel wide on 8x8 and two on 28x28."""
    generator, pixels = torch.Generator().manual_seed(0), side**2
    identity, at = torch.eye(pixels), torch.arange(float(side))
    seen = torch.randperm(pixels, generator=generator)[: round(0.3 * pixels)].sort().values
    kernel = (-0.5 * ((at - at.unsqueeze(-1)) / max(side // 14, 1)).square()).exp()
    kernel = kernel / kernel.sum(-1, keepdim=True)

    def pooling(factor: int) -> Tensor:
        images = identity.reshape(pixels, 1, side, side)
        return torch.nn.functional.avg_pool2d(images, factor).flatten(1).T.contiguous()

    return {
        "70 % missing": identity[seen],
        "half missing": identity[: pixels // 2],
        "2x down": pooling(2),
        "4x down": pooling(4),
        "blur": torch.kron(kernel, kernel),
    }


def linear(matrix: Tensor, x: Tensor) -> Tensor:
    return x.flatten(-3) @ matrix.T


def clipping(x: Tensor) -> Tensor:
    """A sensor that saturates at half the range of grey levels."""
    return x.flatten(-3).clamp(-0.5, 0.5)


def counting(x: Tensor) -> Tensor:
    """Rates of counts; a little light is everywhere."""
    return (PEAK * (x.flatten(-3) + 1) / 2).clamp(min=0.1)


@functools.cache
def problems(images: Images) -> dict[str, Problem]:
    """All problems of images by their names."""
    found, pixels = {}, images.pixels
    generator = torch.Generator().manual_seed(1)
    magnitudes = torch.randn(pixels // 2, pixels, generator=generator) / images.side
    magnitudes = magnitudes.to(images.train.device)
    for sd in (0.05, 0.3):
        noise = functools.partial(dist.Normal, scale=sd)
        for name, matrix in matrices(images.side).items():
            matrix = matrix.to(images.train.device)
            operator = functools.partial(linear, matrix)
            found[f"{name}, {sd:g}"] = Problem(name, images, operator, noise, sd, matrix)
        found[f"clipping, {sd:g}"] = Problem("clipping", images, clipping, noise, sd)
        absolute = functools.partial(lambda a, x: linear(a, x).abs(), magnitudes)
        found[f"abs, {sd:g}"] = Problem("abs(Ax)", images, absolute, noise, sd)
    found["counts"] = Problem("counts", images, counting, dist.Poisson)
    return found
