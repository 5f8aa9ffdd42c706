"""What all distributions of a denoiser share: checks, dtype and device, context and own randomness."""

import functools
import itertools
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine import runtime
from pyro.poutine.indep_messenger import IndepMessenger
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.denoisers.pyro_modules import in_this_run
from pyro_diffusion.distributions.no_closed_forms import NoClosedForms
from pyro_diffusion.distributions.shape_runs import kept_example
from pyro_diffusion.precision import at_least_single
from pyro_diffusion.processes import draw
from pyro_diffusion.processes.global_batch import current_shard
from pyro_diffusion.processes.noise import fresh_seed
from pyro_diffusion.schedules import Level, uniform
from pyro_diffusion.validation import Shape, check_sizes, check_tensor

__all__ = ["DenoisedDistribution"]


class DenoisedDistribution(NoClosedForms, TorchDistribution):
    """A distribution of data that a denoiser defines; the chain, the SDE and the ODE are three of them.

    It holds the denoiser, the dtype and device that its tensors say, the context and the batch shape that
    follows from it, and a seed of its own: an instance that draws in ``log_prob`` scores a value alike
    however often it is asked, while a model that builds it afresh each run sees fresh noise.

    Args:
        denoiser: posterior p(x_0 | x_t).
        event_shape: shape of one datum; its length is the process's ``event_dim``.
        context: tensors for the denoiser (labels, observations); their batch shapes broadcast into this
            distribution's.
        validate_args: whether to check arguments and values; Pyro's global setting by default.

    Attributes:
        dtype: of the denoiser's tensors; None if it has none, and data decide.
        device: likewise.

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    # Keyword arguments that `replace` hands on; each is an attribute of the same name.
    _arguments: ClassVar[tuple[str, ...]] = ("context",)

    # Attributes that `repr` shows beside the denoiser and the shapes.
    _shown: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        denoiser: Denoiser,
        event_shape: Shape,
        *,
        context: dict[str, Tensor] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        event_shape = check_event(denoiser, event_shape)
        # Scores are asked for when the model has run: Pyro's parameters and random weights are taken now.
        self.denoiser = in_this_run(denoiser)
        self.dtype, self.device = dtype_and_device(self.denoiser)
        self.context = {k: v for k, v in (context or {}).items() if v is not None}
        for name, value in self.context.items():
            check_tensor(name, value, boolean=True)
        self._seed, self._shard = fresh_seed(), current_shard()
        batch_shape = broadcast("context", {k: self._context_batch(k) for k in self.context})
        self._given_batch = torch.Size(
            batch_shape
        )  # the context's own, which `expand` leaves as it is
        self._plates = plates_entered()
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    def __repr__(self) -> str:
        parts = [_brief(self.denoiser), f"event_shape={tuple(self.event_shape)}"]
        if self.batch_shape:
            parts.append(f"batch_shape={tuple(self.batch_shape)}")
        parts += [f"{name}={getattr(self, name)!r}" for name in self._shown]
        return f"{type(self).__name__}({', '.join(parts)})"

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Self:
        """The same distribution, with the same randomness, at a larger batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        batch_shape = check_sizes("batch_shape", batch_shape)
        new.__dict__.update(self.__dict__)
        try:
            new.context = {k: self._expand_context(k, batch_shape) for k in self.context}
        except RuntimeError as error:  # the type that torch's own distributions raise
            error.add_note(
                f"batch_shape: got {tuple(batch_shape)}, expected one that {tuple(self.batch_shape)}, that "
                "of the context, expands to"
            )
            raise
        TorchDistribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def condition(self, **context: Tensor) -> Self:
        """The same model under another context, with fresh randomness."""
        return self.replace(context={**self.context, **context})

    def mask(self, mask: Tensor | bool | None) -> TorchDistribution:
        """The same model whose log-density is 0 where ``mask`` is False; data there may be NaN."""
        return _MaskedData(self, mask)

    def replace(self, **changes: Any) -> Self:
        """A new instance with some constructor arguments changed."""
        arguments = {name: getattr(self, name) for name in self._arguments}
        arguments = {"validate_args": self._validate_args, **arguments, **changes}
        return type(self)(self.denoiser, self.event_shape, **arguments)

    def posterior(self, xt: Tensor, t: Tensor | Level) -> TorchDistribution:
        """The denoiser's p(x_0 | x_t) under this context; the batch shapes of both broadcast."""
        xt, context = self.with_context(xt)
        return self.denoiser(xt, t, **context)

    def with_context(self, xt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A state, batch + event, and the context, at the batch shape that both broadcast to."""
        return broadcast_context(self.denoiser, xt, self.context)

    def _example(self, sample_shape: Shape) -> Tensor:
        """Values of the shape, dtype and support of draws for one network evaluation, none if it is kept."""
        shape = self._extended_shape(torch.Size(sample_shape))
        key = (type(self), shape, self.dtype, self.device, repr(self.support))
        return kept_example(self.denoiser, key, lambda: self._first_guess(sample_shape))

    def _first_guess(self, sample_shape: Shape) -> Tensor:
        """Data as the denoiser sees them in pure noise."""
        raise NotImplementedError

    def _prior_draw(self, sample_shape: Shape) -> Tensor:
        """States at t = 1, sample + batch + event."""
        shape = self._extended_shape(check_sizes("sample_shape", sample_shape))
        prior = self.denoiser.process.prior(self.event_shape, dtype=self.dtype, device=self.device)
        x = draw(prior.expand(shape[: len(shape) - len(self.event_shape)]))
        self._check_precision(x)
        return x

    def _check_outcome(self, x: Tensor) -> None:
        """Refuse a network whose output is NaN, by what came of it (from finite data)."""
        if not bool(x.detach().isfinite().all()):
            parts = (getattr(self, name, None) for name in ("objective", "decoder"))
            kinds = (type(part) for part in parts if part is not None)
            foreign = [k.__name__ for k in kinds if not k.__module__.startswith("pyro_diffusion.")]
            also = f", and finite costs of {' and '.join(foreign)}" if foreign else ""
            raise ValueError(
                f"denoiser: got NaN or infinite numbers from {type(self.denoiser).__name__}, expected a "
                f"network whose output is finite at every level{also}"
            )

    def _check_precision(self, x: Tensor) -> None:
        """Refuse states whose dtype cannot hold the schedule's levels."""
        if x.is_floating_point():
            times = getattr(self, "times", kept_uniform(1, torch.float64))
            self.denoiser.process.check_precision(at_least_single(x.dtype), times)

    def _context_event(self, name: str) -> torch.Size:
        value = self.context[name]
        return value.shape[value.dim() - self.denoiser.context_event_dim(name, value) :]

    def _context_batch(self, name: str) -> torch.Size:
        shape = self.context[name].shape
        return shape[: len(shape) - len(self._context_event(name))]

    def _expand_context(self, name: str, batch_shape: torch.Size) -> Tensor:
        return self.context[name].expand(batch_shape + self._context_event(name))


class _MaskedData(MaskedDistribution):
    """A masked model that never sees what is masked if that is not finite: 0 stands in its place."""

    def log_prob(self, value: Tensor) -> Tensor:
        mask: Any = self._mask
        if torch.is_tensor(mask) and torch.is_tensor(value):
            ones = (1,) * self.event_dim
            bad = ~value.isfinite()
            if ones:
                bad = bad.flatten(-len(ones)).any(-1).reshape(*bad.shape[: -len(ones)], *ones)
            hidden = ~mask.reshape(*mask.shape, *ones)
            value = torch.where(hidden & bad, torch.zeros_like(value), value)
        out: Tensor = super().log_prob(value)
        return out


def plates_entered() -> set[int]:
    """Batch dimensions of the vectorized plates that a program is in now."""
    return {m.dim for m in runtime._PYRO_STACK if isinstance(m, IndepMessenger) and m.dim}


def broadcast_context(
    denoiser: Denoiser, xt: Tensor, context: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A state and its context at one batch shape.

    A latent that is enumerated in a model makes the context larger than the states that a guide drew
    without it; particles make the states larger than the context.

    Raises:
        ValueError: if the batch shapes do not broadcast, naming each.
    """
    if not context:
        return xt, {}
    event_dims = {k: denoiser.context_event_dim(k, v) for k, v in context.items()}
    split = xt.dim() - denoiser.process.event_dim
    batches = {k: v.shape[: v.dim() - event_dims[k]] for k, v in context.items()}
    batch = broadcast("context", {"states": xt.shape[:split], **batches})
    expanded = {k: v.expand(batch + v.shape[v.dim() - event_dims[k] :]) for k, v in context.items()}
    return xt.expand(batch + xt.shape[split:]), expanded


def _brief(module: Any) -> str:
    """A denoiser by the names of its class and of what it wraps, not by all of its layers."""
    inner = getattr(module, "denoiser", None) or getattr(module, "network", None)
    name = type(module).__name__
    return f"{name}({_brief(inner)})" if isinstance(inner, torch.nn.Module) else name


def kept_uniform(steps: int, dtype: torch.dtype) -> Tensor:
    """One tensor for one number of steps: a model builds its distribution anew at every run."""
    times = _uniform(steps, dtype)
    if times._version:  # someone wrote into it
        _uniform.cache_clear()
        times = _uniform(steps, dtype)
    return times


@functools.lru_cache(maxsize=64)
def _uniform(steps: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        return uniform(steps, dtype)


def check_event(denoiser: object, event_shape: object) -> torch.Size:
    """Refuse anything but a denoiser and the shape of its data.

    Raises:
        ValueError: naming what was found.
    """
    if not isinstance(denoiser, Denoiser):
        raise ValueError(f"denoiser: got {type(denoiser).__name__}, expected a Denoiser")
    return denoiser.process.check_event(event_shape)  # type: ignore[arg-type]


def dtype_and_device(denoiser: Denoiser) -> tuple[torch.dtype | None, torch.device | None]:
    """Dtype and device of a denoiser's parameters, or else of its own buffers; None if it has neither."""
    process = {id(x) for x in (*denoiser.process.buffers(), *denoiser.process.parameters())}
    own = (p for p in denoiser.parameters() if id(p) not in process)
    like: list[Tensor] = [*itertools.islice(own, 1)]
    if not like:
        like = [b for b in denoiser.buffers() if b.is_floating_point() and id(b) not in process]
    if not like:
        return None, None
    # Times and data of a half-precision network stay in float32.
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in like), torch.float32)
    return dtype, like[0].device


def broadcast(name: str, shapes: dict[str, torch.Size]) -> torch.Size:
    """The shape that several broadcast to.

    Raises:
        ValueError: if they do not, naming each.
    """
    if not shapes:
        return torch.Size()  # where torch.jit traces, torch has no answer to this
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError as error:
        got = ", ".join(f"{key} {tuple(shape)}" for key, shape in shapes.items())
        raise ValueError(
            f"{name}: got shapes {got}, expected shapes that broadcast together"
        ) from error
