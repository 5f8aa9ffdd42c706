"""The joint distribution of a program's sites, learned so that any of them may be given."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_diffusion.distributions.objectives import Objective
from pyro_diffusion.distributions.regressions import FlowMatching
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.dynamics.ode_solver import check_ode_solver
from pyro_diffusion.infer.simulators.conditional_posterior import FlowPosterior
from pyro_diffusion.infer.simulators.dependencies import moral_graph
from pyro_diffusion.infer.simulators.joint_conditional import JointConditional
from pyro_diffusion.infer.simulators.joint_law import (
    JointLaw,
    MakeSiteDenoiser,
    default_site_denoiser,
)
from pyro_diffusion.infer.simulators.random_conditions import check_conditions, draw_conditioned
from pyro_diffusion.infer.simulators.runs import traced
from pyro_diffusion.infer.simulators.simulated_latents import SimulatedLatents
from pyro_diffusion.infer.simulators.simulations import Simulator, find_joint
from pyro_diffusion.likelihoods.run import unconditioned
from pyro_diffusion.unreliable import warn_unreliable
from pyro_diffusion.validation import check_finite, check_tensor

__all__ = ["AutoJoint"]


class AutoJoint(SimulatedLatents):
    r"""Every conditional of a program's sites, :math:`p(x_F | x_C)` for any C, learned from its simulations.

    One diffusion over the unconstrained, standardized values of all sites, latent and observed, in which any
    may be *given*: its network takes given values clean and the others noisy. So one training yields
    posteriors, likelihoods, predictions given some data and some latents, and the joint distribution::

        joint = AutoJoint(model)
        fit_amortized(joint, joint.simulate(10_000))
        posterior = joint.condition({"x": x})          # p(everything else | x)
        likelihood = joint.condition({"mean": mean})   # p(everything else | mean), data included
        posterior.sample((1000,)), posterior.log_prob(posterior.sample((5,)))

    **Training** is on simulations with *random* given sites, of four kinds: none (``joint``), all data
    (``posterior``), all else (``likelihood``), or each with a probability that is uniform for every row
    (``random``, every number of given sites alike). Simulated sites are *observed*, distributed as the joint
    has it given those (:meth:`training_model`), by flow matching or any objective of diffusions; the bound is
    one of :math:`\log q(x_F | x_C)`. What is linear in it is known beforehand, from the covariance of the
    simulations: jointly normal sites are right from the start, and the network learns the rest.

    **The graph.** Attention in the default network follows the program's moral graph, read by
    ``pyro.infer.inspect``: a free site hears its neighbours, a given one hears nobody
    (:class:`~pyro_diffusion.nn.SiteTransformer`). So sites that are separated by given ones have no influence
    on one another, exactly, and nothing is left out that the program's conditionals depend on. A program
    whose dependencies cannot be read, because it takes drawn numbers out of torch, has no mask, and a warning
    says so.

    Args:
        model: a Pyro program of continuous sites. Where data are arguments, ``None`` of them simulates.
        observed: names of the sites that are data, which only decides what ``posterior`` and ``likelihood``
            mean in training; those that are observed when the model is run with the arguments of the first
            call, if None.
        sites: names of the sites of interest; all if None. The others are integrated out.
        graph: whether the program's dependencies mask attention; or parents of each site by name.
        conditions: weights of ``joint``, ``posterior``, ``likelihood`` and ``random``; .1, .1, .1 and .7.
        denoiser: a function of the number of unconstrained coordinates and their graph, (M, M) booleans or
            None, that returns a denoiser whose network takes context ``given`` and ``conditioned``, as a
            :class:`~pyro_diffusion.nn.SiteTransformer` does.
        objective: of training; :class:`~pyro_diffusion.distributions.FlowMatching` by default, which learns
            draws sooner than the bound where noise prevails; with ``Bound()`` losses are bounds.
        solver: of the probability flow; dopri5 with tolerances of 1e-4 by default.
        vectorized: whether simulations may be one run of the program inside one more plate; found out by a
            trial if None, and else they are run one by one.

    Attributes:
        dropped: simulations that were not finite, of all so far.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x=None):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 5):
        ...         pyro.sample("x", dist.Normal(mean, scale), obs=x)
        >>> joint = AutoJoint(model, observed=["x"])
        >>> simulations = joint.simulate(500)
        >>> draws = joint.condition({"mean": torch.tensor(1.0)}).sample((7,))
        >>> {name: tuple(value.shape) for name, value in draws.items()}
        {'scale': (7,), 'x': (7, 5)}

    References:
        Gloeckler et al., arXiv 2404.09636 (one diffusion of all conditionals, attention masked by a graph).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        observed: Collection[str] | None = None,
        sites: Collection[str] | None = None,
        graph: bool | Mapping[str, Collection[str]] = True,
        conditions: Mapping[str, float] | None = None,
        denoiser: MakeSiteDenoiser | None = None,
        objective: Objective | None = None,
        solver: ODESolver | None = None,
        vectorized: bool | None = None,
    ) -> None:
        if not callable(model):
            raise ValueError(f"model: got {type(model).__name__}, expected a Pyro program")
        if objective is not None and not isinstance(objective, Objective):
            raise ValueError(f"objective: got {type(objective).__name__}, expected an Objective")
        make: Any = default_site_denoiser if denoiser is None else denoiser
        super().__init__(unconditioned(model), None, make, observed, sites, vectorized)
        self._original, self._graph = (model,), _checked_graph(graph)
        self._conditions = check_conditions(conditions)
        self._objective = FlowMatching() if objective is None else objective
        tolerant = ODESolver("dopri5", rtol=1e-4, atol=1e-4)
        self._solver = tolerant if solver is None else check_ode_solver(solver)
        self._arguments: tuple[Any, Any] = ((), {})
        self._data_sites: list[str] = []

    def training_model(self, **simulations: Tensor) -> None:
        """A program that observes simulated sites as they are distributed given some of them, at random.

        For ``SVI`` and :class:`~pyro_diffusion.train.Trainer` with an empty guide and any ELBO that takes an
        estimated density (``Trace_ELBO()``). Its loss is that of the standardized, unconstrained free sites.
        In a loop of your own give the optimizer ``joint.parameters()``.

        Args:
            simulations: (N,) + shape of each site, of ``simulate``.

        Raises:
            ValueError: before the first simulations, and for other sites or shapes.
        """
        law, values = self._joint("training_model"), self._to_train_on(simulations)[1]
        rows = len(next(iter(values.values())))
        joint = law.latents(self._pack(values, torch.Size([rows])))
        conditioned = self._draw_conditioned(rows, joint.device)
        pyro.module(f"{self._pyro_name}.posterior", law)
        with pyro.plate("simulations", rows):
            pyro.sample("sites", law.diffusion(joint, conditioned, self._objective), obs=joint)

    def condition(
        self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> JointConditional:
        """The law of all other sites given values of some.

        Args:
            values: of any sites but all of them, batch + the shape of each; none for the joint distribution.
            args: the model's, those of the simulations if none are given.
            kwargs: likewise.

        Raises:
            ValueError: before the first simulations; for sites that are unknown or all, and values of another
                shape, not finite or outside the support.
        """
        law = self._joint("condition")
        if not (args or kwargs):
            args, kwargs = self._arguments
        simulator = self._prepare(args, kwargs)
        given, batch = self._given(values, simulator)
        packed = law.latents.loc.new_zeros(*batch, law.latent_size)
        conditioned = torch.zeros(law.latent_size, dtype=torch.bool, device=packed.device)
        for name, part in self._places().items():
            if name in given:
                packed[..., part] = given[name].reshape(*batch, -1).to(packed)
                conditioned[part] = True
        packed = (packed - law.latents.loc) / law.latents.scale
        self._check_familiar(law, packed, conditioned)
        nesting = (1,) * simulator.nesting if batch else ()
        flow = law.flow(packed.reshape(*batch, *nesting, -1), conditioned, self._solver)
        free = {name: site for name, site in simulator.latents.items() if name not in given}
        return JointConditional(
            self._original[0], args, kwargs, free, flow, simulator.nesting if batch else 0
        )

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowPosterior:
        """The joint distribution of all sites, packed and unconstrained: what it is as a guide.

        Raises:
            ValueError: before the first simulations, and for data among the arguments.
        """
        law = self._joint("guide")
        self._check_without_data(args, kwargs)
        nothing = torch.zeros_like(law.latents.loc)
        return law.flow(nothing, nothing.bool(), self._solver)

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the sites that are data, known after the first simulations."""
        return tuple(self._data_sites)

    @property
    def graph(self) -> Tensor | None:
        """Which unconstrained coordinates are neighbours, (M, M) booleans; None if all may be."""
        return self._joint("graph").graph

    def _check_without_data(self, args: Any, kwargs: Any) -> None:
        if not (args or kwargs):
            return
        state = pyro.util.get_rng_state()
        nodes = traced(self._original[0], args, kwargs).nodes
        pyro.util.set_rng_state(state)
        given = [n for n in self._data_sites if n in nodes and nodes[n]["is_observed"]]
        if given:
            raise ValueError(
                f"guide: got data of {given}, expected none, as an AutoJoint is the law of all its sites "
                "together: condition({site: value}) is the law, and the guide, given them"
            )

    # What SimulatedLatents asks.

    def _find(self, args: Any, kwargs: Any) -> Simulator:
        sites, observed = self._names
        found, self._data_sites = find_joint(
            self._original[0], args, kwargs, sites, observed, self._vectorized
        )
        self._arguments = (args, kwargs)
        return found

    def _build(self, simulator: Simulator) -> nn.Module:
        graph = None
        if self._graph is not False:
            parents = None if self._graph is True else self._graph
            args, kwargs = self._arguments
            state = pyro.util.get_rng_state()
            shapes = {name: self._unconstrained_shapes[name] for name in simulator.latents}
            graph = moral_graph(self._original[0], args, kwargs, shapes, parents)
            pyro.util.set_rng_state(state)
        return JointLaw(self.latent_dim, graph, self._parts[1])  # type: ignore[arg-type]

    def _check_state(self, simulator: Simulator) -> None:
        own = self._modules["posterior"].latent_size  # type: ignore[union-attr]
        if own != self.latent_dim:
            raise ValueError(
                f"model: got {self.latent_dim} unconstrained coordinates, expected {own}, those of the state "
                "that was loaded"
            )

    def _joint(self, name: str) -> JointLaw:
        law: Any = self._ready(name)
        return law

    def _places(self) -> dict[str, slice]:
        """Coordinates of every site."""
        ends, found = 0, {}
        for name, shape in self._unconstrained_shapes.items():
            found[name] = slice(ends, ends := ends + shape.numel())
        return found

    def _draw_conditioned(self, rows: int, device: torch.device) -> Tensor:
        """Which coordinates are given in each row, (rows, M)."""
        places = self._places()
        data = [name in self._data_sites for name in places]
        chosen = draw_conditioned(self._conditions, data, rows, device)
        sizes = torch.tensor([part.stop - part.start for part in places.values()], device=device)
        return chosen.repeat_interleave(sizes, 1)

    def _given(
        self, values: Mapping[str, Tensor], simulator: Simulator
    ) -> tuple[dict[str, Tensor], torch.Size]:
        """Unconstrained given values, of one batch shape."""
        sites = simulator.latents
        if not isinstance(values, Mapping):
            raise ValueError(f"values: got {type(values).__name__}, expected a dictionary by site")
        unknown = [name for name in values if name not in sites]
        if unknown or len(values) == len(sites):
            raise ValueError(
                f"values: got sites {list(values)}, expected some of {list(sites)}, but not all"
            )
        batch, found = torch.Size(), {}
        for name, value in values.items():
            shape = sites[name].shape
            value = check_tensor(f"site {name!r}", torch.as_tensor(value))
            lead = value.dim() - len(shape)
            if lead < 0 or value.shape[lead:] != shape:
                raise ValueError(
                    f"site {name!r}: got a value of shape {tuple(value.shape)}, expected {tuple(shape)}, as "
                    "simulated, or further batch dimensions on its left"
                )
            check_finite(f"site {name!r}", value)
            support = self.prototype_trace.nodes[name]["fn"].support
            found[name] = biject_to(support).inv(value)
            if not bool(support.check(value).all() and found[name].isfinite().all()):
                raise ValueError(
                    f"site {name!r}: got a value outside of its support or at its edge, expected one inside "
                    f"of {support}"
                )
            batch = torch.broadcast_shapes(batch, value.shape[:lead])
        return {
            name: free.expand(batch + self._unconstrained_shapes[name])
            for name, free in found.items()
        }, batch

    def _check_familiar(self, law: JointLaw, packed: Tensor, conditioned: Tensor) -> None:
        if not bool(conditioned.any()) or len(law.rows) < 4:
            return
        familiar = law.familiar(conditioned)
        distances = familiar.distance(packed[..., conditioned])
        beyond = distances > familiar.limit
        if bool(beyond.any()):
            many, count = beyond.dim() > 0, beyond.numel()
            which = f"{int(beyond.sum())} of {count}" if many else "values"
            chance = f" ({familiar.expected(count):.1g} of them by chance)" if many else ""
            warn_unreliable(
                f"values: got {which} at a Mahalanobis distance of {float(distances.max()):.3g} from the "
                f"mean of the simulations, beyond {float(familiar.limit):.3g}, which a simulation exceeds "
                f"with a probability of {float(familiar.rate):.1g} at most{chance}: the law is extrapolated "
                "there"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A fresh one is built from the shapes of what it loads.
        own = f"{prefix}posterior."
        if f"{own}latents.loc" in state_dict:
            size = state_dict[f"{own}latents.loc"].numel()
            rows = len(state_dict[f"{own}rows"])
            if "posterior" not in self._modules:
                graph = state_dict.get(f"{own}graph")
                self.posterior = JointLaw(size, graph, self._parts[1], rows)  # type: ignore[arg-type]
            law: Any = self._modules["posterior"]
            law.rows = law.rows.new_zeros(rows, size)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _checked_graph(graph: Any) -> bool | dict[str, list[str]]:
    if isinstance(graph, bool):
        return graph
    if not isinstance(graph, Mapping) or any(isinstance(p, str) for p in graph.values()):
        raise ValueError(
            f"graph: got {graph!r}, expected True, False or the parents of each site, {{name: [names]}}"
        )
    return {name: list(parents) for name, parents in graph.items()}
