"""The ELBO of a path, or of a stock guide, over many draws of a model that is written for one."""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.util import warn_if_inf, warn_if_nan
from torch import Tensor

from pyro_diffusion.infer.annealing.annealed_path import centred
from pyro_diffusion.infer.annealing.guide_chart import chart_of
from pyro_diffusion.infer.annealing.path_model import PathModel
from pyro_diffusion.infer.annealing.unconstrained import check_guide
from pyro_diffusion.infer.auto_diffusion import AutoDiffusion
from pyro_diffusion.likelihoods.run import isolated
from pyro_diffusion.validation import check_positive_int, kind_of

__all__ = ["PathELBO"]


class PathELBO(ELBO):
    r"""The loss of :class:`~pyro_diffusion.infer.AutoDiffusion`, or of a stock guide, over N draws at once.

    Minus the mean of log weights :math:`\log w = \log p(x, u_K) - \log \hat q`, a *bound*: nats, at least
    :math:`-\log p(x)` on average. It is ``Trace_ELBO``'s, but the path runs the model by itself and knows
    log p at its end. So a model written for one draw trains on many paths, which for
    ``Trace_ELBO(vectorize_particles=True)`` it would have to broadcast over. Gradients are the guide's:
    pathwise, or of scores with leave-one-out baselines,

    .. math::

        \frac1{N - 1} \sum_n (\log w_n - \overline{\log w})\, \nabla \log F_n
        + \frac1N \sum_n \nabla \log B_n,

    unbiased both. A stock guide (``AutoNormal``, or any ``AutoContinuous``) is a path of no steps: the loss
    is ``Trace_ELBO``'s of N particles, gradients are pathwise, discrete latents are summed over. A flow that
    is fitted with one particle a step may stay behind one with many, in the same time. Parameters of the
    model are not trained, which a warning says; ``Trace_ELBO`` does. As Pyro's losses do, it warns of a loss
    that is NaN, and of gradients of one that is infinite: they are NaN, and so is what is trained by them.

    Args:
        num_particles: N; >= 2 for a guide without pathwise gradients.

    Raises:
        ValueError: for another guide, another model than the one that an AutoDiffusion was made of, too few
            particles, and as :class:`~pyro_diffusion.infer.AnnealedSMC` does.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        >>> guide = AutoDiffusion(model, AutoNormal(model), steps=4, control=True)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), PathELBO(64))
        >>> svi.step() > 0
        True
    """

    def __init__(self, num_particles: int = 32) -> None:
        super().__init__(num_particles=check_positive_int("num_particles", num_particles))
        self._last: tuple[Any, Any, PathModel] | None = None
        self._seen: Any = None

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with gradients for the guide's parameters."""
        if getattr(guide, "master", None) is not None:
            raise ValueError(
                f"guide: got {kind_of(guide)} of a list, expected one by itself (Trace_ELBO takes any)"
            )
        if not isinstance(guide, AutoDiffusion):
            return -self._without_steps(model, check_guide(guide), args, kwargs).mean()
        guide.check_model(model)
        path = guide.path(*args, **kwargs).expand(torch.Size([self.num_particles]))
        if not path.pathwise and self.num_particles < 2:
            raise ValueError("num_particles: got 1, expected 2 or more without pathwise gradients")
        with pyro.validation_enabled(False):
            density = path.path_density(path.rsample())
        if path.pathwise:
            return -density.log_weight.mean()
        signal = density.log_weight.detach()
        surrogate = (signal * centred(density.forward) + density.backward).mean()
        return surrogate.detach() - surrogate - signal.mean()

    def _without_steps(
        self, model: Callable[..., Any], guide: Any, args: Any, kwargs: Any
    ) -> Tensor:
        """Log weights of a stock guide's draws, (N,)."""
        if guide.prototype_trace is None:
            with isolated(), torch.no_grad():
                guide(*args, **kwargs)
        with guide._pyro_context:  # parameters are seen where they are read within it
            chart = chart_of(guide, args, kwargs, train=True)
            last = self._last
            known = last is not None and last[0] is model and last[1] is guide
            if last is None or not known or not last[2].fits({}, args, kwargs):
                last = model, guide, PathModel(model, guide, chart, {}, {}, args, kwargs)
                self._last = last
            with pyro.validation_enabled(False):
                z = chart.base.sample(torch.Size([self.num_particles]))
                u, log_det = chart(z)
                return last[2].scored(u) + log_det - chart.base.log_prob(z)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss, without a graph."""
        with torch.no_grad():
            value = self.differentiable_loss(model, guide, *args, **kwargs)
        return float(warn_if_nan(value, "loss"))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss, and gradients added to those of the guide's parameters, and of no others.

        The model's, which SVI does not see here and would not clear, would wait for the next loss that does.
        """
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        self._warn_of_parameters(model, guide, args, kwargs)
        trained = [p for p in guide.parameters() if p.requires_grad]
        if trained and loss.requires_grad:
            loss.backward(inputs=trained)
        value = warn_if_inf(warn_if_nan(loss.detach(), "loss"), "loss")
        return float(value)

    def _warn_of_parameters(
        self, model: Callable[..., Any], guide: Any, args: Any, kwargs: Any
    ) -> None:
        """Say once, of each model, that what it would train stays as it is."""
        if self._seen is model:
            return
        self._seen = model
        with torch.random.fork_rng(devices=[]), isolated(), torch.no_grad():
            drawn = guide(*args, **kwargs)
            run = poutine.trace(poutine.condition(model, data=drawn), param_only=True)
            with pyro.validation_enabled(False):
                nodes = run.get_trace(*args, **kwargs).nodes
        own = [name for name, node in nodes.items() if node["type"] == "param"]
        if own:
            warnings.warn(
                f"model: PathELBO does not train its parameters, {', '.join(own)}; Trace_ELBO does",
                stacklevel=3,
            )

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("PathELBO: a path needs no traces of model and guide")
