"""A guide's law as a base that is easy to score, and a map of it to the unconstrained latents."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pyro.distributions import Independent, Normal
from pyro.distributions.transforms import LowerCholeskyAffine
from pyro.infer.autoguide import AutoGuide, AutoLaplaceApproximation, AutoNormal
from torch import Tensor, nn
from torch.distributions import AffineTransform, LowRankMultivariateNormal, MultivariateNormal

from pyro_diffusion.validation import kind_of

__all__ = ["GuideChart", "StandardNormal", "chart_of", "frozen_chart", "normal_chart"]


class GuideChart(NamedTuple):
    r"""A guide's law q(u) of unconstrained latents as a map u = f(z) of a base z.

    Densities on u and on z are those of one path, :math:`q^{1-b} p^b`, in other coordinates. In z the guide
    is a standard normal, so that moves there are scaled as the guide has it, and no flow is inverted.

    Attributes:
        base: law of z, event shape (D,). It may have ``log_prob_and_slope``, of z (..., D): its log density,
            (...), and the gradient.
        transform: f; None for the identity.
        log_prob: log q(u), of (..., D).
    """

    base: Any
    transform: Any
    log_prob: Callable[[Tensor], Tensor]

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents f(z), (..., D), and log |det df/dz|, (...)."""
        if self.transform is None:
            return z, z.new_zeros(z.shape[:-1])
        u = self.transform(z)
        log_det = self.transform.log_abs_det_jacobian(z, u)
        return u, log_det.sum(-1) if log_det.dim() == z.dim() else log_det


class StandardNormal(Independent):
    """Of the shape of a tensor (D,)."""

    def __init__(self, like: Tensor) -> None:
        super().__init__(Normal(torch.zeros_like(like), torch.ones_like(like)), 1)

    def log_prob_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """At (..., D), in closed form."""
        constant = z.shape[-1] * math.log(2 * math.pi)
        return -(z.square().sum(-1) + constant) / 2, -z


class _Affine(LowerCholeskyAffine):
    """Pyro's, by one product for all rows instead of one for each."""

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + x @ self.scale_tril.mT

    def _inverse(self, y: Tensor) -> Tensor:
        rows = (y - self.loc).reshape(-1, y.shape[-1])
        found = torch.linalg.solve_triangular(self.scale_tril, rows.mT, upper=False)
        return found.mT.reshape(y.shape)


def chart_of(guide: AutoGuide, args: Any, kwargs: Any, *, train: bool = False) -> GuideChart:
    """The chart of a guide that has been set up, at its present parameters.

    A guide whose posterior is neither normal nor made of ``get_base_dist`` and ``get_transform`` is its own
    base.

    Args:
        guide: an AutoNormal, or an AutoContinuous.
        args: of the model.
        kwargs: of the model.
        train: whether gradients reach the parameters of a normal guide (they do those of a flow).

    Raises:
        ValueError: for a Laplace approximation that has not been made, and to train a guide that is its own
            base.
    """
    if isinstance(guide, AutoLaplaceApproximation):
        raise ValueError(
            "guide: got an AutoLaplaceApproximation, which is a point until guide.laplace_approximation() "
            "is called, expected the guide that it returns"
        )
    if isinstance(guide, AutoNormal):
        trace: Any = guide.prototype_trace
        names = [name for name, _ in trace.iter_stochastic_nodes()]
        found = [guide._get_loc_and_scale(name) for name in names]
        loc, scale = (torch.cat([x.reshape(-1) for x in part]) for part in zip(*found, strict=True))
        if not train:
            loc, scale = loc.detach(), scale.detach()
        normal = Normal(loc, scale).to_event(1)
        return GuideChart(StandardNormal(loc), AffineTransform(loc, scale), normal.log_prob)
    posterior = guide.get_posterior(*args, **kwargs)
    if isinstance(posterior, LowRankMultivariateNormal | MultivariateNormal):
        return normal_chart(posterior, train=train)
    try:
        base, transform = guide.get_base_dist(), guide.get_transform(*args, **kwargs)
    except NotImplementedError:
        if train:  # its draws would be constants
            raise ValueError(
                f"train_base: got True with {kind_of(guide)}, whose posterior is neither normal nor a "
                "transformed base, expected False, or another base"
            ) from None
        return GuideChart(posterior, None, posterior.log_prob)
    return GuideChart(base, transform, posterior.log_prob)


def frozen_chart(chart: GuideChart, guide: nn.Module) -> GuideChart:
    """A chart through which gradients reach states, and no parameter of the guide."""
    if chart.transform is None or not isinstance(chart.transform, nn.Module):
        return chart
    return chart._replace(transform=_Frozen(chart.transform, guide))


class _Frozen:
    """A transform whose parameters are constants while it is applied."""

    def __init__(self, transform: Any, guide: nn.Module) -> None:
        self._transform, self._guide = transform, guide

    def __call__(self, z: Tensor) -> Tensor:
        with _constant(self._guide):
            out: Tensor = self._transform(z)
        return out

    def inv(self, u: Tensor) -> Tensor:
        """The inverse."""
        with _constant(self._guide):
            out: Tensor = self._transform.inv(u)
        return out

    def log_abs_det_jacobian(self, z: Tensor, u: Tensor) -> Tensor:
        """As the transform has it."""
        with _constant(self._guide):
            out: Tensor = self._transform.log_abs_det_jacobian(z, u)
        return out


@contextlib.contextmanager
def _constant(module: nn.Module) -> Iterator[None]:
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def normal_chart(normal: Any, *, train: bool = False) -> GuideChart:
    """The chart of a normal, from a standard one."""
    # Its own root: that of the covariance takes a square, which single precision has no room for.
    loc, tril = normal.loc, normal.scale_tril
    if not train:
        loc, tril = loc.detach(), tril.detach()
    return GuideChart(StandardNormal(loc), _Affine(loc, tril), normal.log_prob)
