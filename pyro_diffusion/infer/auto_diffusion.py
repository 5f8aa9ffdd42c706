"""A guide whose law is the end of a chain of annealed steps from another guide to the posterior."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from pyro.nn import PyroModule, PyroParam
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

from pyro_diffusion.infer.annealing.annealed_path import AnnealedPath, Control
from pyro_diffusion.infer.annealing.guide_chart import GuideChart, chart_of, frozen_chart
from pyro_diffusion.infer.annealing.path_kernels import (
    LangevinKernel,
    Levels,
    PathKernel,
    UnderdampedKernel,
)
from pyro_diffusion.infer.annealing.path_model import PathModel
from pyro_diffusion.infer.annealing.unconstrained import check_guide
from pyro_diffusion.infer.earlier_draws import EarlierDraws, outer_nesting
from pyro_diffusion.likelihoods.run import isolated
from pyro_diffusion.nn import MLP
from pyro_diffusion.validation import check_finite, check_number, check_positive_int, kind_of

__all__ = ["AutoDiffusion"]

KERNELS: dict[str, type[Any]] = {"langevin": LangevinKernel, "underdamped": UnderdampedKernel}
PERSISTENCE = 0.9
# Times of a control, as a network for noise levels takes them.
LARGEST_TIME = 10.0
AT_ONCE = 10_000


class AutoDiffusion(EarlierDraws, AutoContinuous):
    r"""A guide that walks from another guide's draw to the posterior, in K annealed steps.

    Its states follow :math:`\pi_b \propto q^{1 - b} p^b` of base q and posterior from b = 0 to 1, by
    unadjusted Langevin steps (Monte Carlo diffusion), optionally with a trained *control* (CMCD), or by steps
    with a momentum (uncorrected Hamiltonian annealing). The path is auxiliary: what stands for
    :math:`\log q(u)` is the path's ratio (see
    :class:`~pyro_diffusion.infer.annealing.annealed_path.AnnealedPath`), so that

    .. math::

        E\Big[\log p(x, u_K) - \log q(u_0)
        + \sum_k \log \frac{B_k(u_k \mid u_{k+1})}{F_k(u_{k+1} \mid u_k)}\Big] \le \log p(x)

    is the ELBO, a *lower bound*, and the exponential of what is averaged is *unbiased* for p(x). Step sizes,
    their scale in each coordinate, temperatures, persistence and control are parameters, trained by any of
    Pyro's ELBOs, or by :class:`~pyro_diffusion.infer.PathELBO`, for which the model need not know of
    particles' dimensions.

    Of the model it needs what :class:`~pyro_diffusion.infer.AnnealedSMC` needs; discrete latents are summed
    over. In an ``AutoGuideList`` its path depends on the draws of the guides appended before it. Memory does
    not grow with K where no graph is kept (under ``torch.no_grad()``).

    Args:
        model: the program, whole.
        base: an ``AutoNormal`` or any ``AutoContinuous`` of its continuous latents, fitted before.
        steps: K >= 1.
        kernel: "langevin", or "underdamped".
        control: True for an :class:`~pyro_diffusion.nn.MLP` of the latents' number, or a network called as
            ``control(z, t, **context)`` with rows z (N, D), in the base's coordinates, and times t (N,) from
            -10 to 10; it returns (N, D). Langevin steps alone take one.
        context: for an amortized control: takes the model's arguments, returns {name: (1, ...)}.
        step_size: at the start, in units of the base's squared scale, > 0.
        pathwise: gradients through the chain, which take second derivatives of the model. If not, those of
            scores with a leave-one-out baseline: first derivatives, no graph through the chain; Langevin
            steps only, ``PathELBO`` or ``Trace_ELBO``, with 2 particles or more, vectorized; in a list last
            of the guides that see earlier draws, and after none that is trained.
        train_base: whether the base is trained, too; needs ``pathwise``.

    Raises:
        ValueError: naming the argument, what it was and what was expected; at a call, as
            :class:`~pyro_diffusion.infer.AnnealedSMC` does.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = AutoDiffusion(model, AutoNormal(model, init_scale=1.0), steps=8)
        >>> weights = guide.log_weights(1000, torch.tensor(1.0))
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0))
        >>> weights.mean() < exact, bool((weights.exp().mean().log() - exact).abs() < 0.1)
        (tensor(True), True)

    References:
        Thin et al., arXiv 2106.15921; Doucet et al., arXiv 2208.07698 (Monte Carlo diffusion); Geffner &
        Domke, arXiv 2107.04150 (uncorrected Hamiltonian annealing); Vargas et al., arXiv 2307.01050 (CMCD);
        Kool et al. 2019 (leave-one-out baselines).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        base: AutoGuide,
        steps: int = 16,
        *,
        kernel: str = "langevin",
        control: bool | nn.Module = False,
        context: Callable[..., dict[str, Tensor]] | None = None,
        step_size: float = 0.1,
        pathwise: bool = True,
        train_base: bool = False,
    ) -> None:
        if not callable(model):
            raise ValueError(f"model: got {kind_of(model)}, expected a Pyro program")
        # Its sites are the base's; so is where they start.
        AutoGuide.__init__(self, check_guide(base, "base").model)
        self._hook_earlier()
        self.steps = check_positive_int("steps", steps)
        if kernel not in KERNELS:
            raise ValueError(f"kernel: got {kernel!r}, expected one of {list(KERNELS)}")
        self._kernel: PathKernel = KERNELS[kernel]()
        self._step_size = check_number("step_size", step_size, above=0)
        self._pathwise, self._train_base = bool(pathwise), bool(train_base)
        self._check_choices(kernel, control, context)
        # In tuples, so that neither becomes a submodule.
        self._program, self._context = (model,), (context,)
        # The base keeps its own name in the parameter store, and its own plates.
        self._modules["base"] = base
        self._controlled = control is not False
        if isinstance(control, nn.Module):
            self.control = control
        self._last_model: PathModel | None = None

    def _check_choices(self, kernel: str, control: Any, context: Any) -> None:
        if not isinstance(control, bool | nn.Module):
            raise ValueError(
                f"control: got {kind_of(control)}, expected True, False or a torch.nn.Module"
            )
        if control is not False and not self._kernel.controlled:
            raise ValueError(
                f"control: got one with kernel={kernel!r}, expected none, or 'langevin'"
            )
        if context is not None and not (callable(context) and isinstance(control, nn.Module)):
            raise ValueError(
                f"context: got {kind_of(context)}, expected a function of the model's arguments, with a "
                "network that takes it as control"
            )
        if not self._pathwise and not self._kernel.has_density:
            raise ValueError(f"pathwise: got False with kernel={kernel!r}, expected 'langevin'")
        if not self._pathwise and self._train_base:
            raise ValueError(
                "train_base: got True without pathwise gradients, expected one of them"
            )

    def check_model(self, model: object) -> None:
        """Refuse another program than the one whose posterior paths lead to.

        Raises:
            ValueError: for another, whose bound would be that of the guide's own.
        """
        if model != self._program[0]:
            raise ValueError(
                f"model: got {kind_of(model)} that is not the guide's own, expected the program that "
                "AutoDiffusion was made of, as it is what its paths score"
            )

    def get_posterior(self, *args: Any, **kwargs: Any) -> AnnealedPath:
        """The law of the packed unconstrained latents, at the present parameters."""
        drawn = self._given()
        chart = self._chart(args, kwargs)
        model = self._path_model(drawn, chart, args, kwargs)
        return AnnealedPath(
            model.density(chart),
            self._kernel,
            self._levels(),
            control=self._control(args, kwargs),
            given=model.given(drawn),
            pathwise=self._pathwise,
        )

    def path(self, *args: Any, **kwargs: Any) -> AnnealedPath:
        """As :meth:`get_posterior`, in a run of the guide: its parameters are seen, and made at the first."""
        with self._pyro_context:
            if self.prototype_trace is None:
                self._setup_prototype(*args, **kwargs)
            return self.get_posterior(*args, **kwargs)

    @torch.no_grad()
    def log_weights(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """Log p(x, u) less the path's ratio at fresh draws, (num_samples,), nats.

        Their mean is the ELBO, the mean of their exponentials unbiased for the evidence.
        """
        check_positive_int("num_samples", num_samples)
        path = self.path(*args, **kwargs)
        sizes = [len(part) for part in torch.empty(num_samples).split(AT_ONCE)]
        parts = []
        for size in sizes:
            some = path.expand(torch.Size([size]))
            with pyro.validation_enabled(False):
                parts.append(some.path_density(some.sample()).log_weight)
        return torch.cat(parts)

    @torch.no_grad()
    def log_weights_back(
        self, posterior: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The same of paths that end at given draws, walked back from them, (n,).

        For *exact* draws of the posterior their mean is an *upper* bound of the log evidence, and the mean of
        the exponentials of minus them unbiased for its inverse. For others it is neither.

        Args:
            posterior: {site: (n,) + its shape}.
            args: of the model.
            kwargs: of the model.
        """
        path = self.path(*args, **kwargs)
        assert self._last_model is not None
        rows = self._last_model.scored.unconstrain(posterior)
        check_finite("posterior (unconstrained)", rows)
        parts = []
        for part in rows.split(AT_ONCE):
            with pyro.validation_enabled(False):
                parts.append(path.expand(part.shape[:-1]).path_density(part).log_weight)
        return torch.cat(parts)

    def _given(self) -> dict[str, Tensor]:
        """What earlier guides of a list drew of the model's continuous latents, sample + shape."""
        drawn, self._other_draws = self._other_draws, {}
        if not drawn or self.master is None:
            return {}
        nodes, nesting = self.master().prototype_trace.nodes, outer_nesting()
        return {
            name: self._single(nodes[name]["fn"], value, nesting)
            for name, value in drawn.items()
            if name in nodes and not nodes[name]["fn"].support.is_discrete
        }

    def _dims(self, name: str) -> int:
        fn = self.master().prototype_trace.nodes[name]["fn"]  # type: ignore[misc]
        return len(fn.batch_shape) + len(fn.event_shape)

    def _chart(self, args: Any, kwargs: Any) -> GuideChart:
        base: Any = self.base
        if self._train_base:
            with base._pyro_context:  # parameters are seen where they are read within it
                return chart_of(base, args, kwargs, train=True)
        with isolated():
            return frozen_chart(chart_of(base, args, kwargs), base)

    def _path_model(
        self, drawn: dict[str, Tensor], chart: GuideChart, args: Any, kwargs: Any
    ) -> PathModel:
        """The model as the path scores it, kept while its arguments are the same objects."""
        last = self._last_model
        if last is None or not last.fits(drawn, args, kwargs):
            first = {
                name: x.detach()[(0,) * (x.dim() - self._dims(name))] for name, x in drawn.items()
            }
            last = PathModel(self._program[0], self.base, chart, drawn, first, args, kwargs)
            self._last_model = last
        return last

    def _levels(self) -> Levels:
        increments: Any = self.increments
        steps: Any = self.step_sizes
        scale: Any = self.scale
        if (found := (len(steps), len(scale))) != (self.steps, self.latent_dim):
            raise ValueError(
                f"steps: got {self.steps} and {self.latent_dim} latents, and {found[0]} and {found[1]} in "
                f"Pyro's store ('{self._pyro_name}.step_sizes'), expected one guide of a name: "
                "pyro.clear_param_store() before another"
            )
        betas = torch.cat(
            [increments.new_zeros(1), increments.cumsum(0)[:-1], increments.new_ones(1)]
        )
        persistence: Any = self.persistence if "persistence" in self._pyro_params else betas[:1]
        return Levels(betas, steps, scale, persistence)

    def _control(self, args: Any, kwargs: Any) -> Control | None:
        if not self._controlled:
            return None
        # Once: each reading is a param statement for every parameter.
        network, (context,), steps = self._stored_control(), self._context, self.steps
        given = {} if context is None else context(*args, **kwargs)

        def control(z: Tensor, level: int) -> Tensor:
            rows = z.reshape(-1, z.shape[-1])
            # An MLP embeds one time for all rows at once.
            shape = () if type(network) is MLP else (len(rows),)
            time = rows.new_full(shape, LARGEST_TIME * (2 * level / steps - 1))
            spread = {name: x.expand(len(rows), *x.shape[1:]) for name, x in given.items()}
            out: Tensor = network(rows, time, **spread)
            return out.to(z.dtype).reshape(z.shape)

        return control

    def _stored_control(self) -> nn.Module:
        """The control with what Pyro's store has of it, as every other parameter is read."""
        network: Any = self._modules["control"]
        local = pyro.settings.get("module_local_params") or isinstance(network, PyroModule)
        if local or not self._pyro_context.active:
            return self.control
        name, store = self._pyro_get_fullname("control"), pyro.get_param_store()
        for own, value in network.named_parameters():
            full = param_with_module_name(name, own)
            if full in store and store[full].shape != value.shape:
                raise ValueError(
                    f"control: got {own!r} of shape {tuple(value.shape)} and of {tuple(store[full].shape)} "
                    "in Pyro's store, expected one network: pyro.clear_param_store() before another"
                )
        # Without the update a stored network would neither be used nor, where it is trained, move.
        out: nn.Module = pyro.module(name, network, update_module_params=True)
        return out

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with isolated(), torch.no_grad():
            self.base(*args, **kwargs)  # an unfitted base has no parameters before
        super()._setup_prototype(*args, **kwargs)
        like = self._init_loc()
        steps, dim = self.steps, self.latent_dim
        self.step_sizes = PyroParam(like.new_full((steps,), self._step_size), constraints.positive)
        self.scale = PyroParam(like.new_ones(dim), constraints.positive)
        self.increments = PyroParam(like.new_full((steps,), 1 / steps), constraints.simplex)
        if isinstance(self._kernel, UnderdampedKernel):
            start = like.new_tensor(PERSISTENCE)
            self.persistence = PyroParam(start, constraints.unit_interval)
        if self._controlled and "control" not in self._modules:
            self.control = MLP(dim, (64, 64), embedding=32).to(like)

    def median(self, *args: Any, num_samples: int = 1000, **kwargs: Any) -> dict[str, Tensor]:
        """Median of every coordinate over ``num_samples`` draws; see :meth:`quantiles`."""
        found = self.quantiles([0.5], *args, num_samples=num_samples, **kwargs)
        return {name: value.squeeze(0) for name, value in found.items()}

    def quantiles(
        self, quantiles: Any, *args: Any, num_samples: int = 1000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of every coordinate over ``num_samples`` draws, each (quantiles,) + the site's shape."""
        check_positive_int("num_samples", num_samples)
        at = torch.as_tensor(quantiles)
        if not bool(((at >= 0) & (at <= 1)).all()):
            raise ValueError(f"quantiles: got {quantiles}, expected numbers in [0, 1]")
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        with torch.no_grad(), isolated():
            names = list(self.master().prototype_trace.nodes) if self.master else []
            self._other_draws = self._draws_of_others(num_samples, names, args, kwargs)
            path = self.get_posterior(*args, **kwargs)
            u = path.expand(torch.Size([num_samples])).sample()
            assert self._last_model is not None
            values = self._last_model.constrain(u, path.given)
        return {name: x.quantile(at.to(x), dim=0) for name, x in values.items()}

    def _update_master(self, master_ref: Any) -> None:
        super()._update_master(master_ref)
        self.base.master = None

    def __getstate__(self) -> Any:
        self._last_model = None  # of closures
        return super().__getstate__()
