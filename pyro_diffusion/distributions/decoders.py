"""The data end of a chain: p(x | x_{t_0}), and how data becomes x_0."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pyro.distributions import Categorical, Delta, Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.denoisers.discrete import Quantized
from pyro_diffusion.denoisers.fourier_density import FourierDensity
from pyro_diffusion.distributions.discretized import DiscretizedNormal
from pyro_diffusion.nn.definition import DefinedModule
from pyro_diffusion.precision import PreciseModule
from pyro_diffusion.processes import Ability, ForwardProcess
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.processes.conditioned_normal import normal_from, normal_tensors
from pyro_diffusion.processes.multivariate_t import DiagonalStudentT
from pyro_diffusion.processes.string_distributions import Insertions
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import check_finite, check_integers, check_number, check_positive_int

__all__ = ["CategoricalDecoder", "Decoder", "NormalDecoder", "QuantizedDecoder", "default_decoder"]


class Decoder(DefinedModule, PreciseModule):
    """Turns the last posterior into a distribution over data, and data into x_0.

    A decoder never evaluates a network: it widens the denoiser's posterior at t_0 until it has a density
    (or a probability) over data.

    Attributes:
        keeps_x0: whether data are x_0 itself.
    """

    keeps_x0: ClassVar[bool] = False

    def check_process(self, process: ForwardProcess) -> None:
        """Refuse a process of other data; by default any process will do.

        Raises:
            ValueError: naming what was found.
        """

    def support(self, event_dim: int) -> constraints.Constraint:
        """Constraint on data, of event dimension ``event_dim``."""
        raise NotImplementedError

    def check(self, value: Tensor) -> None:
        """Refuse data outside the support.

        Raises:
            ValueError: naming what was found.
        """
        raise NotImplementedError

    def encode(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Data as x_0."""
        raise NotImplementedError

    def data_of(self, x0: Tensor) -> Tensor:
        """The inverse of :meth:`encode`, differentiable, and extended to all x_0 where data are integers."""
        return x0

    def forward(
        self, posterior: TorchDistribution, t: Level, process: ForwardProcess
    ) -> TorchDistribution:
        """The distribution of data given x_{t_0}.

        Args:
            posterior: p(x_0 | x_{t_0}) from the denoiser.
            t: the level at t_0.
            process: the forward process.
        """
        raise NotImplementedError

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """The tensors that define what :meth:`forward` returned: as a process has them for its kernels."""
        raise NotImplementedError

    def kernel_from(self, tensors: Mapping[str, Tensor], event_dim: int) -> TorchDistribution:
        """The distribution over data of such tensors, of event dimension ``event_dim``."""
        raise NotImplementedError

    def baseline(self, t: Level, event_shape: torch.Size) -> Tensor | float:
        """Expected -log p(x | x_{t_0}) of a posterior as sure as the evidence at t_0 (nats per datum)."""
        return 0.0


