"""The likelihood of a diffusion site, extracted from the Pyro program that it stands in."""

import copy
import functools
from collections.abc import Callable
from typing import Any, Self

import torch
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor

from pyro_diffusion.likelihoods.analysis import Analysis, analyse
from pyro_diffusion.likelihoods.base import Likelihood
from pyro_diffusion.likelihoods.batches import BatchedProgram, Extract
from pyro_diffusion.likelihoods.first_run import first_run
from pyro_diffusion.likelihoods.readings import check_complete, downstream, values
from pyro_diffusion.likelihoods.run import Message, handlers, log_density
from pyro_diffusion.likelihoods.signature import structure
from pyro_diffusion.likelihoods.trials import trials
from pyro_diffusion.likelihoods.whitening import RESIDUALS, Whitened, whitened
from pyro_diffusion.processes import Ability

__all__ = ["ProgramLikelihood", "check_model"]


class ProgramLikelihood(Likelihood):
    r"""log p(observations | x_0), by running a Pyro program with its diffusion site's value given.

    The program is the forward operator: any number of observed sites and factors, any Pyro likelihood,
    plates, masks, scales, and transforms of the site. The site's own density, and that of other latents, is
    not part of it; nor are a mask or a scale on the site itself.

    .. math:: \log p(y | x_0) = \sum_{\text{observed sites } i} \log p(y_i | x_0) .

    If each observed site lies inside all plates of the diffusion site, the likelihood *factorizes*: each
    datum has its own number. Otherwise all data of the plates are one joint datum, and the batch shape of
    what is returned is all ones.

    Missing observations may be NaN: where a mask hides them (``.mask``, ``poutine.mask``, ``obs_mask``), and
    in a ``NanMaskedNormal`` or ``NanMaskedMultivariateNormal``. They add nothing to the log-density, and
    gradients are finite.

    The program is run once per call. A batch of x_0 is put left of all its plates (as
    ``Predictive(parallel=True)`` does); for a program that is not written for this, single runs are
    vectorized by ``torch.func.vmap``. Three random x_0, run singly and in both ways, decide which at
    construction. Handlers and plates around a call are not seen by the program.

    Args:
        model: a Pyro program with one diffusion site (any view of a denoiser, perhaps transformed).
        args: its arguments.
        kwargs: its keyword arguments.
        site: name of the diffusion site; may be left out if there is one.
        latents: values of all other latent sites, but for those that no observation depends on (predictions,
            and what ``obs_mask`` leaves out), which are held at some value. Dimensions beyond the site's own,
            on the left, broadcast against the sample dimensions of x_0: each particle may have its own noise
            scale.
        residuals: ``"normal"`` for those of Normal sites only; ``"deviance"`` for signed deviance residuals
            of other sites (Poisson, Bernoulli, StudentT, ...), which are no linear function of x_0 but make
            the same sum of squares; formulas by family in
            ``pyro_diffusion.likelihoods.deviance.deviance_residual``.
            ``log_prob`` is the same for both.
        subsamples: indices of plates that the model subsamples, by name; those that it draws by itself must
            be given. Each datum of the site must have its own observations there, and the plates' factor
            N / B is left out.
        precedent: ``analysis`` of another likelihood. If sites, shapes and other arguments are the same, and
            a batch of trial draws has the numbers it should, most trial runs are saved.

    Attributes:
        site: name of the diffusion site.
        prior: its diffusion, unwrapped, at its full batch shape.
        site_distribution: the site's own distribution, with all that stands around the diffusion.
        transforms: from x_0 to the site's value, first to last.
        batch_shape: of x_0, plates included.
        event_shape: of one x_0.
        factorized: whether each datum has its own observations.
        differentiable: whether there is a gradient in x_0.
        latents: the other latents' values.
        subsamples: the indices that subsampled plates were given.
        analysis: what trial runs found: a ``precedent`` for the same program at other values.

    Raises:
        ValueError: for no diffusion site, several and none named, a named site that is no diffusion or is
            observed; a latent without a value; a subsampled plate; nothing observed, or values that are not
            finite; a program that cannot be run on a batch in either way; unknown ``residuals``.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_diffusion.denoisers import MixtureDenoiser
        >>> from pyro_diffusion.distributions import Diffusion
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> denoiser = MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(1), torch.zeros(1, 2), 1.0)
        >>> def model(y):
        ...     x = pyro.sample("x", Diffusion(denoiser, event_shape=(2,)))
        ...     pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
        >>> likelihood = ProgramLikelihood(model, (torch.ones(2),))
        >>> likelihood.log_prob(torch.zeros(7, 2)).shape
        torch.Size([7])
        >>> likelihood.residual(torch.zeros(2))
        tensor([2., 2.])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        site: str | None = None,
        latents: dict[str, Tensor] | None = None,
        residuals: str = "normal",
        subsamples: dict[str, Tensor] | None = None,
        precedent: Analysis | None = None,
    ) -> None:
        self._residuals = _check_residuals(residuals)
        check_model(model)
        if not isinstance(args, tuple | list):
            raise ValueError(
                f"args: got {type(args).__name__}, expected a tuple of the model's arguments"
            )
        self.model, self.args, self.kwargs = model, tuple(args), dict(kwargs or {})
        self.latents = {k: torch.as_tensor(v) for k, v in (latents or {}).items()}
        arguments = structure((self.args, self.kwargs, self.latents, site))
        known = precedent.signature if precedent else (None, None)
        program = functools.partial(_call, model, self.args, self.kwargs)
        first = first_run(
            program,
            site,
            self.latents,
            _trial,
            dict(subsamples or {}),
            known[1] if known[0] == arguments else None,
        )
        found = self._site = first.site
        self.site, self.prior, self.transforms = found.name, found.diffusion, found.transforms
        self.site_distribution = found.distribution
        self.subsamples = first.subsamples
        self.batch_shape, self.event_shape = self.prior.batch_shape, self.prior.event_shape
        self.factorized = first.factorized
        self._program = BatchedProgram(program, first)
        self.analysis = analyse(
            self._program, first, (arguments, first.signature), self.latents, precedent
        )
        self.differentiable = self._no_gradient() is None

    def log_prob(self, x0: Tensor) -> Tensor:
        """log p(all observations | x_0) in nats (exact), differentiable.

        Args:
            x0: the diffusion's own data (before transforms), sample + batch + event.

        Returns:
            sample + batch if the likelihood factorizes, otherwise sample and ones. Latents with sample
            dimensions of their own broadcast into sample.

        Raises:
            ValueError: for an x_0 of another shape.
        """
        (total,) = self._extract(x0, self._program.log_prob)
        return total if self.analysis.dependence.dependent else total + _nothing(x0)

    def whitened(self, x0: Tensor) -> Whitened:
        r"""Residual :math:`L^{-1}(y - E[y | x_0])` of all Normal sites and log-normalizer, from one run.

        Flattened and concatenated over sites, in the dtype of x_0, differentiable; masked entries are 0, a
        scale multiplies by its root. Other sites have their signed deviance residuals if they were asked for.
        Sites that do not depend on x_0 are left out of the residual, whatever their distribution; if none
        does, it is one 0.

        Args:
            x0: sample + batch + event.

        Raises:
            ValueError: if an observed site that depends on x_0 is not Normal; with
                ``residuals="deviance"``, if it is no location family and not discrete.
        """
        if self._residuals in self.analysis.dependence.without_residual:
            raise ValueError(self._refusal())
        # Observations may be finer than the prior: backward passes are in the prior's dtype.
        residual, rest = (v.to(x0.dtype) for v in self._extract(x0, self._whitened))
        if residual.shape[-1] == 0:
            # Nothing is said of x_0.
            residual = _nothing(x0).expand(*rest.shape, 1)
        return Whitened(residual, rest)

    def with_residuals(self, residuals: str) -> Self:
        r"""The same likelihood with residuals of another kind, unchecked and cheap.

        Linearizing deviance residuals makes Gaussian guidance (MMPS, PiGDM, TMPD, DiffPIR) a generalized
        Gauss-Newton approximation for likelihoods that are not Normal. Twisted SMC corrects it. Of a Poisson
        site with rate :math:`\mu(x_0)` the residual is

        .. math:: r = \text{sign}(y - \mu) \sqrt{2\,(y \log(y / \mu) - y + \mu)} ;

        other families: ``pyro_diffusion.likelihoods.deviance.deviance_residual``.

        Args:
            residuals: ``"normal"`` or ``"deviance"``.

        Raises:
            ValueError: for another kind.
        """
        new = copy.copy(self)
        new._residuals = _check_residuals(residuals)
        return new

    def site_value(self, x0: Tensor) -> Tensor:
        """x_0 as the value of the site: through its transforms.

        Integers of a quantized diffusion are extended to the real line, so that they have a gradient.
        """
        return self._site.value(x0)

    def with_latents(self, latents: dict[str, Tensor]) -> Self:
        """The same likelihood with some other latent values, unchecked and cheap."""
        new = copy.copy(self)
        new.latents = {**self.latents, **latents}
        return new

    def observations(self) -> Tensor:
        """The observed values y that depend on x_0, those of a datum in one vector, batch + (m,).

        One that depends on x_0 only by the values of other observed sites is among them. Values of all such
        sites are flattened and concatenated in the order of the program, as real numbers.
        If the likelihood does not factorize, all data are one datum, and the batch shape is all ones.

        Raises:
            ValueError: for sites with missing values, a mask or a scale, and for factors.
        """
        x0 = trials(self.prior)[0]
        latents = self._program.single(self.latents)
        names, _ = self._readings()
        sites = [s for s in self._program.untouched(x0, latents) if s["name"] in names]
        check_complete(sites)
        return values(sites, 0, self._program.collapse)

    def simulate(self, x0: Tensor) -> Tensor:
        """Draws of what :meth:`observations` returns, given x_0: sample + batch + (m,).

        Sites are drawn inside of the program, so that one may depend on what ``pyro.sample`` returned of
        another: such programs are run singly. Sites that do not depend on x_0, nor on others that do, keep
        their data.

        Args:
            x0: the diffusion's own data (before transforms), sample + batch + event.

        Raises:
            ValueError: for an x_0 of another shape.
        """
        names, chained = self._readings()

        def drawn(sites: list[Message], lead: int) -> tuple[Tensor]:
            sites = [site for site in sites if site["name"] in names]
            return (values(sites, lead, self._program.collapse),)

        ways = dict.fromkeys((False, True), False) if chained else self.analysis.vectorized
        with torch.no_grad():
            (found,) = self._program.drawing(names).run_batch(x0, self.latents, drawn, ways)
        return found

    def _readings(self) -> tuple[frozenset[str], bool]:
        """Sites that depend on x_0, also by values of others, and whether any depends on others'."""
        x0, latents = trials(self.prior)[0], self._program.single(self.latents)
        with torch.no_grad():
            return downstream(
                lambda names: self._program.drawing(names).run(x0, latents),
                self.analysis.dependence.dependent,
            )

    def check_gradient(self) -> None:
        """Refuse a likelihood without a gradient in x_0.

        Raises:
            ValueError: if x_0 is discrete, or an observed site changes with x_0 but has no gradient.
        """
        if reason := self._no_gradient():
            raise ValueError(
                f"{reason}, expected a differentiable one (use twisted SMC with a proposal that asks for no "
                "gradient)"
            )

    def _no_gradient(self) -> str | None:
        """Why there is no gradient in x_0, or None if there is one."""
        process = self.prior.denoiser.process
        if Ability.NUMBERS not in process.abilities:
            name = type(process).__name__
            return f"site {self.site!r}: got data of {name}, which lacks {Ability.NUMBERS.value}"
        if names := self.analysis.dependence.without_gradient:
            return f"likelihood: got no gradient in x_0 at site {', '.join(map(repr, names))}"
        return None

    def _refusal(self) -> str:
        """Why there is no residual, and what does without."""
        without_residual = self.analysis.dependence.without_residual
        name, found = without_residual[self._residuals]
        expected = "a Normal or MultivariateNormal"
        if self._residuals == "deviance":
            expected += (
                ", a location family (StudentT, Laplace, Logistic, ...) or a discrete distribution"
            )
        deviance, instead = "", ""
        if "deviance" not in without_residual:
            deviance = 'residuals="deviance" for a Gauss-Newton approximation, or '
            instead = (
                '; as an argument, guidance=lambda d, l: MMPS(d, l.with_residuals("deviance"))'
            )
        return (
            f"likelihood: got site {name!r} with a {found}, expected {expected} (use {deviance}PlugIn "
            f"guidance or TwistedSMC, which take any likelihood{instead})"
        )

    def _extract(self, x0: Tensor, extract: Extract) -> tuple[Tensor, ...]:
        try:
            return self._program.run_batch(x0, self.latents, extract, self.analysis.vectorized)
        except ValueError as error:
            plain = x0.layout == torch.strided and not x0.is_meta  # others are refused for that
            if plain and not bool(x0.isfinite().all()):
                error.add_note(
                    f"x_0: got NaN or infinite values at site {self.site!r}: guidance has met a derivative "
                    "of the program that is not finite, such as that of a root or a norm at 0"
                )
            raise

    def _whitened(self, sites: list[Message], lead: int) -> tuple[Tensor, ...]:
        residuals, parts, collapse = [], [], self._program.collapse
        for site in sites:
            dependent = site["name"] in self.analysis.dependence.dependent
            found = whitened(site, self._residuals) if dependent else None
            if found is None:
                parts.append(collapse(log_density(site), lead).sum(-1))
                continue
            residual, log_normalizer, event = found
            residuals.append(collapse(residual, lead, event))
            parts.append(collapse(log_normalizer, lead, event).sum(-1))
        total = sum(parts[1:], parts[0])
        if not residuals:
            return total.new_zeros(*total.shape, 0), total
        shape = torch.broadcast_shapes(*(r.shape[:-1] for r in residuals))
        return torch.cat([r.expand(*shape, r.shape[-1]) for r in residuals], -1), total


