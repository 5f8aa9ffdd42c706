"""Where draws come from: torch's global generators, a seed, or a seed and the row of the data."""

import contextlib
import functools
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import Categorical, Delta, TorchDistribution
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_diffusion.precision import at_least_single
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import Shape, check_seed, check_sizes, check_tensor

__all__ = [
    "NoiseSource",
    "RowNoise",
    "SeededNoise",
    "draw",
    "drawing_from",
    "fresh_seed",
    "inverted",
]

_ambient = threading.local()

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
    source = getattr(_ambient, "noise", None)
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
    outer = getattr(_ambient, "noise", None)
    _ambient.noise = noise
    try:
        yield
    finally:
        _ambient.noise = outer


def fresh_seed() -> int:
    """A seed for noise that is drawn once: from the host's generator, without touching a device."""
    source = getattr(_ambient, "noise", None)
    return int(torch.randint(_SEEDS, (), device="cpu")) if source is None else source.fresh_seed()


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
        # In the host's integers: a program may be run under vmap, which has no use for these.
        word = self.seed ^ self._asked * _GAMMA % 2**64
        for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
            word = (word ^ word >> shift) * factor % 2**64
        return word % _SEEDS

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


class RowNoise(NoiseSource):
    r"""Numbers that are a function of a seed, of the row they are for, and of how many went before.

    A row's numbers do not depend on which rows it is drawn with, nor on the device. Row i has a splitmix64
    stream of its own, whose j-th word is :math:`h(k_i + j\gamma)`, :math:`k_i = h(h(s) + i\gamma)`.
    Rows are the last batch dimension of what is drawn.

    Normal and categorical distributions, and all with an ``icdf``, are drawn row by row. Others are drawn for
    all rows together, from a seed of the first row's: right, but then dependent on the batch.

    Args:
        seed: an integer from 0 to below 2**63.
        rows: (n,), integers (int64) that name the rows, on the device of the draws.

    Raises:
        ValueError: for another seed, or rows of another shape or dtype.

    References:
        Steele, Lea & Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """

    def __init__(self, seed: int, rows: Tensor) -> None:
        super().__init__(seed)
        self.rows = check_tensor("rows", rows)
        if rows.dim() != 1 or rows.dtype != torch.int64:
            raise ValueError(
                f"rows: got shape {tuple(rows.shape)} of {rows.dtype}, expected (n,) of torch.int64"
            )
        self._keys = _mix(_mix(torch.full_like(rows, seed)) + rows * _GAMMA)
        self._used = 0

    def normal(self, shape: Shape, like: Tensor, event_dim: int = 0) -> Tensor:
        """Standard normal numbers (Box and Muller, one per word)."""
        word, dtype = self._words(shape, event_dim), _real(like)
        radius = (_shift(word, 32).to(dtype) + 0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = word.bitwise_and_(2**32 - 1).to(dtype).mul_(2 * torch.pi * 2.0**-32)
        return radius.mul_(angle.cos_()).to(like.dtype)

    def uniform(self, shape: Shape, like: Tensor, event_dim: int = 0) -> Tensor:
        """Numbers strictly between 0 and 1."""
        bits = -round(
            math.log2(torch.finfo(like.dtype).eps)
        )  # half a step beside them is not rounded
        word = _shift(self._words(shape, event_dim), 64 - bits)
        return word.to(_real(like)).add_(0.5).mul_(2.0**-bits).to(like.dtype)

    def _other(
        self, distribution: TorchDistribution, base: Any, sample_shape: torch.Size
    ) -> Tensor:
        shape, event_dim = distribution.shape(sample_shape), distribution.event_dim
        row = len(shape) - event_dim - 1
        if base.event_shape == () and row >= 0 and shape[row] == len(self.rows):
            if type(base).sample is Categorical.sample:
                probs = _fine(base.probs)
                return inverted(probs, self.uniform(shape, probs, event_dim))
            dtype = _dtype(base)
            like = torch.empty((), dtype=at_least_single(dtype), device=self.rows.device)
            with contextlib.suppress(NotImplementedError):
                out: Tensor = base.icdf(self.uniform(shape, like, event_dim))
                return out.to(dtype) if out.is_floating_point() else out
        seed = int(self._words((len(self.rows),), 0)[0]) % _SEEDS
        return SeededNoise(seed).draw(distribution, sample_shape)

    def _words(self, shape: Shape, event_dim: int) -> Tensor:
        """The next 64 random bits for every element of a shape, row by row."""
        row = len(shape) - event_dim - 1
        if row < 0 or shape[row] != len(self.rows):
            raise ValueError(
                f"noise: got {len(self.rows)} rows for draws of shape {tuple(shape)} with {event_dim} event "
                "dimension(s), expected as many rows as the last batch dimension has"
            )
        rest = torch.Size((*shape[:row], *shape[row + 1 :]))
        first, self._used = self._used + 1, self._used + rest.numel()
        place = torch.arange(first, self._used + 1, device=self.rows.device) * _GAMMA
        words = _mix(self._keys.unsqueeze(-1) + place)
        return words.reshape(-1, *rest).movedim(0, row).contiguous()


def inverted(probs: Tensor, uniform: Tensor) -> Tensor:
    """Categorical draws by inversion of the distribution function.

    Args:
        probs: batch + (k,), non-negative; they need not sum to one.
        uniform: sample + batch, in [0, 1).
    """
    edges = probs.to(uniform.dtype).cumsum(-1)
    edges = edges.expand(*uniform.shape, -1).contiguous()
    # Scaled, no place lies beyond the last symbol that has a probability.
    place = uniform.unsqueeze(-1) * edges[..., -1:]
    index = torch.searchsorted(edges, place, right=True).squeeze(-1)
    return index.clamp(max=probs.shape[-1] - 1)


def _own(distribution: TorchDistribution, sample_shape: Shape) -> Tensor:
    # ``rsample`` is the cheaper one, too: ``Normal.sample`` checks the scales first (on a GPU, a round trip
    # to the host).
    shape = torch.Size(sample_shape)
    base = per_coordinate(distribution)
    if type(base).sample is Categorical.sample and base.probs.is_cuda:
        return Categorical(probs=_fine(base.probs), validate_args=False).sample(shape)
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

_SEEDS = 2**62
# 2**64 over the golden ratio, and the multipliers of the finalizer, as signed numbers: int64 wraps around.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _mix(word: Tensor) -> Tensor:
    """splitmix64's finalizer, a bijection of 64 bits, in place."""
    word.bitwise_xor_(_shift(word, 30)).mul_(_FIRST)
    word.bitwise_xor_(_shift(word, 27)).mul_(_SECOND)
    return word.bitwise_xor_(_shift(word, 31))


def _shift(word: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in."""
    return (word >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _fine(probs: Tensor) -> Tensor:
    """Probabilities in float64, to draw by.

    Single precision would lose symbols of probability 1e-7, and a chain draws such at every step: sums of
    probabilities near 1 have no room for them, and on a GPU torch's exponential numbers, by whose race it
    draws a symbol, are 2^-24 at least.
    """
    return probs.double()


def _real(like: Tensor) -> torch.dtype:
    return at_least_single(like.dtype)


def _dtype(distribution: Any) -> torch.dtype:
    """The dtype that a distribution's parameters promote to."""
    found = (getattr(distribution, name, None) for name in distribution.arg_constraints)
    kinds = [x.dtype for x in found if isinstance(x, Tensor) and x.is_floating_point()]
    return functools.reduce(torch.promote_types, kinds) if kinds else torch.get_default_dtype()