class NormalDecoder(Decoder):
    r"""Continuous data: the posterior at t_0 itself, or a normal of its mean and variance.

    A Fourier density is used as it is. A point mass is widened by the evidence: the process's noise at the
    scale :math:`\sigma/\alpha` around it, such as :math:`\mathcal N(\hat x_0, \sigma^2/\alpha^2)`.
    """

    keeps_x0 = True

    def check_process(self, process: ForwardProcess) -> None:
        """Refuse a process whose data are no real numbers."""
        require(process, Ability.NUMBERS, argument="decoder", by=self)

    def support(self, event_dim: int) -> constraints.Constraint:
        """Real numbers."""
        return constraints.independent(constraints.real, event_dim)

    def check(self, value: Tensor) -> None:
        """Refuse NaN and infinite data."""
        check_finite("value", value)

    def encode(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """The data as they are, in the model's dtype."""
        return value.to(dtype)

    def forward(
        self, posterior: TorchDistribution, t: Level, process: ForwardProcess
    ) -> TorchDistribution:
        """A normal of the posterior's mean and variance, the evidence of a point mass, a Fourier density."""
        if isinstance(per_coordinate(posterior), FourierDensity):
            return posterior
        mean, scale = _loc_scale(posterior, t)
        if isinstance(per_coordinate(posterior), Delta):
            return process.noised(mean, scale)
        return Normal(mean, scale, validate_args=False).to_event(process.event_dim)

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """Location and scale of every coordinate, and what else such a distribution has."""
        if isinstance(base := per_coordinate(kernel), FourierDensity):
            return {name: getattr(base, name) for name in ("coefficients", "loc", "scale")}
        own = normal_tensors(kernel)
        if isinstance(base, DiagonalStudentT):
            own["df"] = torch.full_like(base.loc, base.df)
        return own

    def kernel_from(self, tensors: Mapping[str, Tensor], event_dim: int) -> TorchDistribution:
        """The normal, Student-t or Fourier distribution of them."""
        if "coefficients" in tensors:
            a, loc, scale = (tensors[name] for name in ("coefficients", "loc", "scale"))
            return FourierDensity(a, loc, scale, validate_args=False).to_event(event_dim)
        if "df" in tensors:
            df = float(tensors["df"].flatten()[0])
            return DiagonalStudentT(df, tensors["loc"], tensors["scale"], event_dim)
        return normal_from(tensors, event_dim)

    def baseline(self, t: Level, event_shape: torch.Size) -> Tensor | float:
        """Entropy of the evidence, the sum of (log(2 pi e) - log-SNR)/2: very negative, the same for all."""
        # Scales broadcast to the event: their mean is that of all coordinates.
        return 0.5 * event_shape.numel() * (math.log(2 * math.pi * math.e) - t.log_snr.mean())


class QuantizedDecoder(Decoder):
    r"""Integers 0 ... levels - 1 (images of any bit depth, bounded counts), as x_0 in [low, high].

    A normal posterior is integrated over each integer's bin, the two end bins reaching to infinity; a
    posterior on the quantized values themselves is used as it is.

    Args:
        levels: number of integers, >= 2 (256 for 8 bits).
        low: x_0 of the integer 0.
        high: x_0 of the integer ``levels - 1``.

    Raises:
        ValueError: if ``levels < 2`` or ``low >= high``.

    References:
        Ho et al., arXiv 2006.11239, equation 13.
    """

    def __init__(self, levels: int, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        self.levels = check_positive_int("levels", levels, at_least=2)
        if not check_number("low", low) < check_number("high", high):
            raise ValueError(f"low, high: got {low}, {high}, expected low < high")
        self.low, self.high = float(low), float(high)
        self.width = (self.high - self.low) / (levels - 1)

    def check_process(self, process: ForwardProcess) -> None:
        """Refuse a process whose data are no real numbers."""
        require(process, Ability.NUMBERS, argument="decoder", by=self)

    def support(self, event_dim: int) -> constraints.Constraint:
        """Integers from 0 to levels - 1."""
        return constraints.independent(constraints.integer_interval(0, self.levels - 1), event_dim)

    def check(self, value: Tensor) -> None:
        """Refuse anything but integers in range."""
        check_integers("value", value, self.levels)

    def encode(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Integers to evenly spaced real numbers."""
        return self.low + self.width * value.to(dtype)

    def data_of(self, x0: Tensor) -> Tensor:
        """Numbers on the line of the integers, exact where x_0 is one of the levels."""
        return (x0 - self.low) / self.width

    def forward(
        self, posterior: TorchDistribution, t: Level, process: ForwardProcess
    ) -> TorchDistribution:
        """The posterior's probability of each integer."""
        base = per_coordinate(posterior)
        if hasattr(base, "logits"):
            if base.logits.shape[-1] != self.levels:
                raise ValueError(
                    f"decoder: got {self.levels} levels and a posterior over {base.logits.shape[-1]} "
                    "values, expected as many"
                )
            integers: TorchDistribution = base.index if isinstance(base, Quantized) else base
        else:
            mean, scale = _loc_scale(posterior, t)
            loc = (mean - self.low) / self.width
            integers = DiscretizedNormal(loc, scale / self.width, self.levels, validate_args=False)
        return integers.to_event(process.event_dim)

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """Moments of the normal in units of bins, or (log-)probabilities of the integers."""
        base = per_coordinate(kernel)
        if isinstance(base, DiscretizedNormal):
            return {"loc": base.loc, "scale": base.scale}
        return _categorical_tensors(base)

    def kernel_from(self, tensors: Mapping[str, Tensor], event_dim: int) -> TorchDistribution:
        """The normal in integer bins, or the categorical."""
        if "loc" in tensors:
            binned = DiscretizedNormal(**tensors, levels=self.levels, validate_args=False)
            return binned.to_event(event_dim)
        return _categorical(tensors).to_event(event_dim)


class CategoricalDecoder(Decoder):
    """Symbols 0 ... states - 1: the categorical posterior at t_0 itself.

    Args:
        states: number of symbols.
    """

    def __init__(self, states: int) -> None:
        super().__init__()
        self.states = check_positive_int("states", states, at_least=2)

    def check_process(self, process: ForwardProcess) -> None:
        """Refuse a process of other data than as many symbols."""
        require(process, Ability.SYMBOLS, argument="decoder", by=self)
        if self.states != _states(process):
            raise ValueError(
                f"decoder: got {self!r} of {self.states} states, expected {_states(process)}, those of the "
                f"{type(process).__name__} process"
            )

    def support(self, event_dim: int) -> constraints.Constraint:
        """Integers from 0 to states - 1."""
        return constraints.independent(constraints.integer_interval(0, self.states - 1), event_dim)

    def check(self, value: Tensor) -> None:
        """Refuse anything but symbols in range."""
        check_integers("value", value, self.states)

    def encode(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Symbols as int64."""
        del dtype
        return value.long()

    def forward(
        self, posterior: TorchDistribution, t: Level, process: ForwardProcess
    ) -> TorchDistribution:
        """The posterior."""
        return posterior

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """Probabilities of the symbols, their logarithms, or both."""
        return _categorical_tensors(per_coordinate(kernel))

    def kernel_from(self, tensors: Mapping[str, Tensor], event_dim: int) -> TorchDistribution:
        """The categorical of such (log-)probabilities."""
        return _categorical(tensors).to_event(event_dim)


class StringDecoder(Decoder):
    """Padded strings of 0 ... symbols - 1: the posterior at t_0 itself, or x_{t_0} if nothing is lost there.

    Args:
        symbols: number of symbols, and the pad.
    """

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.symbols = check_positive_int("symbols", symbols)

    def check_process(self, process: ForwardProcess) -> None:
        """Refuse a process of other data than strings of as many symbols."""
        require(process, Ability.STRINGS, argument="decoder", by=self)
        if self.symbols != _states(process) - 1:
            raise ValueError(
                f"decoder: got {self!r} of {self.symbols} symbols, expected {_states(process) - 1}, those of "
                f"the {type(process).__name__} process"
            )

    def support(self, event_dim: int) -> constraints.Constraint:
        """Integers from 0 to symbols, the pad."""
        return constraints.independent(constraints.integer_interval(0, self.symbols), event_dim)

    def check(self, value: Tensor) -> None:
        """Refuse integers that are neither symbol nor pad, and pads before a symbol."""
        check_integers("value", value, self.symbols + 1)
        if bool(((value[..., :-1] == self.symbols) & (value[..., 1:] != self.symbols)).any()):
            raise ValueError(
                f"value: got a pad ({self.symbols}) before a symbol, expected all pads at the right end"
            )

    def encode(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Symbols and pads as int64."""
        del dtype
        return value.long()

    def forward(
        self, posterior: TorchDistribution, t: Level, process: ForwardProcess
    ) -> TorchDistribution:
        """The posterior; where no symbol is lost at t = 0, certainty of the state that it is of."""
        base: Any = posterior
        if process.clock_ends[0] == math.inf:
            return process.point_mass(base.x)
        return posterior

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """The string itself, or the one before and the log-odds of insertions."""
        base: Any = kernel
        return (
            {"v": base.v} if isinstance(base, Delta) else {"x": base.x, "log_odds": base.log_odds}
        )

    def kernel_from(self, tensors: Mapping[str, Tensor], event_dim: int) -> TorchDistribution:
        """The point mass or the insertions of such tensors."""
        if "v" in tensors:
            return Delta(tensors["v"], event_dim=event_dim, validate_args=False)
        return Insertions(**tensors, symbols=self.symbols)


def default_decoder(process: ForwardProcess) -> Decoder:
    """A normal decoder for data of real numbers, a categorical one for symbols, one of strings for strings.

    Raises:
        ValueError: for a process of other data.
    """
    if Ability.NUMBERS in process.abilities:
        return NormalDecoder()
    if Ability.SYMBOLS in process.abilities:
        return CategoricalDecoder(_states(process))
    if Ability.STRINGS in process.abilities:
        return StringDecoder(_states(process) - 1)
    raise ValueError(f"decoder: got none for a {type(process).__name__}, expected one")


def check_decoder(decoder: object, process: ForwardProcess) -> Decoder:
    """Refuse anything but a decoder, and one that does not fit the process.

    Raises:
        ValueError: naming what was found.
    """
    if not isinstance(decoder, Decoder):
        raise ValueError(f"decoder: got {decoder!r}, expected a Decoder such as NormalDecoder()")
    decoder.check_process(process)
    return decoder


def _states(process: ForwardProcess) -> int:
    """How many symbols data may be."""
    support: Any = process.support
    return int(support.upper_bound) + 1


def _categorical_tensors(base: Any) -> dict[str, Tensor]:
    """What a categorical draws by (probabilities) and scores by (their logarithms), as far as it holds them.

    Neither says all of the other: logarithms of probabilities that are 0 are those of torch's floor instead,
    and probabilities of low logarithms underflow.
    """
    return {name: vars(base)[name] for name in ("probs", "logits") if name in vars(base)}


def _categorical(tensors: Mapping[str, Tensor]) -> Categorical:
    """The categorical that draws and scores by such tensors."""
    given = "logits" if "logits" in tensors else "probs"
    out = Categorical(**{given: tensors[given]}, validate_args=False)
    out.__dict__.update(tensors)
    return out


def _loc_scale(posterior: TorchDistribution, t: Level) -> tuple[Tensor, Tensor]:
    base = per_coordinate(posterior)
    if isinstance(base, Delta):
        return base.mean, t.noise_to_signal
    if hasattr(base, "logits"):  # no density: its variance may be zero
        raise ValueError(
            f"decoder: got NormalDecoder and a posterior over {base.logits.shape[-1]} values, expected a "
            "QuantizedDecoder"
        )
    return base.mean, base.variance.sqrt()
