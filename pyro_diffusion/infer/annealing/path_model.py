"""A model as a path through its guide's latents scores it, given what other guides drew."""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_diffusion.infer.annealing.guide_chart import GuideChart
from pyro_diffusion.infer.annealing.tempered import TemperedDensity
from pyro_diffusion.infer.annealing.unconstrained import UnconstrainedModel
from pyro_diffusion.likelihoods.run import isolated

__all__ = ["PathModel"]

DRAWS = 100
TRIES = 5


class PathModel:
    r"""The density of a model over a guide's latents, for one set of arguments.

    Args:
        program: the model.
        base: guide of the latents of the path.
        chart: of the base.
        drawn: other latents, by site, sample + shape.
        first: the first draw of each.
        args: of the model.
        kwargs: of the model.

    Raises:
        ValueError: as :class:`~pyro_diffusion.infer.AnnealedSMC` does.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        base: AutoGuide,
        chart: GuideChart,
        drawn: dict[str, Tensor],
        first: dict[str, Tensor],
        args: Any,
        kwargs: Any,
    ) -> None:
        self._args, self._kwargs, self._others = args, kwargs, list(drawn)
        joint: Any = _Joint(base, first)
        self.scored = UnconstrainedModel(program, joint, args, kwargs)
        self._check_start(chart, self.given(drawn))

    def fits(self, drawn: dict[str, Tensor], args: Any, kwargs: Any) -> bool:
        """Whether it is that of these arguments, the same objects, and of the same other sites."""
        return (
            list(drawn) == self._others
            and len(args) == len(self._args)
            and kwargs.keys() == self._kwargs.keys()
            and all(a is b for a, b in zip(args, self._args, strict=True))
            and all(kwargs[name] is value for name, value in self._kwargs.items())
        )

    def density(self, chart: GuideChart) -> TemperedDensity:
        """Between the base, as its chart has it, and the posterior."""
        return TemperedDensity(self.scored, chart)

    def given(self, drawn: dict[str, Tensor]) -> Tensor | None:
        """Other latents, unconstrained: (E,), or (N, E) for N draws."""
        return self.scored.pack(drawn) if drawn else None

    def constrain(self, u: Tensor, given: Tensor | None) -> dict[str, Tensor]:
        """Values of the base's sites, of (n, D)."""
        if given is not None:
            u = torch.cat([u, given.expand(len(u), -1)], -1)
        values = self.scored.constrain(u)
        return {name: value for name, value in values.items() if name not in self._others}

    def _check_start(self, chart: GuideChart, given: Tensor | None) -> None:
        """See that some draw of the base has a density."""
        density = self.density(chart)
        with isolated(), torch.no_grad(), pyro.validation_enabled(False):
            for _ in range(TRIES):
                z = chart.base.sample(torch.Size([DRAWS]))
                u = chart(z)[0]
                if given is not None:
                    given = given.reshape(-1, given.shape[-1])[0]
                    u = torch.cat([u, given.expand(DRAWS, -1)], -1)
                self.scored.check(u)
                if bool(density(z, given)["gap"].isfinite().any()):
                    return
        raise ValueError(
            f"{self.scored.blame(u[0])} at a draw of the base, and no density at any of {DRAWS} draws, "
            f"{TRIES} times over, expected a base whose draws the model allows"
        )


class _Joint:
    """Base and other draws as one guide, of which names, order and one draw are asked."""

    def __init__(self, base: AutoGuide, others: dict[str, Tensor]) -> None:
        self._base, self._others = base, others
        self.prototype_trace = self

    def iter_stochastic_nodes(self) -> Iterator[tuple[str, Any]]:
        trace: Any = self._base.prototype_trace
        yield from trace.iter_stochastic_nodes()
        yield from ((name, None) for name in self._others)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {**self._base(*args, **kwargs), **self._others}