def _nothing(x0: Tensor) -> Tensor:
    """0, with a derivative of 0 in x_0."""
    return x0.flatten()[:0].sum()


def check_model(model: Any) -> None:
    """Refuse what is no program, and one that hides some of its sites.

    Raises:
        ValueError: naming what was found.
    """
    if not callable(model):
        raise ValueError(f"model: got {type(model).__name__}, expected a Pyro program")
    if any(isinstance(handler, BlockMessenger) for handler in handlers(model)):
        raise ValueError(
            "model: got one inside poutine.block, whose other sites cannot be seen, expected the whole model "
            "(the likelihood is extracted from its observed sites; other latents are left to other guides)"
        )


def _call(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return model(*args, **kwargs)
    except Exception as error:
        # The program is the user's, so is its error; this adds how it was run.
        kinds = ", ".join(type(value).__name__ for value in args)
        error.add_note(
            f"model, args: got arguments ({kinds}) and {sorted(kwargs)}, expected those of the program"
        )
        raise


def _trial(prior: Any) -> Tensor:
    """A value to run a program on, with a gradient if it is real."""
    draw = trials(prior)[0].clone()
    return draw.requires_grad_(draw.is_floating_point())


def _check_residuals(residuals: str) -> str:
    if residuals not in RESIDUALS:
        raise ValueError(f"residuals: got {residuals!r}, expected 'normal' or 'deviance'")
    return residuals
