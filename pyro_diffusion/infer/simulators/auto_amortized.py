"""An AutoGuide that answers for any data: a conditional diffusion, trained on a program's own simulations."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_diffusion.distributions.callers import callers
from pyro_diffusion.distributions.objectives import Objective
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.dynamics.ode_solver import check_ode_solver
from pyro_diffusion.infer.simulators.conditional_posterior import FlowPosterior, MakeDenoiser
from pyro_diffusion.infer.simulators.hierarchical_flow import HierarchicalFlow
from pyro_diffusion.infer.simulators.hierarchical_posterior import observe_levels
from pyro_diffusion.infer.simulators.packed import packed_log_prob, packed_quantiles, unpack
from pyro_diffusion.infer.simulators.simulated_latents import Values
from pyro_diffusion.infer.simulators.simulated_levels import SimulatedLevels
from pyro_diffusion.infer.simulators.standardized import Familiar
from pyro_diffusion.unreliable import warn_unreliable
from pyro_diffusion.validation import check_positive_int

__all__ = ["AutoAmortized"]


class AutoAmortized(SimulatedLevels):
    r"""Posterior of a program's latents given any data, learned from the program's own simulations.

    The guide is :math:`q(\theta | x)`, a conditional diffusion over the program's continuous latents, each
    through ``biject_to`` its support (an interval by normal quantiles, so that a uniform prior is standard
    normal), together in one vector and standardized, given a summary of the observed sites. Training
    maximizes a lower bound of :math:`E_{p(\theta, x)} \log q(\theta | x)`, whose maximum is the posterior:
    simulated latents are *observed*, distributed as the guide has it (:meth:`training_model`; Pyro's ``CSIS``
    has the same objective). No likelihood is evaluated, so the program may be any simulator::

        guide = AutoAmortized(model, observed=["x"])
        svi = SVI(guide.training_model, lambda **simulations: None, Adam({"lr": 1e-3}), Trace_ELBO())
        for _ in range(2000):
            svi.step(**guide.simulate(256))
        draws = Predictive(model, guide=guide, num_samples=1000, parallel=True)(x_o)

    :func:`~pyro_diffusion.train.fit_amortized` trains on a fixed number of simulations, with validation.

    Draws are those of the probability flow (constants for autograd); their density, for ``Importance`` and
    ELBOs under ``torch.no_grad()``, is exact for the flow up to the solver's tolerance, so that importance
    weights are proper where the program has a likelihood. No draw is outside the support. What the draws are
    worth is decided by simulations and training: they are *approximate*, and
    :func:`~pyro_diffusion.evaluate.sbc` checks them.

    **Data.** The guide takes the arguments of the model and finds the data by running it. Observations of
    further batch dimensions on the left, ``(100,) + shape``, have their posteriors in one call: every latent
    gets the same, left of the dimensions of the model's plates. Inside Pyro's inference, put model and guide
    in a ``pyro.plate`` for them. ``Predictive(guide)`` solves once for each draw without ``parallel=True``;
    :meth:`draw` solves once for all. Arguments other than data are those of the first simulations: an
    ``UnreliableWarning`` tells others, under which the program simulates something else, and data unlike all
    that was simulated (see ``simulate``).

    **Plates of rows.** Where rows of a plate are alike and know of each other only by what is outside, as a
    trial finds, they are a set: its summary is the same in any order, and the number of rows is free. Latents
    in such a plate have a posterior for every row, given the latents and the data :math:`x_0` outside and its
    own data,

    .. math::

        q(\theta, \theta_{1 \dots R} | x) =
            q(\theta | x_0, x_{1 \dots R}) \prod_r q(\theta_r | \theta, x_0, x_r),

    by one network for all rows; plates may be nested. What sets say by linear regressions and analysis of
    variance is computed, not learned, for rows of up to 8 numbers. Simulations have as many rows as the
    program's arguments say; in training, some of them are seen, their number drawn evenly in its logarithm.
    Then the guide is asked with as many rows as the model's plates have, up to those of the simulations; more
    raise an ``UnreliableWarning``. Rows that ``poutine.mask`` leaves out have no data, and may hold anything.

    **Nuisance latents** need no posterior: name the ``latents`` of interest, and the others are integrated
    out.

    Args:
        model: a Pyro program: latents, and observed sites that are sampled where they are not given.
        summary: a module called with the standardized values of every observed site, each (N,) + its shape,
            that returns (N, features); None for the values themselves in one vector. Values of a positive
            support are taken by their logarithms, counts outside of sets by those of the counts plus one.
        observed: names of the observed sites; those that are observed when the model is run with the
            arguments of the first call, if None.
        latents: names of the latents of interest; all that are not observed, if None.
        denoiser: a function of the sizes of latents and summary that returns a denoiser whose network takes
            the summary as context ``y``; by default a
            :class:`~pyro_diffusion.nn.ConditionalMLP` of three blocks of 128, of two of 64 for latents of
            rows, whose context is the latents outside and the row's data. Without a ``summary``, and up to
            64 latents and data, the default one adds to the linear regression of latents on data and, where
            latents lie in an interval and are 64 with the data at most, on what a regression of their places
            in it predicts; with plates
            of rows, on the latents outside and statistics of the sets, by coefficients and variances that
            depend on their sizes.
        objective: of training; the evidence lower bound by default.
        solver: of the probability flow; dopri5 with tolerances of 1e-4 by default, which leave some .005 nats
            in log-densities and evidences (of ten latents). That of
            :func:`~pyro_diffusion.evaluate.importance_posterior` has them in its error; 1e-5, at twice the
            cost, is for evidences that draws know better, and for Pyro's own ``Importance``.
        vectorized: whether simulations may be one run of the program inside one more plate; found out by a
            trial if None, and else they are run one by one.
        plates: names of the plates whose rows are a set, found by a trial if None; none if there is a
            ``summary``, which is of whole data.
        encoders: modules by the name of the observed site that each encodes, such as
            ``{"curve": SeriesEncoder(2)}``, trained along: of one row's standardized values where the site is
            in a plate of rows, (N,) + the shape of a row -> (N, features). The other sites' numbers are taken
            as they are.

    Attributes:
        dropped: simulations that were not finite, of all so far.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x=None):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("data", 5):
        ...         pyro.sample("x", dist.Normal(0.0, scale), obs=x)
        >>> guide = AutoAmortized(model, observed=["x"])
        >>> simulations = guide.simulate(500)
        >>> simulations["scale"].shape, simulations["x"].shape
        (torch.Size([500]), torch.Size([500, 5]))
        >>> bool((guide(torch.randn(5))["scale"] > 0).all())
        True

    References:
        Le, Baydin & Wood, arXiv 1610.09900 (the objective, and programs as simulators); Geffner, Papamakarios
        & Mnih, arXiv 2209.14249, and Sharrock et al., arXiv 2210.04872 (conditional diffusions).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        summary: nn.Module | None = None,
        *,
        observed: Collection[str] | None = None,
        latents: Collection[str] | None = None,
        denoiser: MakeDenoiser | None = None,
        objective: Objective | None = None,
        solver: ODESolver | None = None,
        vectorized: bool | None = None,
        plates: Collection[str] | None = None,
        encoders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        if objective is not None and not isinstance(objective, Objective):
            raise ValueError(f"objective: got {type(objective).__name__}, expected an Objective")
        super().__init__(model, summary, denoiser, observed, latents, vectorized, plates, encoders)
        self._objective = objective
        tolerant = ODESolver("dopri5", rtol=1e-4, atol=1e-4)
        self._solver = tolerant if solver is None else check_ode_solver(solver)

    def training_model(self, **simulations: Tensor) -> None:
        """A program that observes simulated latents as the guide distributes them, given simulated data.

        For ``SVI`` and :class:`~pyro_diffusion.train.Trainer` with an empty guide and any ELBO that takes an
        estimated density (``Trace_ELBO()``). Its loss is that of the standardized, unconstrained latents. In
        a loop of your own over ``Trace_ELBO()(guide.training_model, empty_guide)``, give the optimizer
        ``guide.parameters()``: that module, made of a method, does not list them.

        Args:
            simulations: (N,) + shape of each latent and each observed site, of ``simulate``.

        Raises:
            ValueError: before the first simulations, and for other sites or shapes.
        """
        posterior = self._ready("training_model")
        simulator, values = self._to_train_on(simulations)
        batch = next(iter(values.values())).shape[:1]
        pyro.module(f"{self._pyro_name}.posterior", posterior)
        if self.in_levels:
            latent_rows, rows = self._latent_rows(values, batch), self._rows(values, batch, {})
            observe_levels(posterior, latent_rows, rows, self._objective)
            return
        latents = posterior.latents(self._pack(values, batch))
        context = posterior.context([values[name] for name in simulator.observed], batch)
        with pyro.plate("simulations", *batch):
            pyro.sample("latents", posterior.diffusion(context, self._objective), obs=latents)

    # The guide.

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowPosterior | HierarchicalFlow:
        """The posterior of the packed, unconstrained latents given the data in the model's arguments.

        Raises:
            ValueError: before the first simulations; for data that are missing, NaN or of another shape; and
                inside an ELBO that takes gradients, which would not be those of the posterior.
        """
        self._ready("guide")
        if (
            torch.is_grad_enabled()
            and _in_elbo()
            and any(p.requires_grad for p in self.parameters())
        ):
            raise ValueError(
                "guide: got an AutoAmortized to train as the guide of its simulator by an ELBO, which would "
                "fit one data set and not the posterior given any; expected its own training model, "
                "Trace_ELBO()(guide.training_model, empty_guide)(**guide.simulate(n)) or "
                "SVI(guide.training_model, ...), and torch.no_grad() to evaluate an ELBO"
            )
        data, batch = self._data(args, kwargs)
        assert self._simulator is not None
        nesting = (1,) * self._simulator.nesting if batch else ()
        return self._posterior(data, batch, batch + nesting)

    @torch.no_grad()
    def draw(self, num_samples: int, observations: Mapping[str, Tensor]) -> Values:
        """Draws given the values of observed sites, whatever arguments the model takes them by.

        Many observations are one call; diagnostics ask the guide this way.

        Args:
            num_samples: draws for each observation.
            observations: batch + shape of every observed site, by name.

        Returns:
            (num_samples,) + batch of the observations + the shape of each latent, by name.

        Raises:
            ValueError: before the first simulations, and for data that are missing, NaN or of another shape.
        """
        check_positive_int("num_samples", num_samples)
        self._ready("draw")
        data, batch = self._data_of(observations)
        return unpack(self, self._posterior(data, batch, batch).sample((num_samples,)))

    def _posterior(
        self, data: Any, batch: torch.Size, shape: torch.Size
    ) -> FlowPosterior | HierarchicalFlow:
        """The posterior given data, of a batch shape; warns of data unlike those simulated."""
        posterior: Any = self._ready("guide")
        if not self.in_levels:
            rows = posterior.rows(data, batch)
            _warn_unlike(posterior.familiar, rows)
            _warn_other(posterior.is_other(rows))
            context = posterior.context(data, batch).reshape(*shape, -1)
            flow: FlowPosterior = posterior.flow(context, self._solver)
            return flow
        _warn_unlike(posterior.familiar, posterior.moments(data))
        contexts = [c.reshape(*shape, *c.shape[len(batch) :]) for c in posterior.contexts(data)]
        levels: HierarchicalFlow = posterior.flow(contexts, self._places, self._solver)
        return levels

    def log_prob(self, latents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Log-density of the posterior at values of all latents, in their own space (nats).

        Exact for the flow up to the solver's tolerance; differentiable in the values.

        Args:
            latents: sample + batch of the observations + shape of each latent.
            args: the model's, with data.
            kwargs: likewise.

        Returns:
            sample + batch of the observations.

        Raises:
            ValueError: for missing latents, values outside the support, and as :meth:`get_posterior`.
        """
        posterior = self.get_posterior(*args, **kwargs)
        assert self._simulator is not None
        sites, nesting = self._latent_sites(), self._simulator.nesting
        return packed_log_prob(self, posterior, latents, sites, nesting)

    def median(self, *args: Any, num_samples: int = 1000, **kwargs: Any) -> Values:
        """Median of every coordinate over ``num_samples`` draws; see :meth:`quantiles`."""
        found = self.quantiles([0.5], *args, num_samples=num_samples, **kwargs)
        return {name: value.squeeze(0) for name, value in found.items()}

    def quantiles(
        self, quantiles: list[float], *args: Any, num_samples: int = 1000, **kwargs: Any
    ) -> Values:
        """Quantiles of every coordinate over draws, each (quantiles,) + batch + the site's shape."""
        check_positive_int("num_samples", num_samples)
        posterior = self.get_posterior(*args, **kwargs)
        assert self._simulator is not None
        nesting = self._simulator.nesting
        return packed_quantiles(self, posterior, quantiles, num_samples, nesting)


def _in_elbo() -> bool:
    return any(name.startswith("pyro.infer") and "elbo" in name for name, _ in callers())


def _warn_other(other: Tensor) -> None:
    """Warn of data other than those that truncated rounds were for."""
    if bool(other.any()):
        which = f"{int(other.sum())} of {other.numel()} observations" if other.dim() else "data"
        warn_unreliable(
            f"data: got {which} other than those that the guide's truncated rounds were for, expected these: "
            "it was trained on latents near their posterior, and knows no others"
        )


def _warn_unlike(familiar: Familiar, rows: Tensor) -> None:
    """Warn of data beyond the limit of the simulations', batch + (size,)."""
    distances = familiar.distance(rows)
    beyond = distances > familiar.limit
    if bool(beyond.any()):
        many = beyond.dim() > 0
        which = f"{int(beyond.sum())} of {beyond.numel()} observations" if many else "data"
        chance = f" ({familiar.expected(beyond.numel()):.1g} of them by chance)" if many else ""
        warn_unreliable(
            f"data: got {which} at a Mahalanobis distance of {float(distances.max()):.3g} from the "
            f"mean of the simulations, beyond {float(familiar.limit):.3g}, which a simulation "
            f"exceeds with a probability of {float(familiar.rate):.1g} at most{chance}: the "
            "posterior is extrapolated there"
        )
