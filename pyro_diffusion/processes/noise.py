"""Where draws come from: torch's global generators, or a seed."""

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import Categorical, Delta, TorchDistribution
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import Shape, check_seed, check_sizes

__all__ = [
    "NoiseSource",
    "SeededNoise",
    "ambient_noise",
    "draw",
    "drawing_from",
    "fresh_seed",
    "joint_seed",
    "keyed",
    "normal_like",
    "uniform_like",
]

_ambient = threading.local()

SEEDS = 2**62
# 2**64 over the golden ratio, and the multipliers of the finalizer, as signed numbers: int64 wraps around.
GAMMA = 0x9E3779B97F4A7C15 - 2**64
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64

# Of a gamma number, each of which is refused in one case of twenty at most.
PROPOSALS = 16


def draw(distribution: TorchDistribution, sample_shape: Shape = torch.Size()) -> Tensor:
    """Draws, reparameterized where that is possible; whatever scoring draws, it draws here.

    They come from torch's global generators, or within :func:`drawing_from` from another source. A
    denoiser, decoder or objective of your own that draws should draw by this function, too: scoring then
    repeats, and leaves the global generators alone.

    Args:
        distribution: any.
        sample_shape: as in ``sample``.

    Returns:
        Values, sample + batch + event.

    Raises:
        ValueError: for anything but a distribution.
    """
    if not isinstance(distribution, torch.distributions.Distribution):
        raise ValueError(
            f"distribution: got {type(distribution).__name__}, expected a Pyro distribution"
        )
    sample_shape = check_sizes("sample_shape", sample_shape)
    source = ambient_noise()
    return (
        _own(distribution, sample_shape)
        if source is None
        else source.draw(distribution, sample_shape)
    )


@contextlib.contextmanager
def drawing_from(noise: "NoiseSource") -> Iterator[None]:
    """Make every :func:`draw` of this thread from a source. The global generators are not touched.

    Args:
        noise: where to draw from; within another, the innermost counts.

    Raises:
        ValueError: for anything but a source.
    """
    if not isinstance(noise, NoiseSource):
        raise ValueError(f"noise: got {type(noise).__name__}, expected a NoiseSource")
    outer = ambient_noise()
    _ambient.noise = noise
    try:
        yield
    finally:
        _ambient.noise = outer


def ambient_noise() -> "NoiseSource | None":
    """The source that :func:`drawing_from` has set for this thread; None for torch's global generators."""
    return getattr(_ambient, "noise", None)


def normal_like(x: Tensor, event_dim: int) -> Tensor:
    """Standard normal numbers in the form of a tensor, whose rightmost dimensions make one row."""
    source = ambient_noise()
    return torch.randn_like(x) if source is None else source.normal(x.shape, x, event_dim)


def uniform_like(x: Tensor, event_dim: int = 0) -> Tensor:
    """Uniform numbers from 0 to below 1 in the form of a tensor, as :func:`normal_like`."""
    source = ambient_noise()
    return torch.rand_like(x) if source is None else source.uniform(x.shape, x, event_dim)


def fresh_seed() -> int:
    """A seed for noise that is drawn once: from the host's generator, without touching a device."""
    source = ambient_noise()
    return int(torch.randint(SEEDS, (), device="cpu")) if source is None else source.fresh_seed()


def joint_seed() -> int:
    """A seed for what draws for all rows of a batch together; keyed by the first, where rows are keyed."""
    source = ambient_noise()
    return int(torch.randint(SEEDS, (), device="cpu")) if source is None else source.joint_seed()


def keyed(seed: int, index: int) -> int:
    """A seed that is a function of another and of a number: splitmix64's finalizer of both.

    In the host's integers: a program may be run under vmap, which has no use for these.
    """
    word = seed ^ index * GAMMA % 2**64
    for shift, factor in ((30, FIRST), (27, SECOND), (31, 1)):
        word = (word ^ word >> shift) * factor % 2**64
    return word % SEEDS


