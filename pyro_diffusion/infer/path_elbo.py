"""The ELBO of a path guide from its own walk, without another run of the model."""

from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_diffusion.infer.annealing.annealed_path import centred
from pyro_diffusion.infer.auto_diffusion import AutoDiffusion
from pyro_diffusion.validation import check_positive_int, kind_of

__all__ = ["PathELBO"]


class PathELBO(ELBO):
    r"""The loss of :class:`~pyro_diffusion.infer.AutoDiffusion` for Pyro's ``SVI``, over N paths at once.

    Minus the mean of log weights :math:`\log w = \log p(x, u_K) - \log \hat q`, a *bound*: nats, at least
    :math:`-\log p(x)` on average. It is ``Trace_ELBO``'s, but the path runs the model by itself and knows
    log p at its end. So a model written for one draw trains on many paths, which for
    ``Trace_ELBO(vectorize_particles=True)`` it would have to broadcast over. Gradients are the guide's:
    pathwise, or of scores with leave-one-out baselines,

    .. math::

        \frac1{N - 1} \sum_n (\log w_n - \overline{\log w})\, \nabla \log F_n
        + \frac1N \sum_n \nabla \log B_n,

    unbiased both. Parameters of the model are not trained; ``Trace_ELBO`` does.

    Args:
        num_particles: N; >= 2 for a guide without pathwise gradients.

    Raises:
        ValueError: for another guide, another model than the guide's, and too few particles.

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

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with gradients for the guide's parameters."""
        if not isinstance(guide, AutoDiffusion) or guide.master is not None:
            raise ValueError(
                f"guide: got {kind_of(guide)}, expected an AutoDiffusion by itself (Trace_ELBO takes any)"
            )
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

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss, without a graph."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss, and gradients added to those of parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return float(loss.detach())

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("PathELBO: a path needs no traces of model and guide")
