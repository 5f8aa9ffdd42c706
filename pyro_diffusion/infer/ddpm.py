"""The chain spelled out, as a ready model and guide."""

from typing import Any

import pyro
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.denoisers.base import check_context
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.infer.reparam import ChainReparam, forward_chain
from pyro_diffusion.validation import Shape, check_positive_int, check_tensor

__all__ = ["DDPM"]


def check_rows(x: Tensor | None, size: int, subsample_size: int | None, event_shape: Shape) -> None:
    """Refuse data that are no rows, and a number of data or of a subsample that is none.

    Raises:
        ValueError: naming the argument.
    """
    check_positive_int("size", size)
    if x is not None and check_tensor("x", x).shape != (size, *event_shape):
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, expected (n,) + {tuple(event_shape)}, rows of the event shape"
        )
    if subsample_size is not None and check_positive_int("subsample_size", subsample_size) > size:
        raise ValueError(f"subsample_size: got {subsample_size}, expected at most {size}, the data")


class _Model(PyroModule):
    """Reverse chain over a plate of data."""

    def __init__(self, denoiser: Denoiser, arguments: dict[str, Any], name: str) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._arguments, self._name = arguments, name

    def diffusion(self, context: dict[str, Tensor]) -> Diffusion:
        return Diffusion(self.denoiser, context=context, **self._arguments)

    def forward(
        self,
        x: Tensor | None = None,
        *,
        size: int | None = None,
        subsample_size: int | None = None,
        **context: Tensor,
    ) -> Tensor:
        if x is not None:
            size = len(x) if isinstance(x, Tensor) and x.dim() else 1
        name = self._name
        if size is None:
            raise ValueError("size: got None and no data, expected the number of data to generate")
        check_rows(x, size, subsample_size, self._arguments["event_shape"])
        context = check_context(self.denoiser, context, size)
        plate = pyro.plate(f"{name}_plate", size, subsample_size=subsample_size)
        # Around the plate, not inside: initial values are drawn before the reparameterizer sees a site.
        with poutine.reparam(config={name: ChainReparam()}), plate as index:
            rows = None if x is None else x[index]
            diffusion = self.diffusion({k: v[index] for k, v in context.items()})
            return pyro.sample(name, diffusion, obs=rows)


class _Guide(PyroModule):
    """Forward process over the same plate; it has no parameters of its own."""

    def __init__(self, model: _Model) -> None:
        super().__init__()
        # In a tuple, so that the model's parameters are not the guide's too.
        self._model = (model,)

    def forward(
        self,
        x: Tensor,
        *,
        size: int | None = None,
        subsample_size: int | None = None,
        **context: Tensor,
    ) -> None:
        (model,) = self._model
        check_rows(
            x,
            len(x) if isinstance(x, Tensor) and x.dim() else 1,
            subsample_size,
            model._arguments["event_shape"],
        )
        with pyro.plate(f"{model._name}_plate", len(x), subsample_size=subsample_size) as index:
            forward_chain(model._name, model.diffusion({}), x[index])


class DDPM:
    r"""The hierarchical variational autoencoder behind a diffusion model, every latent a Pyro site.

    ``model`` has sites ``x_t{K} ... x_t0`` and the data site ``x``, ``guide`` the forward process over
    the same latents, both inside one plate ``x_plate``. They take ``(x, subsample_size=None,
    **context)``, with one row of the context per datum; the model without data takes ``size`` and
    generates. All of Pyro's inference applies unmodified. To *train* a long chain, one
    :class:`~pyro_diffusion.distributions.Diffusion` site has the same expected gradient at one network
    evaluation per datum instead of K + 1.

    Args:
        denoiser: posterior p(x_0 | x_t); it is the model's only parameterized part.
        event_shape: shape of one datum.
        steps: number K of reverse steps.
        name: name of the data site.
        arguments: further arguments of :class:`~pyro_diffusion.distributions.Diffusion`
            (``times``, ``decoder``).

    Raises:
        ValueError: for bad arguments; at a call, for a context without exactly one row per datum.

    Example:
        >>> import torch
        >>> from pyro.infer import TraceMeanField_ELBO
        >>> from pyro_diffusion.denoisers import GaussianDenoiser
        >>> from pyro_diffusion.nn import MLP
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> ddpm = DDPM(GaussianDenoiser(MLP(2), GaussianProcess(Cosine())), (2,), steps=4)
        >>> loss = TraceMeanField_ELBO().loss(ddpm.model, ddpm.guide, torch.zeros(3, 2))

    References:
        Ho et al., arXiv 2006.11239; Sohl-Dickstein et al., arXiv 1503.03585.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        event_shape: Shape,
        steps: int = 1000,
        name: str = "x",
        **arguments: Any,
    ) -> None:
        arguments = {"event_shape": event_shape, "steps": steps, **arguments}
        self.model = _Model(denoiser, arguments, name)
        self.guide = _Guide(self.model)
        self.model.diffusion({})  # refuse bad arguments now, not in the first step
