"""Several amortized posteriors as one guide: their mixture."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_diffusion.infer.simulators.auto_amortized import AutoAmortized
from pyro_diffusion.infer.simulators.mixture import EqualMixture
from pyro_diffusion.infer.simulators.simulated_latents import Values
from pyro_diffusion.infer.simulators.simulated_levels import SHAPES
from pyro_diffusion.infer.simulators.simulations import Simulator
from pyro_diffusion.validation import kind_of

__all__ = ["AutoEnsemble"]

# What the first member knows of the program.
KNOWN = ("_simulator", "_call", "_levels", "_simulated")


class AutoEnsemble(AutoAmortized):
    r"""The mixture of amortized posteriors, :math:`q(\theta | x) = \frac1M \sum_m q_m(\theta | x)`.

    Guides that were trained from different seeds err differently, most where simulations are few: their
    mixture is no worse than its members on average in :math:`E \log q(\theta | x)` (Jensen), and covers
    what one of them misses. It costs M trainings; draws cost as many as those of one guide, a density M
    times one's. Each member is trained by itself, on the same simulations::

        guide = AutoEnsemble([AutoAmortized(model, observed=["x"]) for _ in range(5)])
        simulations = guide.simulate(1000)
        for member in guide.members:
            fit_amortized(member, simulations)

    Then it is a guide as any :class:`AutoAmortized`: draws, ``log_prob``, quantiles, diagnostics, importance
    weights. Draws are shared out evenly among the members. States: ``guide.state_dict()`` loads into an
    ensemble of as many fresh members.

    Args:
        members: guides of the same program, of the same latents and observed sites.

    Raises:
        ValueError: for no members, or anything but distinct guides of one program.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x=None):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> guide = AutoEnsemble([AutoAmortized(model, observed=["x"]) for _ in range(3)])
        >>> simulations = guide.simulate(100)
        >>> guide.draw(6, {"x": torch.zeros(2)})["mean"].shape
        torch.Size([6, 2])

    References:
        Lakshminarayanan, Pritzel & Blundell, arXiv 1612.01474; Hermans et al., arXiv 2110.06581 (ensembles of
        simulation-based posteriors are better calibrated).
    """

    def __init__(self, members: Sequence[AutoAmortized]) -> None:
        if not isinstance(members, Sequence | nn.ModuleList) or not len(members):
            raise ValueError(f"members: got {kind_of(members)}, expected a list of AutoAmortized")
        for i, member in enumerate(members):
            if not isinstance(member, AutoAmortized) or isinstance(member, AutoEnsemble):
                raise ValueError(f"members[{i}]: got {kind_of(member)}, expected an AutoAmortized")
        first = members[0]
        if len({id(member) for member in members}) < len(members):
            raise ValueError("members: got one guide twice, expected guides trained apart")
        if any(member._program[0] is not first._program[0] for member in members):
            raise ValueError("members: got guides of several programs, expected one program")
        summaries = [id(member._parts[0]) for member in members if member._parts[0] is not None]
        if len(set(summaries)) < len(summaries):
            raise ValueError("members: got one summary for several guides, expected one for each")
        latents, observed = first._names
        super().__init__(first._program[0], observed=observed, latents=latents)
        self.members = nn.ModuleList(members)
        for i, member in enumerate(
            members
        ):  # parameters of each have names of their own in Pyro's store
            member._pyro_name = f"{self._pyro_name}.members.{i}"
        self._share()

    def _each(self) -> list[AutoAmortized]:
        return list(self.members)  # type: ignore[arg-type]

    def _share(self) -> None:
        """Know what the first member knows of the program, and of the sizes of its plates in this call."""
        first = self._each()[0]
        known = first._simulator is not None
        for name in KNOWN + SHAPES * known:
            if hasattr(first, name):
                setattr(self, name, getattr(first, name))

    def _prepare(self, args: Any, kwargs: Any) -> Simulator:
        found = [member._prepare(args, kwargs) for member in self._each()]
        first = found[0]
        sites = (list(first.latents), list(first.observed))
        if any((list(each.latents), list(each.observed)) != sites for each in found):
            raise ValueError(
                f"members: got guides of several latents or observed sites, expected {sites[0]} given "
                f"{sites[1]} of all"
            )
        self._share()
        return first

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self._prepare(args, kwargs)

    def _ready(self, name: str) -> Any:
        found = [member._ready(name) for member in self._each()]
        return found[0]

    def _valid(self, values: Values) -> Values:
        for member in self._each():
            values = member._valid(values)
        return values

    def training_model(self, **simulations: Tensor) -> None:
        """Refused: members are trained one by one.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "training_model: got an AutoEnsemble, expected its members, each trained by itself (from a seed "
            "of its own)"
        )

    def get_posterior(self, *args: Any, **kwargs: Any) -> EqualMixture:
        """The mixture of the members' posteriors of packed, unconstrained latents given the arguments' data.

        Raises:
            ValueError: as that of the members.
        """
        self._prepare(args, kwargs)
        parts = [member.get_posterior(*args, **kwargs) for member in self._each()]
        self._share()
        return EqualMixture(parts)

    def _data_of(self, values: Any) -> Any:
        found = self._each()[0]._data_of(values)
        self._share()
        return found

    def _posterior(self, data: Any, batch: torch.Size, shape: torch.Size) -> EqualMixture:
        return EqualMixture([member._posterior(data, batch, shape) for member in self._each()])
