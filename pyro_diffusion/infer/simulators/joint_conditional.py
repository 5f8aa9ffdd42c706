"""One conditional of a learned joint distribution: a guide over the sites that are not given."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from pyro_diffusion.infer.simulators.conditional_posterior import FlowPosterior
from pyro_diffusion.infer.simulators.intervals import by_normal_quantiles
from pyro_diffusion.infer.simulators.packed import packed_log_prob, packed_quantiles, packed_values
from pyro_diffusion.infer.simulators.simulations import SimulatedSite
from pyro_diffusion.likelihoods.run import isolated, unconditioned
from pyro_diffusion.validation import Shape, check_sizes

__all__ = ["JointConditional"]


class JointConditional(AutoContinuous):
    r"""The law of a program's other sites given values of some, :math:`q(x_F | x_C)`.

    Made by :meth:`AutoJoint.condition <pyro_diffusion.infer.AutoJoint.condition>`. A distribution of
    dictionaries, and a guide of the program conditioned on the same values::

        conditional = joint.condition({"b": b})
        conditional.sample((1000,))["a"]
        Predictive(poutine.condition(model, {"b": b}), guide=conditional, num_samples=1000, parallel=True)()

    Draws are those of the probability flow, in the supports of their sites, constants for autograd;
    densities are exact for the flow up to the solver's tolerance. Given values of further batch dimensions on
    the left, as many for each site, have their laws side by side. What the draws are worth is decided by
    simulations and training: *approximate*.

    Args:
        program: the Pyro program.
        args: its arguments.
        kwargs: likewise.
        sites: those that are free, in the order of the program.
        posterior: of their unconstrained values in one vector.
        nesting: dimensions of the program's plates.
    """

    prototype_trace: Any

    def __init__(
        self,
        program: Callable[..., Any],
        args: Any,
        kwargs: Any,
        sites: Mapping[str, SimulatedSite],
        posterior: FlowPosterior,
        nesting: int,
    ) -> None:
        free = frozenset(sites)
        super().__init__(
            poutine.block(unconditioned(program), hide_fn=lambda m: _hidden(m, free)),
            init_to_sample,
        )
        # in tuples, so that none becomes a submodule
        self._law, self._sites, self._nesting = (posterior,), dict(sites), nesting
        state = pyro.util.get_rng_state()
        with isolated():
            self._setup_prototype(*args, **kwargs)
        by_normal_quantiles(self.prototype_trace)
        pyro.util.set_rng_state(state)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the free sites, in the order of the program."""
        return tuple(self._sites)

    @property
    def batch_shape(self) -> torch.Size:
        """That of the given values."""
        shape: torch.Size = self._law[0].batch_shape
        return shape[: len(shape) - self._nesting] if shape else shape

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowPosterior:
        """The law of the unconstrained values of the free sites, in one vector."""
        return self._law[0]

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        # the network may be of single precision, and the program of double
        for site, free in super()._unpack_latent(latent):
            yield site, free.to(site["value"].dtype)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = torch.Size()) -> dict[str, Tensor]:
        """Draws of the free sites, each sample + batch + the site's shape."""
        shape = torch.Size(check_sizes("sample_shape", sample_shape))
        return packed_values(self, self._law[0].sample(shape), self._nesting)

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log-density of values of all free sites, in their own spaces (nats).

        Exact for the flow up to the solver's tolerance; differentiable in the values.

        Args:
            values: sample + batch + shape of each site.

        Returns:
            sample + batch.

        Raises:
            ValueError: for missing sites, other shapes, and values outside the support.
        """
        return packed_log_prob(self, self._law[0], values, self._sites, self._nesting)

    def median(self, *args: Any, num_samples: int = 1000, **kwargs: Any) -> dict[str, Tensor]:
        """Median of every coordinate over ``num_samples`` draws; see :meth:`quantiles`."""
        found = self.quantiles([0.5], num_samples=num_samples)
        return {name: value.squeeze(0) for name, value in found.items()}

    def quantiles(
        self, quantiles: list[float], *args: Any, num_samples: int = 1000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of every coordinate over ``num_samples`` draws, each (quantiles,) + batch +
        the site's shape.

        Raises:
            ValueError: for a number of draws below 1, and quantiles outside [0, 1].
        """
        return packed_quantiles(self, self._law[0], quantiles, num_samples, self._nesting)


def _hidden(msg: Any, free: frozenset[str]) -> bool:
    """What is given, integrated out, or a parameter."""
    if msg["type"] == "param":
        return True
    sample = msg["type"] == "sample" and type(msg["fn"]).__name__ != "_Subsample"
    return bool(sample and msg["name"] not in free)
