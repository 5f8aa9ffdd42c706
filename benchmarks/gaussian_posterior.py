"""Linear readings of a normal prior: PiGDM and MMPS against the conjugate posterior, without a draw.

Run: python benchmarks/gaussian_posterior.py

The prior is N(m, s^2 I) with its exact denoiser; the observations A x_0 + noise are a Pyro program.
A deterministic sampler's whole way, from the process's prior through the decoder, is then affine: its offset
and matrix are found by feeding it zero and the unit vectors, and give the law of the samples to rounding.
Figures are the largest error of an entry of the mean and of the covariance, over all problems.
"""

import argparse
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import MMPS, TMPD, DiffPIR, GuidedDenoiser, PiGDM
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.samplers import DDIM, AdamsMoulton, DPMSolverPP, Sampler, simulate
from pyro_diffusion.schedules import LogLinear, uniform_log_snr
from pyro_diffusion.unwrapping import per_coordinate

Guidance = Callable[..., GuidedDenoiser]

METHODS: dict[str, Guidance] = {
    "PiGDM": PiGDM,
    "PiGDM, cg": partial(PiGDM, solver="cg"),
    "MMPS": MMPS,
    "MMPS, cg": partial(MMPS, solver="cg"),
    "MMPS, gmres": partial(MMPS, solver="gmres"),
}
APPROXIMATE: dict[str, Guidance] = {"TMPD": TMPD, "DiffPIR": DiffPIR}
WANTED = 1e-3


class Problem:
    """A random normal prior and a random linear reading of it."""

    def __init__(self, d: int, m: int) -> None:
        process = GaussianProcess(LogLinear(14.0, -20.0))
        self.mean, self.variance = torch.randn(d), float(0.2 + 1.3 * torch.rand(()))
        self.denoiser = MixtureDenoiser(process, torch.ones(1), self.mean[None], self.variance)
        self.matrix, self.noise = torch.randn(m, d) / d**0.5, 0.05 + torch.rand(m)
        x = self.mean + self.variance**0.5 * torch.randn(d)
        self.y = self.matrix @ x + self.noise * torch.randn(m)

    def model(self) -> None:
        """The program, which is all that guidance sees."""
        x = pyro.sample("x", Diffusion(self.denoiser, self.mean.shape))
        law = dist.Normal((self.matrix @ x.unsqueeze(-1)).squeeze(-1), self.noise)
        pyro.sample("y", law.to_event(1), obs=self.y)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Exact mean and covariance."""
        white = self.matrix / self.noise[:, None]
        covariance = torch.linalg.inv(torch.eye(len(self.mean)) / self.variance + white.mT @ white)
        gap = (self.y - self.matrix @ self.mean) / self.noise
        return self.mean + covariance @ white.mT @ gap, covariance

    def sampled(self, guidance: Guidance, sampler: Sampler, steps: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance of samples."""
        guided = guidance(self.denoiser, ProgramLikelihood(self.model))
        times = uniform_log_snr(self.denoiser.process.schedule, steps)
        law = Diffusion(guided, self.mean.shape, times=times, sampler=sampler)
        d = len(self.mean)
        x = torch.cat([torch.zeros(1, d), torch.eye(d)])
        last = per_coordinate(law.decode(simulate(guided, times, x, sampler)))
        matrix = (last.mean[1:] - last.mean[0]).mT
        start = guided.process.prior((d,)).variance.diag()
        return last.mean[0], matrix @ start @ matrix.mT + last.variance[0].diag()


def errors(
    problems: list[Problem], guidance: Guidance, sampler: Sampler, steps: int
) -> tuple[float, float]:
    """Largest error of an entry of the mean and of the covariance."""
    found = []
    for problem in problems:
        pairs = zip(problem.sampled(guidance, sampler, steps), problem.posterior(), strict=True)
        found.append([float((a - b).abs().max()) for a, b in pairs])
    mean, covariance = torch.tensor(found).amax(0).tolist()
    return mean, covariance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=10, help="random problems for each size")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(args.seed)
    fine = True
    print(f"{args.problems} problems a size, {args.steps} steps even in log-SNR, AdamsMoulton()")
    print(f"{'(d_x, d_y)':<11} {'method':<12} {'mean':>9} {'covariance':>11} {'wanted':>9}")
    for d, m in ((8, 1), (8, 4), (80, 4)):
        problems = [Problem(d, m) for _ in range(args.problems)]
        for name, guidance in {**METHODS, **APPROXIMATE}.items():
            exact = name in METHODS
            mean, covariance = errors(problems, guidance, AdamsMoulton(), args.steps)
            fine &= not exact or max(mean, covariance) <= WANTED
            wanted = f"<= {WANTED:g}" if exact else ""
            print(f"{(d, m)!s:<11} {name:<12} {mean:>9.1e} {covariance:>11.1e} {wanted:>9}")
    print("\nMMPS at (8, 4) with other samplers and steps (errors are those of the sampler)")
    problems = [Problem(8, 4) for _ in range(args.problems)]
    for sampler in (AdamsMoulton(), DPMSolverPP(), DDIM()):
        for steps in (25, 100, 400):
            mean, covariance = errors(problems, MMPS, sampler, steps)
            print(f"{sampler!r:<72} {steps:>4} {mean:>9.1e} {covariance:>11.1e}")
    print(f"\nevery figure as wanted: {fine}")


if __name__ == "__main__":
    main()
