"""Draws of a guide corrected by the likelihood: C2ST, evidence and effective sample size."""

import argparse
import time
import warnings

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_diffusion import evaluate
from sbi_parts import VARIANCE, bernoulli_likelihood, bernoulli_prior, gaussian_linear
from sbi_parts.accuracy import DRAWS, accuracies, trained

POOL = 8000
LONG = 200_000


def long_evidence(x: Tensor, design: Tensor) -> tuple[float, float]:
    """Log evidence of the generalized linear model by importance sampling from a wide Laplace law."""
    prior = bernoulli_prior()

    def joint(theta: Tensor) -> Tensor:
        softplus = torch.nn.functional.softplus(theta @ design.mT)
        return prior.log_prob(theta.float()).to(theta) + theta @ x - softplus.sum(-1)

    design, x = design.double(), x.double()
    precision = prior.precision_matrix.double()
    mode = torch.zeros(10, dtype=torch.float64)
    for _ in range(50):  # Newton's steps on a concave function
        share = torch.sigmoid(design @ mode)
        hessian = precision + design.mT @ ((share * (1 - share)).unsqueeze(1) * design)
        slope = x - design.mT @ share - precision @ mode
        mode = mode + torch.linalg.solve(hessian, slope)
    law = dist.MultivariateStudentT(
        torch.tensor(10.0, dtype=torch.float64), mode, torch.linalg.cholesky(hessian.inverse())
    )
    theta = law.sample((LONG,))
    weights = joint(theta) - law.log_prob(theta)
    mean = weights.logsumexp(0) - torch.tensor(float(LONG)).log()
    error = (weights - mean).exp().std() / LONG**0.5
    return float(mean), float(error)


def main(args: argparse.Namespace) -> bool:
    """Two tasks with a likelihood, at their first observations."""
    print(
        f"\ncorrected by the likelihood: {POOL} draws of a guide of 10,000 simulations, {DRAWS} of them "
        f"without repetition by weight\n{'task':<16} {'obs':>3} {'C2ST':>6} {'corrected':>9} {'ESS %':>6} "
        f"{'k-hat':>6} {'log evidence':>19} {'reference':>19} {'min':>5}"
    )
    fine = []
    for name in [each for each in args.tasks if each != "two_moons"]:
        guide, data, _ = trained(name, 10_000, args.seeds[0], args)
        model = gaussian_linear
        if name == "bernoulli_glm":
            model = bernoulli_likelihood(data["design_matrix"])
        for i in range(args.observations):
            start = time.perf_counter()
            x, reference = data["observations"][i], data["reference_posterior_samples"][i][None]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = evaluate.importance_posterior(model, guide, x, num_samples=POOL)
            theta = found.draws["theta"]
            chosen = torch.multinomial(found.weights, DRAWS, replacement=False)
            before, after = (
                accuracies([draws], reference)[0] for draws in (theta[:DRAWS], theta[chosen])
            )
            if name == "bernoulli_glm":
                exact, error = long_evidence(x, data["design_matrix"])
            else:
                law = dist.Normal(0.0, (2 * VARIANCE) ** 0.5)
                exact, error = float(law.log_prob(x).sum()), 0.0
            estimate = found.log_evidence
            own, own_error = float(estimate.value), float(estimate.standard_error)
            share = 100 * float(estimate.ess) / POOL
            inside = abs(own - exact) <= 2 * (own_error**2 + error**2) ** 0.5
            wanted = after <= 0.53 and share >= 20 and inside
            print(
                f"{name:<16} {i:>3} {before:>6.3f} {after:>9.3f} {share:>6.1f} {float(estimate.khat):>6.2f} "
                f"{own:>10.3f} +- {own_error:.3f} {exact:>10.3f} +- {error:.3f} "
                f"{(time.perf_counter() - start) / 60:>5.1f}  as wanted: {wanted}",
                flush=True,
            )
            fine.append(wanted)
    return all(fine)
