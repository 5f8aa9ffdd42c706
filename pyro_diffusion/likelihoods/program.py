"""The likelihood of a diffusion site, read out of the Pyro program that it stands in."""

import copy
import functools
from collections.abc import Callable
from typing import Any, Self

import pyro
import torch
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor

from pyro_diffusion.likelihoods.missing import without_missing
from pyro_diffusion.likelihoods.run import (
    Message,
    collapse,
    handlers,
    log_density,
    observed,
    of_each_datum,
)
from pyro_diffusion.likelihoods.signature import structure
from pyro_diffusion.likelihoods.sites import First, first_run
from pyro_diffusion.likelihoods.trials import Analysis, agree, choose_way, look, trials
from pyro_diffusion.likelihoods.whitening import RESIDUALS, Whitened, whitened
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.validation import check_event_shape

__all__ = ["ProgramLikelihood"]


class ProgramLikelihood:
    r"""log p(observations | x_0), by running a Pyro program with its diffusion site's value given.

    The program is the forward operator: any number of observed sites and factors, any Pyro likelihood,
    plates, masks, scales, and transforms of the site. The site's own density, and that of other latents, is
    not part of it; nor are a mask or a scale on the site itself.

    .. math:: \log p(y | x_0) = \sum_{\text{observed sites } i} \log p(y_i | x_0) .

    If each observed site lies inside all plates of the diffusion site, the likelihood *factorizes*: each
    datum has its own number. Otherwise all data of the plates are one joint datum, and the batch shape of
    what is returned is all ones.

    Missing observations may be NaN: where a mask hides them (``.mask``, ``poutine.mask``, ``obs_mask``), and
    in a ``NanMaskedNormal`` or ``NanMaskedMultivariateNormal``. They say nothing, and gradients are finite.

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
            of other sites (:func:`~pyro_diffusion.likelihoods.deviance_residual`), which are no linear
            function of x_0 but make the same sum of squares. ``log_prob`` is the same for both.
        subsamples: indices of plates that the model subsamples, by name; those that it draws by itself must
            be told. Each datum of the site must have its own observations there, and the plates' factor N / B
            is left out.
        precedent: ``analysis`` of another likelihood. If sites, shapes and other arguments are the same, and
            a batch of trial draws has the numbers it should, most trial runs are saved.

    Attributes:
        site: name of the diffusion site.
        prior: its diffusion, unwrapped, at its full batch shape.
        site_law: the site's own distribution, with all that stands around the diffusion.
        transforms: from x_0 to the site's value, first to last.
        batch_shape: of x_0, plates included.
        event_shape: of one x_0.
        factorized: whether each datum has its own observations.
        latents: the other latents' values.
        subsamples: the indices that subsampled plates were told.
        analysis: what trial runs found: a ``precedent`` for the same program at other values.

    Raises:
        ValueError: for no diffusion site, several and none named, a named site that is no diffusion or is
            observed; a latent without a value; a subsampled plate; nothing observed, or values that are not
            finite; a program that cannot be run on a batch in either way; unknown ``residuals``.

    Example:
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
        self._told = dict(subsamples or {})
        arguments = structure((self.args, self.kwargs, self.latents, site))
        known = precedent.signature if precedent else (None, None)
        first = first_run(
            self._run,
            site,
            self.latents,
            _trial,
            self._told,
            known[1] if known[0] == arguments else None,
        )
        self._site, self._nesting, self._dims = first.site, first.nesting, first.dims
        self._idle = first.idle
        self.site, self.prior, self.transforms = self._site[:3]
        self.site_law, self.subsamples = self._site.whole, first.subsamples
        self.batch_shape, self.event_shape = self.prior.batch_shape, self.prior.event_shape
        self.factorized = first.factorized
        # Dimensions of a plate that stay, and the batch shape of what is returned.
        dims = range(-len(self.batch_shape), 0)
        self._kept = [d for d in dims if self.batch_shape[d] != 1] if self.factorized else []
        ones = torch.Size((1,) * len(self.batch_shape))
        self._batch_out = self.batch_shape if self.factorized else ones
        self.analysis = self._analysis((arguments, first.signature), first, precedent)
        self._look, self._vectorized = self.analysis.look, self.analysis.vectorized

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
        return self._read(x0, self._log_prob)[0]

    def whitened(self, x0: Tensor) -> Whitened:
        """Residual and log-normalizer, from one run, in the dtype of x_0.

        Observed sites that do not depend on x_0 are left out of the residual, whatever their law.

        Args:
            x0: sample + batch + event.

        Raises:
            ValueError: if an observed site that depends on x_0 is not Normal; with
                ``residuals="deviance"``, if it is no location family and not discrete.
        """
        if self._residuals in self._look.unfit:
            raise ValueError(self._refusal())
        # Observations may be finer than the prior: walks back are in the prior's dtype.
        return Whitened(*(v.to(x0.dtype) for v in self._read(x0, self._whitened)))

    def residual(self, x0: Tensor) -> Tensor:
        r"""Whitened residual :math:`L^{-1}(y - E[y | x_0])` of all Normal sites, sample + batch + (m,).

        Flattened and concatenated over sites; masked entries are 0, a scale multiplies by its root.
        Differentiable. Other sites have their signed deviance residuals if they were asked for.

        Args:
            x0: sample + batch + event.

        Raises:
            ValueError: as :meth:`whitened`.
        """
        return self.whitened(x0).residual

    def log_normalizer(self, x0: Tensor) -> Tensor:
        r""":math:`\log p(y | x_0) + |r|^2/2` in nats, sample + batch, without cancellation.

        Args:
            x0: sample + batch + event.

        Raises:
            ValueError: as :meth:`whitened`.
        """
        return self.whitened(x0).log_normalizer

    def with_residuals(self, residuals: str) -> Self:
        """The same likelihood with residuals of another kind, unchecked and cheap.

        Linearizing deviance residuals makes Gaussian guidance (MMPS, PiGDM, TMPD, DiffPIR) a generalized
        Gauss-Newton approximation for likelihoods that are not Normal. Twisted SMC corrects it.

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

    def check_gradient(self) -> None:
        """Refuse a likelihood without a gradient in x_0.

        Raises:
            ValueError: if x_0 is discrete, or an observed site changes with x_0 but has no gradient.
        """
        way = "expected a differentiable one (use twisted SMC with a proposal that asks for no gradient)"
        if not isinstance(self.prior.denoiser.process, GaussianProcess):
            raise ValueError(f"site {self.site!r}: got discrete data without gradients, {way}")
        if self._look.rigid:
            raise ValueError(
                f"likelihood: got no gradient in x_0 at site {', '.join(map(repr, self._look.rigid))}, {way}"
            )

    def _refusal(self) -> str:
        """Why there is no residual, and what does without."""
        name, law = self._look.unfit[self._residuals]
        expected = "a Normal or MultivariateNormal"
        if self._residuals == "deviance":
            expected += ", a location family (StudentT, Laplace, Logistic, ...) or a discrete law"
        gauss_newton = (
            'residuals="deviance" for a Gauss-Newton approximation, or '
            if "deviance" not in self._look.unfit
            else ""
        )
        return (
            f"likelihood: got site {name!r} with a {law}, expected {expected} (use {gauss_newton}PlugIn "
            "guidance or TwistedSMC, which take any likelihood)"
        )

    def _analysis(self, signature: Any, first: First, precedent: Analysis | None) -> Analysis:
        """What depends on x_0, and how a batch of them, or of latents too, is to be run.

        By trial runs; or by precedent, if the structure is the same and a batch has the numbers it should.
        """
        draws = trials(self.prior)
        latents = {k: v[(0,) * (v.dim() - self._dims[k][1])] for k, v in self.latents.items()}
        same = precedent is not None and precedent.signature == signature
        if precedent and same and self._confirmed(precedent, draws, latents, first):
            return precedent
        found = look(lambda x0: self._observed(x0, latents), draws)
        index = torch.arange(found.batch) % len(draws)
        single = self.with_latents(latents)
        expected = torch.stack([single.log_prob(x0) for x0 in draws]).detach()[index]
        vectorized = {}
        for many in (False, True)[: 1 + bool(latents)]:
            trial = self._of_many(latents, len(index) if many else 0)
            read = functools.partial(trial._read, draws[index], trial._log_prob)
            vectorized[many] = choose_way(lambda way: read(way)[0], expected)  # noqa: B023
        return Analysis(signature, found, vectorized)

    def _confirmed(
        self, known: Analysis, draws: Tensor, latents: dict[str, Tensor], first: First
    ) -> bool:
        """Whether a batch of the trial draws has the first one's number, and differs where it did."""
        # The first draw is not the first row, which an index from the left would find.
        index = (torch.arange(known.look.batch) + 1) % len(draws)
        expected = self._log_prob(first.observed, 0)[0].detach()
        for many, way in known.vectorized.items():
            trial = self._of_many(latents, len(index) if many else 0)
            try:
                with torch.no_grad():
                    parts = trial._read(draws[index], trial._log_probs, way)
            except Exception:  # whatever it is, the whole analysis will meet it again and say so
                return False
            total = sum(parts[1:], parts[0])[index == 0]
            if not agree(total, expected.expand_as(total)):
                return False
            names = [site["name"] for site in first.observed]
            varying = {n for n, v in zip(names, parts, strict=True) if not _alike(v[:3])}
            if varying != known.look.varying:
                return False
        return True

    def _of_many(self, latents: dict[str, Tensor], count: int) -> Self:
        """The same likelihood with so many copies of single latents; 0 for none."""
        shape = (count,) if count else ()
        return self.with_latents({k: v.expand((*shape, *v.shape)) for k, v in latents.items()})

    def _run(self) -> Any:
        try:
            return self.model(*self.args, **self.kwargs)
        except Exception as error:
            # The program is the user's, so is its error; how it was run is ours to say.
            kinds = ", ".join(type(value).__name__ for value in self.args)
            error.add_note(
                f"model, args: got arguments ({kinds}) and {sorted(self.kwargs)}, expected those of the "
                "program"
            )
            raise

    def _observed(self, x0: Tensor, latents: dict[str, Tensor]) -> list[Message]:
        return self._run_with({self.site: self.site_value(x0), **self._idle, **latents})

    def _run_with(self, data: dict[str, Tensor]) -> list[Message]:
        sites = observed(self._run, {**self.subsamples, **data})
        return [without_missing(of_each_datum(site)) for site in sites]

    def _log_probs(self, sites: list[Message], lead: int) -> tuple[Tensor, ...]:
        """Log-densities site by site."""
        return tuple(self._collapse(log_density(site), lead).sum(-1) for site in sites)

    def _log_prob(self, sites: list[Message], lead: int) -> tuple[Tensor, ...]:
        parts = self._log_probs(sites, lead)
        return (sum(parts[1:], parts[0]),)

    def _whitened(self, sites: list[Message], lead: int) -> tuple[Tensor, ...]:
        residuals, parts = [], []
        for site in sites:
            dependent = site["name"] in self._look.dependent
            normal = whitened(site, self._residuals) if dependent else None
            if normal is None:
                parts.append(self._collapse(log_density(site), lead).sum(-1))
                continue
            residual, log_normalizer, event = normal
            residuals.append(self._collapse(residual, lead, event))
            parts.append(self._collapse(log_normalizer, lead, event).sum(-1))
        total = sum(parts[1:], parts[0])
        if not residuals:
            return total.new_zeros(*total.shape, 0), total
        shape = torch.broadcast_shapes(*(r.shape[:-1] for r in residuals))
        return torch.cat([r.expand(*shape, r.shape[-1]) for r in residuals], -1), total

    def _collapse(self, x: Tensor, lead: int, event: int = 0) -> Tensor:
        out = collapse(x, lead, self._nesting, event, self._kept)
        return out.reshape(*out.shape[:lead], *self._batch_out, out.shape[-1])

    def _read(
        self,
        x0: Tensor,
        read: Callable[[list[Message], int], tuple[Tensor, ...]],
        way: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the program on a batch and read its sites: tensors of shape sample + ..."""
        own = self.batch_shape + self.event_shape
        check_event_shape("x0", x0, own)
        shapes = {k: v.shape[: v.dim() - self._dims[k][1]] for k, v in self.latents.items()}
        sample = torch.broadcast_shapes(x0.shape[: x0.dim() - len(own)], *shapes.values())
        if not sample:
            return read(self._observed(x0, self.latents), 0)
        x0 = x0.expand(sample + own).reshape(-1, *own)
        many, one = {}, {}
        for name, value in self.latents.items():
            if not shapes[name]:
                one[name] = value
                continue
            nominal = value.shape[len(shapes[name]) :]
            many[name] = value.expand(sample + nominal).reshape(-1, *nominal)
        if self._vectorized[bool(many)] if way is None else way:
            out = read(self._vectorized_run(x0, many, one), 1)
        else:
            # Looking at values, as validation does, is what vmap cannot do.
            with pyro.validation_enabled(False):
                out = torch.func.vmap(
                    lambda x, some: read(self._observed(x, {**one, **some}), 0), randomness="same"
                )(x0, many)
        return tuple(v.expand(len(x0), *v.shape[1:]).reshape(sample + v.shape[1:]) for v in out)

    def _vectorized_run(
        self, x0: Tensor, many: dict[str, Tensor], one: dict[str, Tensor]
    ) -> list[Message]:
        """A run with the sample dimension left of all plates."""
        value = _pad(self.site_value(x0), self._nesting - self._site.batch_dims)
        padded = {k: _pad(v, self._nesting - self._dims[k][0]) for k, v in many.items()}
        return self._run_with({self.site: value, **self._idle, **one, **padded})


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
            "(the likelihood is read from its observed sites; other latents are left to other guides)"
        )


def _trial(law: Any) -> Tensor:
    """A value to run a program on, with a gradient if it is real."""
    draw = trials(law)[0].clone()
    return draw.requires_grad_(draw.is_floating_point())


def _alike(rows: Tensor) -> bool:
    return bool((rows == rows[:1]).all())


def _check_residuals(residuals: str) -> str:
    if residuals not in RESIDUALS:
        raise ValueError(f"residuals: got {residuals!r}, expected 'normal' or 'deviance'")
    return residuals


def _pad(x: Tensor, extra: int) -> Tensor:
    """Singleton dimensions after the first."""
    return x.reshape(x.shape[:1] + (1,) * extra + x.shape[1:])