class NoiseSource:
    """A source of random numbers that is no global generator.

    Args:
        seed: an integer from 0 to below 2**63.

    Raises:
        ValueError: for another seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self._asked = check_seed("seed", seed), 0

    def normal(self, shape: Shape, like: Tensor, event_dim: int = 0) -> Tensor:
        """Standard normal numbers, of the dtype and on the device of ``like``.

        Args:
            shape: sample + batch + event.
            like: a floating-point tensor.
            event_dim: how many rightmost dimensions make one row.
        """
        raise NotImplementedError

    def uniform(self, shape: Shape, like: Tensor, event_dim: int = 0) -> Tensor:
        """Numbers from 0 to below 1; arguments as for :meth:`normal`."""
        raise NotImplementedError

    def draw(self, distribution: TorchDistribution, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draws of any distribution, reparameterized where that is possible.

        One with a method ``draw_from(source, sample_shape, event_dim)`` makes them of the source's numbers.
        """
        base: Any = per_coordinate(distribution)
        if isinstance(base, Delta):
            return _own(distribution, sample_shape)
        if base.__class__.rsample is torch.distributions.Normal.rsample:
            shape = distribution.shape(torch.Size(sample_shape))
            return base.loc + base.scale * self.normal(shape, base.loc, distribution.event_dim)
        if hasattr(base, "draw_from"):
            out: Tensor = base.draw_from(self, torch.Size(sample_shape), distribution.event_dim)
            return out
        return self._other(distribution, base, torch.Size(sample_shape))

    def gamma(self, concentration: float, shape: Shape, like: Tensor, event_dim: int = 0) -> Tensor:
        """Gamma numbers of unit rate; arguments else as for :meth:`normal`.

        By Marsaglia and Tsang's rejection, of as many proposals for every number as are never all refused
        (one in 1e20).
        """
        exact = like.double()
        d = max(concentration, concentration + 1 if concentration < 1 else 0.0) - 1 / 3
        x = self.normal((PROPOSALS, *shape), exact, event_dim) / math.sqrt(9 * d)
        u = self.uniform((PROPOSALS, *shape), exact, event_dim)
        log_v = 3 * torch.log1p(x.clamp(min=-1))
        spare = 4.5 * d * x.square() + d * (log_v - torch.expm1(log_v))
        taken = ((u.log() < spare) & (x > -1)).to(torch.uint8).argmax(0, keepdim=True)
        out = d * log_v.gather(0, taken)[0].exp()
        if concentration < 1:
            out = out * self.uniform(shape, exact, event_dim) ** (1 / concentration)
        return out.to(like.dtype)

    def fresh_seed(self) -> int:
        """A seed for noise that is drawn once; asking for it leaves all other numbers as they are."""
        self._asked += 1
        return keyed(self.seed, self._asked)

    def joint_seed(self) -> int:
        """A seed for draws that are made for all rows together; another at every call."""
        return self.fresh_seed()

    def _other(
        self, distribution: TorchDistribution, base: Any, sample_shape: torch.Size
    ) -> Tensor:
        raise NotImplementedError


class SeededNoise(NoiseSource):
    """The stream that torch's global generators would give after ``torch.manual_seed(seed)``.

    Args:
        seed: an integer from 0 to below 2**63.

    Raises:
        ValueError: for another seed.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of a device."""
        if device not in self._generators:
            new = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(self.seed)
            # "cuda" is one of "cuda:0", "cuda:1", ...
            self._generators[device] = self._generators.setdefault(new.device, new)
        return self._generators[device]

    def normal(self, shape: Shape, like: Tensor, event_dim: int = 0) -> Tensor:
        """Standard normal numbers; rows play no part."""
        return torch.empty(shape, dtype=like.dtype, device=like.device).normal_(
            generator=self.generator(like.device)
        )

    def uniform(self, shape: Shape, like: Tensor, event_dim: int = 0) -> Tensor:
        """Numbers from 0 to below 1; rows play no part."""
        generator = self.generator(like.device)
        return torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)

    def _other(
        self, distribution: TorchDistribution, base: Any, sample_shape: torch.Size
    ) -> Tensor:
        with _Redirected(self):
            return _own(distribution, sample_shape)


def _own(distribution: TorchDistribution, sample_shape: Shape) -> Tensor:
    # ``rsample`` is the cheaper one, too: ``Normal.sample`` checks the scales first (on a GPU, a round trip
    # to the host).
    shape = torch.Size(sample_shape)
    base = per_coordinate(distribution)
    if type(base).sample is Categorical.sample and base.probs.is_cuda:
        return Categorical(probs=fine(base.probs), validate_args=False).sample(shape)
    return distribution.rsample(shape) if distribution.has_rsample else distribution.sample(shape)


class _Redirected(TorchFunctionMode):
    """Has torch's random functions, as called by this thread, draw from a source's generators."""

    def __init__(self, noise: SeededNoise) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LIKE:
            like = args[0] if args else kwargs.pop("input")
            kwargs = {"dtype": like.dtype, "device": like.device, **kwargs}
            func, args = _LIKE[func], (like.shape,)
        if func in _RANDOM and kwargs.get("generator") is None:
            tensors = (x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            stated = kwargs.get("device") or torch.get_default_device()
            device = next(tensors, None) or torch.device(stated)
            kwargs = {**kwargs, "generator": self.noise.generator(device)}
        return func(*args, **kwargs)


_LIKE = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}
_RANDOM = {
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli),
    *(torch.multinomial, torch.poisson, torch.binomial),
    *(torch._standard_gamma, torch._sample_dirichlet),
    *(Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.cauchy_, Tensor.geometric_),
    *(Tensor.log_normal_, Tensor.random_, Tensor.bernoulli_, Tensor.bernoulli, Tensor.multinomial),
}


def fine(probs: Tensor) -> Tensor:
    """Probabilities in float64, to draw by.

    Single precision would lose symbols of probability 1e-7, and a chain draws such at every step: sums of
    probabilities near 1 have no room for them, and on a GPU torch's exponential numbers, by whose race it
    draws a symbol, are 2^-24 at least.
    """
    return probs.double()
