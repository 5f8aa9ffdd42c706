"""A model's log density over the unconstrained latents of a guide, for many draws at once."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoGuide, AutoNormal
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_diffusion.infer.annealing.cholesky_nan import CholeskyNaN
from pyro_diffusion.infer.annealing.log_einsum import EnumeratedDensity
from pyro_diffusion.infer.annealing.model_sites import guide_latents, is_enumerated
from pyro_diffusion.infer.earlier_draws import EarlierDraws
from pyro_diffusion.likelihoods.run import isolated
from pyro_diffusion.validation import check_tensor, kind_of

__all__ = ["UnconstrainedModel", "check_guide"]

TRIALS = 3
FIRST_RUNS = 20  # draws of the guide, to find two that the model's validation allows
ALIKE = 1e-5, 1e-3  # relative and absolute, between a draw by itself and among others
ROUNDED = 1e-3  # relative, of values there and back
AGAIN = 10  # units of rounding, between one run and the next


class UnconstrainedModel:
    r"""The log density :math:`\log p(x, T(u)) + \log |\det \partial T / \partial u|` of a model (nats).

    u are the latents of a guide in the order of its program, each taken to the reals by ``biject_to`` of its
    support and flattened. Discrete latents are summed over (Pyro's parallel enumeration; under a mask each is
    uniform, so that masked rows have the evidence 1). The model runs once for all draws, under
    ``torch.func.vmap``, so that it need not know of them; what ``vmap`` cannot run (some densities of Pyro)
    runs once in a plate of all draws, and what gives other densities there, or branches on values, once a
    draw, with a warning. Where a matrix of the model cannot be factorized there is no density.

    Args:
        model: the program, data in its arguments.
        guide: of its continuous latents; its shapes and supports are used, not its law.
        args: of the model.
        kwargs: of the model.

    Attributes:
        dim: D, how many unconstrained numbers there are.

    Raises:
        ValueError: naming the site, for a model without continuous latents or without the guide's, for
            latents that the guide has not, discrete latents that cannot be enumerated, subsampled plates,
            sites, shapes and supports that change from run to run, densities that do, and scales on what is
            summed over.
    """

    def __init__(self, model: Callable[..., Any], guide: AutoGuide, args: Any, kwargs: Any) -> None:
        if not callable(model):
            raise ValueError(f"model: got {kind_of(model)}, expected a Pyro program")
        self._program, self._args, self._kwargs = model, args, kwargs
        with isolated(), torch.no_grad():
            drawn, runs = self._two_runs(guide)
        self._sites = guide_latents(guide, runs)
        shapes = {
            name: biject_to(site["fn"].support).inv(site["value"]).shape
            for name, site in self._sites.items()
        }
        self._shapes: dict[str, torch.Size] = shapes
        self.dim = sum(shape.numel() for shape in shapes.values())
        self._supports = {name: site["fn"].support for name, site in self._sites.items()}
        discrete = [name for name, node in runs[0].nodes.items() if is_enumerated(node)]
        frames = [
            frame for node in runs[0].nodes.values() for frame in node.get("cond_indep_stack", ())
        ]
        nesting = -min([frame.dim for frame in frames if frame.vectorized], default=0)
        if discrete:
            parallel = poutine.infer_config(config_enumerate(model), config_fn=_in_parallel)
            self._program = _Enumerated(-1 - nesting)(parallel)
        with isolated(), torch.no_grad(), pyro.validation_enabled(False):
            first = self._trace(drawn[0])
            kind = EnumeratedDensity if discrete else TraceEinsumEvaluator
            self._evaluator = kind(first, bool(discrete), nesting)
            if isinstance(self._evaluator, EnumeratedDensity):
                self._evaluator.check_scales(first)
        self._nesting = nesting
        self._ways = [self._all] if discrete else [self._all, self._in_a_plate]
        self._way = self._all

    def __call__(self, u: Tensor) -> Tensor:
        """Log densities at (..., D), (...); minus infinity where they are NaN. Differentiable."""
        return self.raw(u).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def raw(self, u: Tensor) -> Tensor:
        """As the call, NaN left alone."""
        rows = u.reshape(-1, self.dim)
        with isolated(), pyro.validation_enabled(False):
            out = self._way(rows)
        return out.reshape(u.shape[:-1])

    def check(self, u: Tensor) -> None:
        """See whether a few draws, (n, D), have the same density by themselves, and again.

        Raises:
            ValueError: for a density that changes from run to run; for NaN that a mask leaves out of it, but
                not of its gradient; for latents that a mask leaves without any.
        """
        some = u[:TRIALS].detach()
        self._check_masked(some)
        self._check_flat(some[0])
        with torch.no_grad(), isolated(), pyro.validation_enabled(False):
            alone = self._one_by_one(some)
            rounding = AGAIN * torch.finfo(alone.dtype).eps
            if not _alike(alone, self._one_by_one(some), rounding, rounding):
                raise ValueError(
                    "model: got another log density at a second run with the same latents, expected one that "
                    "is no estimate (a diffusion's is: use ProbabilityFlow or the unfolded chain)"
                )
            reasons = []
            for way in self._ways:
                try:
                    right = _alike(alone, way(some)) and not _mixes(way, some)
                    reason = None if right else "densities differ there"
                except (
                    Exception
                ) as error:  # whatever a model does that cannot be done for many at once
                    reason = str(error).strip().split("\n")[0]
                if reason is None:
                    self._way = way
                    return
                reasons.append(reason)
        self._way = self._one_by_one
        warnings.warn(
            "model: runs once a draw, which is slow, as it cannot run under torch.func.vmap or in a plate of "
            f"all draws: {'; '.join(reasons)}",
            stacklevel=2,
        )

    def _check_masked(self, some: Tensor) -> None:
        """Refuse observed NaN under a mask: 0 times NaN is NaN in the gradient, and nothing would move."""
        with isolated(), torch.no_grad(), pyro.validation_enabled(False):
            nodes = self._trace(self.constrain(some[0])).nodes
        absent = [
            name
            for name, node in nodes.items()
            if node["type"] == "sample"
            and node["is_observed"]
            and isinstance(node["value"], Tensor)
            and node["value"].numel()
            and bool(node["value"].isnan().any())
        ]
        if not absent:
            return
        with isolated(), torch.enable_grad(), pyro.validation_enabled(False):
            rows = some.clone().requires_grad_()
            out = self._one_by_one(rows)
            slope = torch.autograd.grad(out.sum(), rows)[0] if out.requires_grad else rows
        if bool((out.isfinite() & slope.isnan().any(-1)).any()):
            raise ValueError(
                f"site {absent[0]!r}: got NaN under a mask, whose gradient is NaN all the same, expected "
                "numbers there, any: torch.nan_to_num(x)"
            )

    def _check_flat(self, u: Tensor) -> None:
        """Refuse latents under a mask on which nothing depends: they are flat, with an infinite evidence."""
        masks = {name: site.get("mask") for name, site in self._sites.items()}
        masked = {
            name: torch.as_tensor(mask)
            for name, mask in masks.items()
            if mask is False or (isinstance(mask, Tensor) and not bool(mask.all()))
        }
        if not masked:
            return
        with isolated(), torch.enable_grad(), pyro.validation_enabled(False):
            free = {name: x.detach().requires_grad_() for name, x in self.unpack(u).items()}
            values = {name: biject_to(self._supports[name])(x) for name, x in free.items()}
            out = self._evaluator.log_prob(self._trace(values))
            slopes = torch.autograd.grad(
                out, [free[name] for name in masked], allow_unused=True, materialize_grads=True
            )
        for (name, mask), slope in zip(masked.items(), slopes, strict=True):
            batch = self._sites[name]["fn"].batch_shape
            still = slope.reshape(*batch, -1).eq(0).all(-1)
            count = int((still & ~mask.to(still.device).expand(batch)).sum())
            if count:
                raise ValueError(
                    f"site {name!r}: got {count} latents without a density, under a mask, on which nothing "
                    "depends, expected each to have one: with obs_mask, sample what is missing as a site of "
                    "its own"
                )

    def unpack(self, u: Tensor) -> dict[str, Tensor]:
        """Unconstrained values of each site, (...) + its shape, of (..., D)."""
        parts = u.split([shape.numel() for shape in self._shapes.values()], -1)
        named = zip(self._shapes.items(), parts, strict=True)
        return {name: part.reshape(u.shape[:-1] + shape) for (name, shape), part in named}

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Some sites' values, sample + shape each, unconstrained, sample + (E,). Differentiable."""
        parts = []
        for name, value in values.items():
            free = biject_to(self._supports[name]).inv(value)
            dims = len(self._shapes[name])
            parts.append(free.reshape(*free.shape[: free.dim() - dims], -1))
        lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*lead, -1) for part in parts], -1)

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Values of each site in its support, (...) + its shape, of (..., D)."""
        free = self.unpack(u)
        return {name: biject_to(self._supports[name])(v) for name, v in free.items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`constrain`: (n, D) of values, each (n,) + the site's shape.

        Raises:
            ValueError: for missing sites, wrong shapes and values outside of their support.
        """
        missing = [name for name in self._sites if name not in values]
        if missing:
            raise ValueError(f"draws: got none of {missing}, expected all of {list(self._sites)}")
        parts = []
        for name, site in self._sites.items():
            value = check_tensor(f"draws[{name!r}]", values[name])
            shape = site["value"].shape
            if value.shape[1:] != shape:
                raise ValueError(
                    f"draws[{name!r}]: got shape {tuple(value.shape)}, expected (n,) + {tuple(shape)}"
                )
            if len(value) < 2:
                raise ValueError(f"draws[{name!r}]: got {len(value)}, expected two draws or more")
            transform = biject_to(self._supports[name])
            free = transform.inv(value)
            # torch moves what is outside to the edge; supports' own checks refuse what rounding did
            if not _alike(
                transform(free), value, ROUNDED, ROUNDED * float(value.nan_to_num().abs().amax())
            ):
                raise ValueError(
                    f"draws[{name!r}]: got values outside of the support, expected all in "
                    f"{self._supports[name]}"
                )
            parts.append(free.reshape(len(value), -1))
        return torch.cat(parts, -1)

    def blame(self, u: Tensor) -> str:
        """The site whose density is not finite at one draw, (D,), and what it is.

        Raises:
            ValueError: if that is so for its data, which no draw changes.
        """
        with isolated(), torch.no_grad(), pyro.validation_enabled(False):
            for name, node in self._trace(self.constrain(u)).nodes.items():
                if node["type"] != "sample" or site_is_subsample(node):
                    continue
                log_prob = node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"])
                if not bool(log_prob.sum().isfinite()):
                    if node["is_observed"] and not bool(node["value"].isfinite().all()):
                        raise ValueError(
                            f"site {name!r} ({type(node['fn']).__name__}): got NaN or infinite data, "
                            "expected finite numbers"
                        )
                    return (
                        f"site {name!r} ({type(node['fn']).__name__}): got {float(log_prob.sum())}"
                    )
        return "model: got a log density that is not finite"

    def _all(self, rows: Tensor) -> Tensor:
        return torch.func.vmap(self._single)(rows)

    def _in_a_plate(self, rows: Tensor) -> Tensor:
        values, total = {}, rows.new_zeros(len(rows))
        for name, free in self.unpack(rows).items():
            site, transform = self._sites[name], biject_to(self._supports[name])
            value = transform(free)
            total = total + transform.log_abs_det_jacobian(free, value).reshape(len(rows), -1).sum(
                -1
            )
            extra = (1,) * (self._nesting - len(site["fn"].batch_shape))
            values[name] = value.reshape(len(rows), *extra, *value.shape[1:])
        with pyro.plate("_draws", len(rows), dim=-1 - self._nesting):
            trace = self._trace(values)
        trace.compute_log_prob(lambda name, site: not site_is_subsample(site))
        for node in trace.nodes.values():
            if node["type"] == "sample" and not site_is_subsample(node):
                total = total + node["log_prob"].reshape(len(rows), -1).sum(-1)
        return total

    def _one_by_one(self, rows: Tensor) -> Tensor:
        return torch.stack([self._single(row) for row in rows])

    def _single(self, u: Tensor) -> Tensor:
        free, values, log_det = self.unpack(u), {}, u.new_zeros(())
        for name, value in free.items():
            transform = biject_to(self._supports[name])
            values[name] = transform(value)
            log_det = log_det + transform.log_abs_det_jacobian(value, values[name]).sum()
        out: Tensor = self._evaluator.log_prob(self._trace(values)) + log_det
        return out

    def _two_runs(self, guide: AutoGuide) -> tuple[list[dict[str, Tensor]], list[Any]]:
        """Two draws of the guide, and the model's traces at them."""
        drawn: list[dict[str, Tensor]] = []
        runs: list[Any] = []
        for left in reversed(range(FIRST_RUNS)):
            values = _values(guide(*self._args, **self._kwargs))
            try:
                runs.append(self._trace(values))
            except ValueError:  # of Pyro's validation
                if not left:
                    raise
                continue
            drawn.append(values)
            if len(runs) == 2:
                break
        return drawn, runs

    def _trace(self, values: dict[str, Tensor]) -> Any:
        conditioned = poutine.condition(self._program, data=values)
        with CholeskyNaN():
            return poutine.trace(poutine.block(conditioned, hide_types=["param"])).get_trace(
                *self._args, **self._kwargs
            )


