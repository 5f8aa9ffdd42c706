"""Unfold one Diffusion site into the chain it stands for."""

import functools
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions import Delta, MaskedDistribution, TorchDistribution
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.runtime import InferDict
from torch import Tensor

from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.distributions.base import DenoisedDistribution
from pyro_diffusion.distributions.deferred import Deferred, unscored
from pyro_diffusion.distributions.shape_runs import shapes_only
from pyro_diffusion.samplers.divergence import DivergenceMonitor
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import Unwrapped, check_wrappers, per_coordinate, unwrap_to

__all__ = ["ChainReparam", "forward_chain", "reverse_chain"]


def site_name(name: str, j: int) -> str:
    """Name of the latent at the grid's j-th time."""
    return f"{name}_t{j}"


def _levels(diffusion: Diffusion, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    levels = diffusion.denoiser.process.levels(diffusion.times, dtype, device)
    return [levels.at(j) for j in range(len(diffusion.times))]


def _chain(fn: Any, where: str) -> Unwrapped:
    """A Diffusion and what stands around it.

    Raises:
        ValueError: for another distribution, one under ``.mask()``, discrete data under transforms, and
            transforms that are not bijective.
    """
    found = unwrap_to(fn, DenoisedDistribution)
    if found is None or found.masks or not isinstance(found.base, Diffusion):
        inner = type(per_coordinate(fn) if found is None else found.base)
        kind = MaskedDistribution if found is not None and found.masks else inner
        raise ValueError(f"{where} {kind.__name__}, expected a Diffusion")
    check_wrappers("diffusion", found)
    return found


def reverse_chain(name: str, diffusion: TorchDistribution) -> TorchDistribution:
    r"""Sample sites :math:`x_{t_K}, \dots, x_{t_0}` of the reverse model, in the enclosing program.

    Args:
        name: prefix; the site at the grid's j-th time is ``f"{name}_t{j}"``.
        diffusion: the chain, perhaps under ``to_event`` and transforms; its batch shape is that of the
            enclosing plates.

    Returns:
        p(x | x_{t_0}), of the diffusion's batch and event shape; under transforms it is the decoder's
        distribution under the same ones, whose log_prob has their Jacobian.

    Raises:
        ValueError: for another distribution, one under ``.mask()``, discrete data under transforms, and
            transforms that are not bijective.
    """
    found = _chain(diffusion, "diffusion: got")
    chain: Diffusion = found.base
    grouped = len(chain.batch_shape) - len(diffusion.batch_shape)
    process = chain.denoiser.process
    levels = _levels(chain, chain.device, chain.dtype)
    prior = process.prior(chain.event_shape, dtype=chain.dtype, device=chain.device)
    prior = prior.expand(chain.batch_shape).to_event(grouped)
    x = pyro.sample(site_name(name, chain.steps), prior)
    if shapes_only():
        return _example_chain(name, found, grouped, x)
    monitor = DivergenceMonitor(chain.denoiser)
    for j in range(chain.steps, 0, -1):
        kernel = _distribution(
            chain, x, functools.partial(_kernel, chain, x, levels[j - 1], levels[j], monitor)
        )
        x = pyro.sample(site_name(name, j - 1), kernel.to_event(grouped))
    if chain.denoiser.guided:
        monitor.check(x)
    out: TorchDistribution = found.around(
        _distribution(chain, x, functools.partial(chain.decode, x))
    )
    return out


def _kernel(
    chain: Diffusion, x: Tensor, early: Level, late: Level, monitor: DivergenceMonitor
) -> TorchDistribution:
    """p(x_s | x_t), from one network evaluation."""
    posterior = chain.posterior(x, late)
    monitor.observe(x, late, posterior)
    return chain.denoiser.process.reverse(x, posterior, early, late)


def _distribution(
    chain: Diffusion, x: Tensor, make: Callable[[], TorchDistribution]
) -> TorchDistribution:
    """What follows a state; where nobody scores it, a replay with given states need not work it out."""
    if not unscored():
        return make()
    wide, _ = chain.with_context(x)
    batch_shape = wide.shape[: wide.dim() - len(chain.event_shape)]
    return Deferred(make, batch_shape, chain.event_shape)


def _example_chain(name: str, found: Unwrapped, grouped: int, x: Tensor) -> TorchDistribution:
    """The chain's sites at their shapes, with no network evaluation but that of a kept example."""
    chain: Diffusion = found.base
    x, _ = chain.with_context(x)
    example = chain.expand(x.shape[: x.dim() - len(chain.event_shape)]).sample()
    process = chain.denoiser.process
    levels = _levels(chain, chain.device, chain.dtype)
    posterior = process.point_mass(chain.encode(example))
    for j in range(chain.steps, 0, -1):
        kernel = process.reverse(x, posterior, levels[j - 1], levels[j])
        x = pyro.sample(site_name(name, j - 1), kernel.to_event(grouped))
    out: TorchDistribution = found.around(Delta(example, event_dim=len(chain.event_shape)))
    return out


def forward_chain(
    name: str, diffusion: TorchDistribution, value: Tensor, auxiliary: bool = False
) -> None:
    r"""Sample sites of the forward process given data: the guide of :class:`ChainReparam`.

    Draws :math:`x_{t_K} \sim q(x_{t_K} | x)`, then :math:`x_{t_{j-1}} \sim q(x_{t_{j-1}} | x_{t_j}, x)`:
    the same sites in the same order as the model, with the bridge as each conditional, so that
    ``TraceMeanField_ELBO`` takes every divergence in closed form.

    Args:
        name: prefix of the sites.
        diffusion: the chain, perhaps under ``to_event`` and transforms.
        value: data, batch + event.
        auxiliary: whether the sites are marked auxiliary.

    Raises:
        ValueError: for a site without a chain of its own; for data of a wrong shape or outside the support.
    """
    found = _chain(diffusion, "diffusion: got")
    chain: Diffusion = found.base
    grouped = len(chain.batch_shape) - len(diffusion.batch_shape)
    process = chain.denoiser.process
    process.check_density()
    infer = InferDict(is_auxiliary=auxiliary)
    x0 = chain.encode(found.inverse(value))
    levels = _levels(chain, x0.device, x0.dtype if x0.is_floating_point() else chain.dtype)
    end = process.marginal(x0, levels[-1]).to_event(grouped)
    x = pyro.sample(site_name(name, chain.steps), end, infer=infer)
    for j in range(chain.steps, 0, -1):
        bridge = process.bridge(x, x0, levels[j - 1], levels[j])
        x = pyro.sample(site_name(name, j - 1), bridge.to_event(grouped), infer=infer)


class ChainReparam(Reparam):
    r"""Replace a :class:`~pyro_diffusion.distributions.Diffusion` site by its chain.

    The site ``x`` becomes ``x_t{K} ... x_t0`` (the latents) and ``x`` itself, now distributed as the
    decoder's p(x | x_{t_0}): an exact joint density in place of an estimated bound. Pair it with
    ``forward_chain`` as the guide. A discrete latent that chooses the diffusion's context may be
    enumerated in the model; the guide does without that context. Transforms around the Diffusion stay around
    the decoder, so that the density of an observed site has their Jacobian (Pyro's ``TransformReparam``
    leaves it out); the latents are at the scale before them. Not available under ``.mask()`` wrappers; use
    ``poutine.mask``.

    Example:
        >>> from pyro import poutine
        >>> from pyro_diffusion.denoisers import GaussianDenoiser
        >>> from pyro_diffusion.nn import MLP
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> prior = Diffusion(GaussianDenoiser(MLP(2), GaussianProcess(Cosine())), (2,), steps=2)
        >>> def model():
        ...     return pyro.sample("x", prior)
        >>> chain = poutine.reparam(model, config={"x": ChainReparam()})
        >>> [name for name in poutine.trace(chain).get_trace().nodes if name.startswith("x")]
        ['x_t2', 'x_t1', 'x_t0', 'x']

    References:
        Ho et al., arXiv 2006.11239; Kingma et al., arXiv 2107.00630, section 3.
    """

    def apply(self, msg: Any) -> Any:
        """Issue the chain's sites and hand back the decoder as the site's distribution.

        Raises:
            ValueError: for a site that is no chain.
        """
        _chain(msg["fn"], f"ChainReparam: site {msg['name']!r} has a")
        return {
            "fn": reverse_chain(msg["name"], msg["fn"]),
            "value": msg["value"],
            "is_observed": msg["is_observed"],
        }
