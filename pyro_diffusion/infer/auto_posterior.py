"""What the AutoGuides of a diffusion site share: likelihood, other guides' draws, density."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.reparam_messenger import ReparamHandler
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.distributions.base import DenoisedDistribution
from pyro_diffusion.distributions.callers import called_from
from pyro_diffusion.distributions.shape_runs import shapes_only
from pyro_diffusion.guidance.base import Guidance, check_guidance
from pyro_diffusion.infer.earlier_draws import EarlierDraws, outer_nesting
from pyro_diffusion.infer.filtering.simulated_posterior import Drawn, SimulatedPosterior
from pyro_diffusion.infer.filtering.twisted_smc import default_guidance
from pyro_diffusion.infer.reparam import ChainReparam
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.likelihoods.analysis import Analysis
from pyro_diffusion.likelihoods.program import check_model
from pyro_diffusion.likelihoods.run import isolated
from pyro_diffusion.likelihoods.signature import structure
from pyro_diffusion.likelihoods.sites import MissingLatents
from pyro_diffusion.samplers import Sampler
from pyro_diffusion.unwrapping import unwrap_to
from pyro_diffusion.validation import check_positive_int

__all__ = ["AutoPosterior", "as_chain"]


class AutoPosterior(EarlierDraws):
    r"""Base of the guides of one diffusion site; they need no training and have no parameters.

    A guide extracts the likelihood from its model at every call, so arguments, data and other latents may
    change from call to call. Its draws are constants for autograd.

    In an ``AutoGuideList`` the other latents are drawn by guides appended *before* this one, and the
    likelihood is extracted given their current draws. Give this guide the whole model, not a blocked one.
    Latents that no observation depends on (predictions, and what ``obs_mask`` leaves out) need no guide: as
    in Pyro, ``Predictive`` draws them from the model.

    In a subsampled plate each datum of the site must have its own observations. It is drawn for the data that
    the guide's plate has chosen, given these alone; the plate's factor N / B scales log-densities of model
    and guide, not the posterior.

    **Density.** ELBOs and importance weights ask for log q(x) of the draw, which is
    :math:`\log \hat p(x) + \log p(y|x) - \log \hat Z`, with :math:`\hat Z` the unbiased estimate of p(y) that
    the draw came with. So :math:`\log \hat p(x) + \log p(y|x) - \log q(x) = \log \hat Z`: importance weights
    are properly weighted, and the ELBO is a true bound :math:`E \log \hat Z \le \log p(y)` of the chain's
    evidence. The noise of :math:`\log \hat p(x)`, the model's own estimate, cancels if model and guide
    evaluate one ``Diffusion`` *instance*: build it once, outside the model.

    The ELBO's gradient for the parameters of other guides is that of log p(y|x) at the drawn x: exact
    (Fisher's identity) if x is an exact posterior draw, and consistent in the number of particles.

    Args:
        model: a Pyro program with one diffusion site (or ``site``) and observed sites.
        guidance: ``guidance(denoiser, likelihood)``, a class of guided denoisers or a partial of one; what
            suits the likelihood by default, as in :class:`~pyro_diffusion.infer.TwistedSMC`.
        site: name of the diffusion site; may be left out if there is one.
        times: the grid; that of the model's ``Diffusion`` by default.
        create_plates: as in Pyro.

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guidance: Guidance | None = None,
        *,
        site: str | None = None,
        times: Tensor | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        if guidance is not None:
            check_guidance(guidance)
        check_model(model)
        program, self._chained = _folded(model)
        # In tuples, so that neither becomes a submodule.
        self._program, self._guidance = (program,), (guidance or default_guidance,)
        self._site, self._times = site, times
        self._hook_earlier()
        self._analysis: Analysis | None = None
        self._prototype_structure: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the site given the model's arguments.

        Returns:
            Values by site name, and the chain's states if ``ChainReparam`` unfolds them in the model.

        Raises:
            ValueError: if a latent was drawn by no earlier guide; and as ``ProgramLikelihood`` does.
        """
        # Other shapes make other plates; those of a list are the list's.
        same = self._prototype_structure == structure((args, kwargs))
        if self.prototype_trace is None or not (same or self.master):
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        if shapes_only():
            return self._emit_examples(plates)
        # The plates around the guide hold samples, those of the model lie to their right.
        nesting = outer_nesting()
        likelihood = self._likelihood(args, kwargs, nesting, _subsamples(plates))
        if likelihood.subsamples and called_from("pyro.infer.predictive"):
            name = next(iter(likelihood.subsamples))
            raise ValueError(
                f"plate {name!r}: got a subsample that is drawn anew at each run, and Predictive does not "
                "say which data, expected the whole plate, or indices of your own in the model and in "
                "create_plates"
            )
        site = self.prototype_trace.nodes[likelihood.site]
        with ExitStack() as stack:
            for frame in site["cond_indep_stack"]:
                stack.enter_context(plates[frame.name])
            return self._emit(likelihood, likelihood.site_distribution, nesting)

    def median(self, *args: Any, num_samples: int = 100, **kwargs: Any) -> dict[str, Tensor]:
        """Median of every coordinate over ``num_samples`` draws; see :meth:`quantiles`."""
        found = self.quantiles([0.5], *args, num_samples=num_samples, **kwargs)
        return {name: value.squeeze(0) for name, value in found.items()}

    def quantiles(
        self, quantiles: list[float], *args: Any, num_samples: int = 100, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of every coordinate over ``num_samples`` draws, each (quantiles,) + the site's shape.

        They are those of the marginal: in a list, each draw is given a fresh draw of the guides before this
        one, and not their medians. Particles then take a run for each draw.
        """
        check_positive_int("num_samples", num_samples)
        if not all(0 <= q <= 1 for q in quantiles):
            raise ValueError(f"quantiles: got {quantiles}, expected numbers in [0, 1]")
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        with torch.no_grad(), isolated():
            others = self._draws_of_others(num_samples, self._others, args, kwargs)
            self._other_draws = others
            likelihood = self._likelihood(args, kwargs, 0, {})
            value = self._draw(likelihood, torch.Size([num_samples])).value
        real = value if value.is_floating_point() else value.double()
        at = torch.tensor(quantiles, dtype=real.dtype, device=value.device)
        rule = "linear" if value is real else "nearest"
        return {likelihood.site: real.quantile(at, dim=0, interpolation=rule).to(value.dtype)}

    def _emit_examples(self, plates: dict[str, Any]) -> dict[str, Tensor]:
        """Issue the sample statements where only their shapes matter."""
        nodes, out = self.prototype_trace.nodes, {}
        for name in self._own:
            fn = nodes[name]["fn"]
            example = functools.partial(_example, nodes[name]["value"])
            posterior = SimulatedPosterior(example, fn.batch_shape, fn.event_shape, fn.support)
            with ExitStack() as stack:
                for frame in nodes[name]["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                out[name] = pyro.sample(name, posterior)
        return out

    def _emit(
        self, likelihood: ProgramLikelihood, fn: TorchDistribution, nesting: int
    ) -> dict[str, Tensor]:
        """Issue the sample statements, inside the site's plates."""
        draw = functools.partial(self._scored_draw, likelihood)
        posterior = SimulatedPosterior(draw, fn.batch_shape, fn.event_shape, fn.support, nesting)  # type: ignore[arg-type]
        return {likelihood.site: pyro.sample(likelihood.site, posterior)}

    def _draw(self, likelihood: ProgramLikelihood, sample: torch.Size) -> Drawn:
        """Values of the site, with log q(x) - log p(x) as their log-density."""
        raise NotImplementedError

    def _scored_draw(self, likelihood: ProgramLikelihood, sample: torch.Size) -> Drawn:
        with isolated():
            drawn = self._draw(likelihood, sample)

        def density() -> Tensor:
            with isolated():
                gap = drawn.log_density()
                fn = self._model_distribution(likelihood, drawn.value)
            return fn.log_prob(drawn.value) + _over_batch(gap, len(sample), fn.batch_shape)

        return drawn._replace(log_density=density)

    def _model_distribution(self, likelihood: ProgramLikelihood, value: Tensor) -> Any:
        """The site's distribution as the model will score it.

        Raises:
            ValueError: if the model builds a new instance at every run.
        """
        name = likelihood.site
        given = {name: value, **likelihood.latents}
        data = {k: v[(0,) * (v.dim() - self._dims(k)[1])] for k, v in given.items()}
        data = {**likelihood.subsamples, **data}
        with poutine.trace() as tracer, poutine.condition(data=data):
            self._program[0](*likelihood.args, **likelihood.kwargs)
        fn: Any = tracer.trace.nodes[name]["fn"]
        found = unwrap_to(fn, DenoisedDistribution)
        base = found.base if found else fn
        if not isinstance(base, Diffusion) or base._seed != likelihood.prior._seed:
            raise ValueError(
                f"site {name!r}: got a {type(base).__name__} built anew at each run of the model, and no "
                "guide can match its noisy log_prob; expected one Diffusion built outside the model, or "
                f"AutoGuidance of poutine.reparam(model, config={{{name!r}: ChainReparam()}})"
            )
        return fn

    # The other latents.

    def _likelihood(
        self, args: Any, kwargs: Any, nesting: int, subsamples: dict[str, Tensor]
    ) -> ProgramLikelihood:
        """The likelihood given the other guides' current draws."""
        drawn, self._other_draws = self._other_draws, {}
        latents = {
            name: self._single(
                self.prototype_trace.nodes[name]["fn"], drawn[name].detach(), nesting
            )
            for name in self._others
            if name in drawn
        }
        try:
            likelihood = ProgramLikelihood(
                self._program[0],
                args,
                kwargs,
                site=self._name,
                latents=latents,
                subsamples=subsamples,
                precedent=self._analysis,
            )
        except MissingLatents as error:
            raise ValueError(
                f"latents: got no draws of {', '.join(error.names)}; expected guides of all other latents "
                "in one AutoGuideList, appended before this one (a custom guide must return a dict of its "
                "draws), or a model conditioned on them"
            ) from error
        self._analysis = likelihood.analysis
        return likelihood

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self.master is not None and self.master().prototype_trace is None:
            self.master()._setup_prototype(*args, **kwargs)
        super()._setup_prototype(*args, **kwargs)
        self._prototype_structure = structure((args, kwargs))
        nodes = self.prototype_trace.nodes
        latent = [
            n for n in self.prototype_trace.stochastic_nodes if not site_is_subsample(nodes[n])
        ]
        hidden = [n for n in latent if f"{n}_t0" in latent]
        if hidden and not self._chained:
            raise ValueError(
                f"model: got site {hidden[0]!r} unfolded by ChainReparam inside another handler, expected "
                "poutine.reparam(...) outermost"
            )
        named = [self._site] if self._site else self._chained
        found = named or [
            n for n in latent if unwrap_to(nodes[n]["fn"], DenoisedDistribution) is not None
        ]
        states = {f"{n}_t" for n in found} if self._chained else set()
        self._others = [
            n for n in latent if n not in found and n.rstrip("0123456789") not in states
        ]
        self._own = [n for n in latent if n not in self._others]
        # None if there is no site or several: ProgramLikelihood says so.
        self._name = found[0] if len(found) == 1 else None

    def _dims(self, name: str) -> tuple[int, int]:
        """Batch dimensions, and all dimensions, of a latent in a single run."""
        fn = self.prototype_trace.nodes[name]["fn"]
        return len(fn.batch_shape), len(fn.batch_shape) + len(fn.event_shape)


def _example(value: Tensor, sample: torch.Size) -> Drawn:
    return Drawn(value.expand(sample + value.shape), lambda: value.new_zeros(()))


def _subsamples(plates: dict[str, Any]) -> dict[str, Tensor]:
    """Indices of the plates that are subsampled."""
    return {
        name: plate.indices for name, plate in plates.items() if plate.subsample_size < plate.size
    }


def as_chain(
    view: DenoisedDistribution,
    denoiser: Denoiser | None = None,
    *,
    times: Tensor | None = None,
    sampler: Sampler | None = None,
) -> Diffusion:
    """The chain of a distribution of data, through another denoiser, on another grid, by another sampler."""
    times = getattr(view, "times", None) if times is None else times
    sampler = getattr(view, "sampler", None) if sampler is None else sampler
    chain = Diffusion(
        denoiser or view.denoiser,
        view.event_shape,
        times=times,
        sampler=sampler,
        decoder=getattr(view, "decoder", None),
        context=view.context,
    )
    return chain.expand(view.batch_shape)


def _folded(model: Any) -> tuple[Any, list[str]]:
    """A program without its outermost ChainReparam, and the sites that it unfolds."""
    config = model.msngr.config if isinstance(model, ReparamHandler) else None
    if not isinstance(config, dict):
        return model, []
    sites = [name for name, reparam in config.items() if isinstance(reparam, ChainReparam)]
    rest = {name: reparam for name, reparam in config.items() if name not in sites}
    return (poutine.reparam(model.fn, config=rest) if rest else model.fn), sites


def _over_batch(gap: Tensor, sample_dims: int, batch: torch.Size) -> Tensor:
    """Numbers of data as numbers of the site's batch; what is joint is spread evenly over it."""
    sample, rest = gap.shape[:sample_dims], gap.shape[sample_dims:]
    if rest[: len(batch)] == batch:
        return gap.reshape(*sample, *batch, -1).sum(-1)
    joint = gap.reshape(*sample, -1).sum(-1) / batch.numel()
    return joint.reshape(sample + (1,) * len(batch)).expand(sample + batch)