class _Enumerated(EnumMessenger):
    """Pyro's parallel enumeration, which asks for ``value.data``, under ``vmap``, which has none."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor):
            msg["value"] = torch.empty(value.shape, device="meta")
        super()._pyro_post_sample(msg)
        msg["value"] = value


def check_guide(guide: object, name: str = "guide") -> AutoGuide:
    """Refuse what is no guide with a density over unconstrained latents, or only an estimate of one.

    Raises:
        ValueError: naming what it was.
    """
    vague = isinstance(guide, AutoDelta | EarlierDraws)
    if vague or not isinstance(guide, AutoNormal | AutoContinuous):
        raise ValueError(
            f"{name}: got {kind_of(guide)}, expected an AutoNormal or an AutoContinuous "
            "(AutoMultivariateNormal, AutoIAFNormal, ...), fitted"
        )
    return guide


def _values(drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in drawn.items()}


def _mixes(way: Callable[[Tensor], Tensor], u: Tensor) -> bool:
    """Whether the density of a draw depends on its neighbours, if only by little of a large number."""
    other = torch.cat([u[:1], torch.zeros_like(u[1:])])
    first = torch.stack([way(u)[0], way(other)[0]])
    rounding = AGAIN * torch.finfo(first.dtype).eps
    return not _alike(first[:1], first[1:], rounding, rounding)


def _alike(a: Tensor, b: Tensor, rtol: float = ALIKE[0], atol: float = ALIKE[1]) -> bool:
    return torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)


def _in_parallel(site: Any) -> Any:
    """A sum one value after the other is the same sum."""
    return {"enumerate": "parallel"} if site["infer"].get("enumerate") == "sequential" else {}
