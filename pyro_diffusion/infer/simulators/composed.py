"""The posterior of many independent observations, from a guide trained on single ones."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.denoisers import ComposedDenoiser, Denoiser, NormalDenoiser
from pyro_diffusion.distributions import ProbabilityFlow
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.dynamics.ode_solver import check_ode_solver
from pyro_diffusion.infer.simulators.auto_amortized import AutoAmortized
from pyro_diffusion.infer.simulators.auto_ensemble import AutoEnsemble
from pyro_diffusion.infer.simulators.conditional_posterior import CONTEXT
from pyro_diffusion.infer.simulators.packed import pack, unpack
from pyro_diffusion.infer.simulators.prior_normal import normal_prior
from pyro_diffusion.infer.simulators.simulated_latents import Values
from pyro_diffusion.infer.simulators.truncation import draw_prior
from pyro_diffusion.validation import check_positive_int, kind_of

__all__ = ["ComposedPosterior"]

PRIOR_DRAWS = 10_000
AT_ONCE = 10_000  # rows of the network, every draw with every observation: more leave the cache


class ComposedPosterior:
    r"""The posterior of n observations that are independent given the latents, by composed scores.

    The guide was trained on single observations; the posteriors given each are multiplied,
    :math:`p(\theta | x_{1 \dots n}) \propto p(\theta)^{1 - n} \prod_i p(\theta | x_i)`, at all noise
    levels by :class:`~pyro_diffusion.denoisers.ComposedDenoiser`, whose covariances are those of draws given
    each observation, from noise of exactly zero mean and unit covariance. *Approximate*: exact, up to the
    solver's tolerance, for a right guide whose posteriors and prior are normal in unconstrained space; errors
    of the guide add up over observations. A guide trained on sets (a plate for
    the data, ``AutoAmortized``) has no such error, and costs simulations of whole sets.

    The prior is that of the latents in unconstrained space: exact where all of them are independent
    ``Normal``, ``LogNormal``, ``Uniform`` or ``MultivariateNormal`` of fixed parameters; otherwise the normal
    of the mean and covariance of 10,000 draws, an approximation whose error counts n - 1 times. For such
    priors give a ``prior``: a denoiser of the latents' ``standardized`` draws.

    Args:
        guide: trained on single observations, without plates of rows.
        observations: (n,) + shape of every observed site, by name.
        args: the model's.
        prior: a denoiser of the standardized, unconstrained prior, under the process of the guide's denoiser.
        num_draws: given each observation, that covariances are taken from.
        solver: of the probability flow; that of the guide by default.
        kwargs: the model's.

    Attributes:
        denoiser: p(z_0 | z_t, all observations) of the standardized, unconstrained latents z, one vector. Use
            it in a chain (``Diffusion(posterior.denoiser, (size,))``) or in twisted SMC.
        normal: whether the prior is known to be normal.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x=None):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> guide = AutoAmortized(model, observed=["x"])
        >>> simulations = guide.simulate(100)  # and training
        >>> posterior = ComposedPosterior(guide, {"x": torch.tensor([0.2, 1.0, -0.3])})
        >>> posterior.draw(10)["mean"].shape
        torch.Size([10])

    References:
        Geffner, Papamakarios & Mnih, arXiv 2209.14249; Linhart et al., arXiv 2404.07593.
    """

    @torch.no_grad()
    def __init__(
        self,
        guide: AutoAmortized,
        observations: Mapping[str, Tensor],
        *args: Any,
        prior: Denoiser | None = None,
        num_draws: int = 200,
        solver: ODESolver | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(guide, AutoAmortized) or isinstance(guide, AutoEnsemble):
            raise ValueError(f"guide: got {kind_of(guide)}, expected an AutoAmortized")
        posterior = guide._ready("ComposedPosterior")
        simulator = guide._prepare(args, kwargs)
        if guide.in_levels:
            raise ValueError(
                "guide: got one with plates of rows, expected one trained on single observations"
            )
        data, batch = guide._data_of(observations)
        if len(batch) != 1:
            raise ValueError(
                f"observations: got a batch of {tuple(batch)}, expected (n,), one row for each observation"
            )
        check_positive_int("num_draws", num_draws, at_least=2)
        self.guide = guide
        self._solver = guide._solver if solver is None else check_ode_solver(solver)
        size = posterior.latent_size
        if num_draws <= 2 * size:
            raise ValueError(f"num_draws: got {num_draws}, expected more than {2 * size}")
        given = guide._posterior(data, batch, batch).base_dist
        covariances = _covariances(given.decode(_even_noise(num_draws, size, given)))
        found = normal_prior(guide, args, kwargs)
        self.normal = found is not None
        if found is None:
            draws = draw_prior(simulator, PRIOR_DRAWS, args, kwargs)
            free = pack(guide, draws, torch.Size([PRIOR_DRAWS])).double()
            found = free.mean(0), _covariances(free.unsqueeze(1))[0]
        loc, scale = posterior.latents.loc, posterior.latents.scale
        mean = ((found[0] - loc) / scale).to(loc)
        covariance = (found[1] / scale / scale.unsqueeze(1)).to(loc)
        process = posterior.denoiser.process
        self.denoiser = ComposedDenoiser(
            posterior.denoiser,
            {CONTEXT: posterior.context(data, batch)},
            covariances.to(loc),
            NormalDenoiser(process, mean, covariance) if prior is None else prior,
            covariance,
        )

    def standardized(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Values of the latents as the denoiser has them, batch + (size,): unconstrained, one vector."""
        name, site = next(iter(self.guide._latent_sites().items()))
        value = latents[name]
        batch = value.shape[: value.dim() - len(site.shape)]
        posterior: Any = self.guide.posterior
        out: Tensor = posterior.latents(pack(self.guide, latents, batch))
        return out

    def values(self, standardized: Tensor) -> Values:
        """The inverse of :meth:`standardized`."""
        scale: Any = self.guide.posterior.latents
        return unpack(self.guide, standardized * scale.scale + scale.loc)

    @torch.no_grad()
    def draw(self, num_samples: int) -> Values:
        """Draws by the probability flow, (num_samples,) + the shape of each latent."""
        check_positive_int("num_samples", num_samples)
        size = self.denoiser.precisions.shape[-1]
        flow = ProbabilityFlow(self.denoiser, (size,), solver=self._solver)
        block = max(AT_ONCE // len(self.denoiser.precisions), 1)
        blocks = [min(block, num_samples - i) for i in range(0, num_samples, block)]
        return self.values(torch.cat([flow.sample(torch.Size([count])) for count in blocks]))


def _even_noise(count: int, size: int, flow: ProbabilityFlow) -> Tensor:
    """Standard normal draws of exactly zero mean and unit covariance, the same for all of a flow's batch.

    The flow to a normal is linear: its draws then have the very covariance. An error of independent draws,
    10% of a variance with 200, would count for every observation, and tell of more than weak ones do.
    """
    noise = flow.base_dist.sample(torch.Size([count]))
    one = noise.reshape(count, -1, size)[:, 0].double()
    centred = one - one.mean(0)
    root = torch.linalg.cholesky(centred.mT @ centred / (count - 1))
    even = torch.linalg.solve_triangular(root, centred.mT, upper=False).mT.to(noise)
    return even.reshape(count, *(1,) * (noise.dim() - 2), size).expand(noise.shape)


def _covariances(draws: Tensor) -> Tensor:
    """Covariances of draws, (n, batch, size) -> (batch, size, size)."""
    centred = (draws - draws.mean(0)).double()
    return torch.einsum("n...d,n...e->...de", centred, centred) / (len(draws) - 1)
