"""Particle Gibbs: a diffusion site and the other latents of a program, sampled jointly."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import NUTS
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.distributions.base import DenoisedDistribution
from pyro_diffusion.guidance.base import Guidance, check_guidance
from pyro_diffusion.infer.filtering.twisted_smc import TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.unwrapping import unwrap_to
from pyro_diffusion.validation import check_positive_int

__all__ = ["ParticleGibbs"]


class ParticleGibbs(MCMCKernel):
    r"""A Markov kernel on all latents of a program with one diffusion site, for Pyro's ``MCMC``.

    A sweep is two updates, each leaving the joint posterior invariant:

    1. the diffusion site, by conditional twisted SMC on its whole chain given the other latents (see
       :class:`~pyro_diffusion.infer.filtering.conditional_filter.ConditionalFilter`);
    2. the others given the site, by a Pyro kernel (NUTS) on the program with the site's value held.

    Exact for the chain's distribution in the limit of many sweeps, for any number of particles and any
    guidance; more particles make sweeps less alike. The diffusion must not depend on the other latents.

    A sweep costs num_particles * (K + 1) network evaluations; the other kernel takes none.

    Args:
        model: a Pyro program.
        site: name of the diffusion site; may be left out if there is one.
        guidance: see :class:`~pyro_diffusion.infer.TwistedSMC`.
        num_particles: N >= 2 of every sweep.
        ess_threshold: resample when the effective sample size falls below this share of N.
        others: ``others(model)``, the kernel of the other latents; Pyro's NUTS by default.
        others_steps: how many of its steps a sweep takes.

    Raises:
        ValueError: naming the argument; at :meth:`setup` for a program without a diffusion site, with
            several, or with one that depends on other latents.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import MCMC
        >>> from pyro_diffusion.denoisers import MixtureDenoiser
        >>> from pyro_diffusion.distributions import Diffusion
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> denoiser = MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(1), torch.zeros(1, 2), 1.0)
        >>> prior = Diffusion(denoiser, event_shape=(2,), steps=5)
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)
        >>> mcmc = MCMC(ParticleGibbs(model, num_particles=8), 3, 2, disable_progbar=True)
        >>> mcmc.run(torch.ones(2))
        >>> {name: tuple(draws.shape) for name, draws in sorted(mcmc.get_samples().items())}
        {'scale': (3,), 'x': (3, 2)}

    References:
        Andrieu, Doucet & Holenstein, Particle Markov chain Monte Carlo methods, JRSS B 72 (2010).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        site: str | None = None,
        guidance: Guidance | None = None,
        num_particles: int = 32,
        ess_threshold: float = 0.5,
        others: Callable[[Callable[..., Any]], MCMCKernel] = NUTS,
        others_steps: int = 1,
    ) -> None:
        if not callable(model):
            raise ValueError(f"model: got {type(model).__name__}, expected a Pyro program")
        if guidance is not None:
            check_guidance(guidance)
        check_positive_int("num_particles", num_particles, at_least=2)
        self.model, self.site, self.guidance = model, site, guidance
        self.others_steps = check_positive_int("others_steps", others_steps)
        self._options: dict[str, Any] = {
            "num_particles": num_particles,
            "ess_threshold": ess_threshold,
        }
        self._build_others = others
        self.others: MCMCKernel | None = None
        self._updates = self._sweeps = 0

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Run the program once, set the other kernel up, and draw a first path by an ordinary filter."""
        name, latents = self._first_run(args, kwargs)
        self.name = name
        self._likelihood = ProgramLikelihood(self.model, args, kwargs, site=name, latents=latents)
        self._reference: list[Tensor] | None = None
        self.others = None
        if latents:
            self._check_apart(args, kwargs, latents)
            self.others = self._build_others(self._given)
            self.others.setup(warmup_steps, *args, **kwargs)
        self.initial_params = {
            **(self.others.initial_params if self.others else {}),
            name: self._update({} if self.others is None else self.others.initial_params),
        }

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One sweep, from and to unconstrained values (the site's own is its value)."""
        others = {k: v for k, v in params.items() if k != self.name}
        before, self._value = params[self.name], self._update(others)
        self._sweeps += 1
        self._updates += int(not torch.equal(before, self._value))
        if self.others is not None:
            if hasattr(self.others, "clear_cache"):
                self.others.clear_cache()  # its potential was that of the old x
            for _ in range(self.others_steps):
                others = self.others.sample(others)
        return {**others, self.name: self._value}

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Where the chain starts."""
        return self._initial_params

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._initial_params = params

    @property
    def transforms(self) -> dict[str, Any]:
        """From constrained to unconstrained, of the other latents."""
        return dict(getattr(self.others, "transforms", None) or {})

    def end_warmup(self) -> None:
        """Tell the other kernel."""
        if self.others is not None:
            self.others.end_warmup()

    def logging(self) -> dict[str, str]:
        """The other kernel's line, and how often the site was updated."""
        own = {"update rate": f"{self._updates / max(self._sweeps, 1):.2f}"}
        return {**((self.others and self.others.logging()) or {}), **own}

    def diagnostics(self) -> dict[str, Any]:
        """The other kernel's, and the share of sweeps that changed the site."""
        own = {"update rate": self._updates / max(self._sweeps, 1)}
        # Pyro's kernels forget theirs once they are cleaned up.
        others = {} if self.others is None or self._reference is None else self.others.diagnostics()
        return {**others, **own}

    def cleanup(self) -> None:
        """Forget the path."""
        self._reference = None
        if self.others is not None:
            self.others.cleanup()

    def _update(self, others: dict[str, Tensor]) -> Tensor:
        """A path given the other latents, drawn around the last one; the site's new value."""
        given = {
            k: self.transforms[k].inv(v) if k in self.transforms else v for k, v in others.items()
        }
        likelihood = self._likelihood.with_latents({k: v.detach() for k, v in given.items()})
        smc = TwistedSMC(likelihood.prior, likelihood, self.guidance, **self._options)
        self._reference = smc.sweep(self._reference)
        return likelihood.site_value(smc.chain.encoded(self._reference[-1])).detach()

    def _given(self, *args: Any, **kwargs: Any) -> Any:
        """The program with the site's value held, and without its density."""
        with _Hold(self.name, self._value):
            return self.model(*args, **kwargs)

    def _first_run(self, args: Any, kwargs: Any) -> tuple[str, dict[str, Tensor]]:
        """The diffusion site's name and values of the other latents, drawn from the program."""
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        free = {k: v for k, v in trace.nodes.items() if _is_latent(v)}
        sites = [k for k, v in free.items() if unwrap_to(v["fn"], DenoisedDistribution) is not None]
        name = self.site if self.site is not None else sites[0] if len(sites) == 1 else None
        if name is None or name not in sites or len(sites) > 1:
            raise ValueError(
                f"site: got {self.site!r} and the diffusion sites {sites}, expected one that is not observed "
                "(condition the model on all others)"
            )
        values: dict[str, Any] = {k: v["value"] for k, v in free.items()}
        self._value = values.pop(name)
        return name, values

    def _check_apart(self, args: Any, kwargs: Any, latents: dict[str, Tensor]) -> None:
        """Refuse a diffusion that is a function of the other latents."""
        leaves = {
            k: v.clone().requires_grad_() if v.is_floating_point() else v
            for k, v in latents.items()
        }
        with (
            torch.enable_grad(),
            poutine.block(),
            _Hold(self.name, self._value) as hold,
            poutine.condition(data=leaves),
        ):
            self.model(*args, **kwargs)
        found = unwrap_to(hold.distribution, DenoisedDistribution)
        assert found is not None
        value = torch.zeros(self._likelihood.event_shape, dtype=self._likelihood.prior.dtype)
        for transform in found.transforms:
            value = transform(value)
        parts = [value, *found.base.context.values()]
        roots = [v for v in leaves.values() if v.requires_grad]
        graphs = [part.sum() for part in parts if part.requires_grad]
        reached = [torch.autograd.grad(g, roots, allow_unused=True) for g in graphs if roots]
        if any(gradient is not None for some in reached for gradient in some):
            raise ValueError(
                f"site {self.name!r}: got a diffusion that depends on {', '.join(latents)}, expected one "
                "that does not (its density would be part of their posterior, and it has only a bound)"
            )


class _Hold(Messenger):
    """Gives a site a value and takes its density away."""

    def __init__(self, name: str, value: Tensor) -> None:
        super().__init__()
        self.name, self.value = name, value
        self.distribution: Any = None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            self.distribution = msg["fn"]
            msg["fn"] = Delta(
                self.value, event_dim=self.distribution.event_dim, validate_args=False
            )
            msg["value"], msg["is_observed"] = self.value, True


def _is_latent(node: Any) -> bool:
    return node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)
