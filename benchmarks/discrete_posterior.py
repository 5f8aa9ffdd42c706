"""Posteriors of symbols: masked and uniform chains given a noisy reading, against enumeration.

Run: python benchmarks/discrete_posterior.py

A known joint over all 81 sequences of length 4 from 3 letters is the prior, its exact per-letter posterior
the denoiser; a Pyro program misreads every letter now and then. Twisted SMC walks many filters side by side.
Printed per process and guidance: log of the mean evidence beside that of the chain and of the data (nats),
the relative spread of one filter's evidence, the total variation between all particles and the exact
posterior beside what as many exact draws have, and the p-value of a chi-square test on one draw of every
filter.

The truth for a filter is the *chain's* law, multiplied out over all states. It nears the data's with steps.
"""

import argparse
import math
import time

import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from torch import Tensor

from pyro_diffusion.denoisers import TableDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import SampledGuidance, SubstitutionGuidance
from pyro_diffusion.infer import TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import Absorbing, Uniform
from pyro_diffusion.schedules import Rectified
from pyro_diffusion.unwrapping import per_coordinate

LENGTH, STATES, RIGHT = 4, 3, 0.7
READ = torch.tensor([0, 2, 1, 1])


def chain_law(law: Diffusion) -> Tensor:
    """The chain's own probability of every sequence."""
    denoiser, process, times = law.denoiser, law.denoiser.process, law.times
    states = torch.cartesian_prod(*[torch.arange(len(process.noise))] * LENGTH)
    mass = process.prior((LENGTH,), dtype=torch.float64).log_prob(states).exp()
    for j in range(law.steps, -1, -1):
        kernel, targets = denoiser(states, times[j]), denoiser.sequences
        if j:
            kernel, targets = process.reverse(states, kernel, times[j - 1], times[j]), states
        probs = per_coordinate(kernel).probs
        mass = mass @ math.prod(probs[:, i, targets[:, i]] for i in range(LENGTH))
    return mass


def reading(law: Diffusion, count: int) -> ProgramLikelihood:
    """The program: ``count`` sequences, all of one reading, so that each filter answers the same question."""
    off = (1 - RIGHT) / (STATES - 1)
    confusion = torch.full((STATES, STATES), off) + (RIGHT - off) * torch.eye(STATES)

    def model() -> None:
        with pyro.plate("data", count):
            x = pyro.sample("x", law)
            y = dist.Categorical(confusion[x.long()]).to_event(1)
            pyro.sample("y", y, obs=READ.expand(count, LENGTH))

    return ProgramLikelihood(model)


def chi_square(counts: Tensor, probs: Tensor) -> float:
    """The p-value of one draw per filter; cells that expect fewer than five are put together."""
    expected = probs * counts.sum()
    small = expected < 5
    groups = [
        torch.cat([v[~small], v[small].sum().reshape(-1)]).numpy() for v in (counts, expected)
    ]
    return float(stats.chisquare(*groups).pvalue)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filters", type=int, default=1000)
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 12])
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    joint = torch.rand((STATES,) * LENGTH).square()
    places = STATES ** torch.arange(LENGTH - 1, -1, -1)
    print(f"{args.filters} filters of {args.particles} particles; {STATES**LENGTH} sequences")
    print(
        f"{'process':>10} {'steps':>6} {'guidance':>21} {'log Z':>9} {'+-':>7} {'chain':>9} {'data':>9}"
        f" {'sd Z/Z':>7} {'TV':>7} {'floor':>7} {'chi2 p':>7} {'s':>6}"
    )
    fine = True
    for kind in (Absorbing, Uniform):
        denoiser = TableDenoiser(kind(Rectified.full(), STATES), joint)
        for steps in args.steps:
            law = Diffusion(denoiser, (LENGTH,), steps=steps)
            likelihood = reading(law, args.filters)
            rows = denoiser.sequences[:, None].expand(-1, args.filters, -1)
            given = likelihood.log_prob(rows)[:, 0].exp()
            tilted = chain_law(law) * given
            exact, posterior = tilted.sum(), tilted / tilted.sum()
            data = (denoiser.log_joint.exp() * given).sum()
            for guidance in (SubstitutionGuidance, SampledGuidance):
                start = time.perf_counter()
                done = TwistedSMC(law, likelihood, guidance, args.particles).run()
                seconds = time.perf_counter() - start
                ratio = (done.log_evidence_terms - exact.log()).exp()
                error = ratio.std() / args.filters**0.5
                index = (done.value.long() * places).sum(-1)
                found = torch.zeros(len(posterior))
                found.scatter_add_(0, index.flatten(), done.log_weights.exp().flatten())
                variation = float((found / args.filters - posterior).abs().sum() / 2)
                count = args.filters * args.particles
                draws = torch.multinomial(posterior, count, replacement=True)
                drawn = torch.bincount(draws, minlength=len(posterior)) / count
                floor = float((drawn - posterior).abs().sum() / 2)
                one = (done.sample(()).long() * places).sum(-1)
                p = chi_square(torch.bincount(one, minlength=len(posterior)), posterior)
                fine &= p > 1e-3 and bool(abs(ratio.mean() - 1) < 4 * error)
                print(
                    f"{kind.__name__:>10} {steps:>6} {guidance.__name__:>21}"
                    f" {float(ratio.mean().log() + exact.log()):>9.4f} {float(error):>7.4f}"
                    f" {float(exact.log()):>9.4f} {float(data.log()):>9.4f} {float(ratio.std()):>7.3f}"
                    f" {variation:>7.4f} {floor:>7.4f} {p:>7.3f} {seconds:>6.1f}"
                )
    print(f"\nposteriors and evidence as by enumeration (chi-square p > 0.001, 4 errors): {fine}")


if __name__ == "__main__":
    main()
