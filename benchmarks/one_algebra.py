"""One algebra: the one-site estimate beside stock ELBOs on the chain spelled out.

Run: python benchmarks/one_algebra.py

Both sides estimate one number, the mean bound of a few data, with exact denoisers of known laws. The chain
is scored by Pyro's own ELBOs, with vectorized particles; the second table runs the rest of Pyro's inference
over the same model and guide, unmodified.
"""

import argparse
import math
import warnings
from collections.abc import Callable
from functools import partial

import pyro
import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    SVI,
    Importance,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser, MixtureDenoiser, TableDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.infer import DDPM
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import Absorbing, GaussianProcess, Uniform
from pyro_diffusion.schedules import LogLinear, Rectified

STEPS, BLOCKS = 10, 40


def systems() -> dict[str, tuple[Denoiser, tuple[int, ...], Tensor, type[ELBO]]]:
    means = torch.randn(25, 2)
    gaussian = GaussianProcess(LogLinear(7, -9))
    mixture = MixtureDenoiser(gaussian, torch.ones(25), means, 0.05)
    certain = MixtureDenoiser(gaussian, torch.ones(25), means, 0.05, point_mass=True)
    joint, words = torch.rand((3,) * 4).square(), torch.randint(3, (8, 4))
    masked = TableDenoiser(Absorbing(Rectified.full(), 3), joint)
    uniform = TableDenoiser(Uniform(Rectified.full(), 3), joint)
    points = mixture.data().sample((8,))
    return {
        "Gaussian, with variance": (mixture, (2,), points, TraceMeanField_ELBO),
        "Gaussian, point mass": (certain, (2,), points, TraceMeanField_ELBO),
        "categorical, absorbing": (masked, (4,), words, Trace_ELBO),
        "categorical, uniform": (uniform, (4,), words, Trace_ELBO),
    }


def estimate(block: Callable[[], float]) -> tuple[float, float]:
    values = torch.tensor([block() for _ in range(BLOCKS)])
    return float(values.mean()), float(values.std() / math.sqrt(BLOCKS))


def one_site(denoiser: Denoiser, event_shape: tuple[int, ...], x: Tensor, copies: int) -> float:
    law = Diffusion(denoiser, event_shape, steps=STEPS)
    return float(law.log_prob(x.expand(copies, *x.shape)).mean())


def chain(elbo: type[ELBO], ddpm: DDPM, x: Tensor, copies: int) -> float:
    particles = elbo(copies, max_plate_nesting=1, vectorize_particles=True)
    with torch.no_grad():
        return -particles.loss(ddpm.model, ddpm.guide, x) / len(x)


def algebra(copies: int) -> bool:
    print(f"bound of 8 data on a chain of {STEPS} steps, nats per datum")
    print(f"{'process':<25} {'one site':>10} {'s.e.':>8} {'stock ELBO':>11} {'s.e.':>8}", end="")
    print(f" {'apart, s.e.':>11} {'s.e. / value':>12}")
    fine = True
    for name, (denoiser, event_shape, x, elbo) in systems().items():
        ddpm = DDPM(denoiser, event_shape, steps=STEPS)
        a, ea = estimate(partial(one_site, denoiser, event_shape, x, copies))
        b, eb = estimate(partial(chain, elbo, ddpm, x, copies))
        apart = abs(a - b) / math.hypot(ea, eb)
        relative = max(ea, eb) / abs(b)
        fine &= apart <= 3 and relative < 0.002
        print(
            f"{name:<25} {a:>10.4f} {ea:>8.4f} {b:>11.4f} {eb:>8.4f} {apart:>11.2f} {relative:>11.2%}"
        )
    return fine


def trained(local: bool, x: Tensor) -> tuple[float, float]:
    """Loss before and after a few steps on the spelled-out chain, in either parameter mode."""
    with pyro.settings.context(module_local_params=local):
        pyro.clear_param_store()
        network = MLP(2, hidden=(32, 32)).double()
        ddpm = DDPM(GaussianDenoiser(network, GaussianProcess(LogLinear(7, -9))), (2,), STEPS)
        elbo = TraceMeanField_ELBO(64, max_plate_nesting=1, vectorize_particles=True)
        before = elbo.loss(ddpm.model, ddpm.guide, x)
        if local:
            loss = elbo(ddpm.model, ddpm.guide)
            optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
            for _ in range(30):
                optimizer.zero_grad()
                loss(x).backward()
                optimizer.step()
        else:
            svi = SVI(ddpm.model, ddpm.guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
            for _ in range(30):
                svi.step(x)
        return before / len(x), elbo.loss(ddpm.model, ddpm.guide, x) / len(x)


def machinery() -> None:
    denoiser, event_shape, x, _ = systems()["Gaussian, with variance"]
    ddpm = DDPM(denoiser, event_shape, steps=STEPS)
    model, guide = ddpm.model, ddpm.guide
    print("\nPyro's own inference on model and guide, unmodified")
    print("minus log p of the chain, nats per datum; bounds, then importance-weighted")
    for elbo in (
        Trace_ELBO(500, max_plate_nesting=1, vectorize_particles=True),
        TraceMeanField_ELBO(500, max_plate_nesting=1, vectorize_particles=True),
    ):
        print(f"  {type(elbo).__name__:<28} {elbo.loss(model, guide, x) / len(x):.3f}")
    batches = [Trace_ELBO().loss(model, guide, x, subsample_size=4) / len(x) for _ in range(400)]
    print(f"  {'plate subsampling 4 of 8':<28} {sum(batches) / len(batches):.3f}")
    renyi = RenyiELBO(0, num_particles=500, max_plate_nesting=1, vectorize_particles=True)
    print(f"  {'RenyiELBO':<28} {renyi.loss(model, guide, x) / len(x):.3f}")
    posterior = Importance(model, guide, num_samples=200).run(x)
    print(f"  {'Importance':<28} {-float(posterior.get_log_normalizer()) / len(x):.3f}")
    draws = Predictive(model, num_samples=500, parallel=True)(size=8)["x"]
    means = [", ".join(f"{v:.3f}" for v in m) for m in (draws.mean((0, 1)), denoiser.means.mean(0))]
    print(f"  {'Predictive':<28} mean {means[0]} (data law {means[1]})")
    trace = poutine.trace(guide).get_trace(x)
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace(x)
    same = torch.equal(replayed.nodes["x_t5"]["value"], trace.nodes["x_t5"]["value"])
    print(f"  {'replay keeps the latents':<28} {same}")
    fixed = poutine.condition(model, data={"x_t0": x})
    held = poutine.trace(fixed).get_trace(size=8).nodes["x_t0"]
    print(f"  {'condition fixes a latent':<28} {torch.equal(held['value'], x)}")
    for local in (False, True):
        before, after = trained(local, x)
        print(f"  {f'module_local_params={local}':<28} trains {before:.1f} -> {after:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=4000, help="copies of the data a block")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    fine = algebra(args.copies)
    with warnings.catch_warnings():
        # The point of the first table is that sites match; Pyro warns where KLs are not closed form.
        warnings.simplefilter("default")
        machinery()
    print(f"\none site = stock ELBO within 3 s.e., s.e. below 0.2%: {fine}")


if __name__ == "__main__":
    main()
