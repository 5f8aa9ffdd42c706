"""Draws of a guide corrected by the likelihood: C2ST, evidence and effective sample size."""

import argparse
import dataclasses
import time
import warnings
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_diffusion import evaluate
from pyro_diffusion.estimate import LogLikelihoodEstimate
from pyro_diffusion.evaluate.importance import from_log_weights
from pyro_diffusion.infer import AutoAmortized
from sbi_parts import VARIANCE, bernoulli_likelihood, bernoulli_prior, gaussian_linear
from sbi_parts.accuracy import accuracies
from sbi_parts.cells import DRAWS, trained

CHUNK = 5000
LARGEST = 20  # chunks
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


def pool(
    model: Callable[..., None], guide: AutoAmortized, x: Tensor
) -> tuple[Tensor, Tensor, LogLikelihoodEstimate]:
    """Weighted draws, as many as it takes that none is expected more than once in `DRAWS` of them."""
    theta, log_weights, left = [], [], 0.0
    for _ in range(LARGEST):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = evaluate.importance_posterior(model, guide, x, num_samples=CHUNK)
        theta.append(found.draws["theta"])
        log_weights.append(found.log_weights)
        left = max(left, found.solver_error)
        weights = torch.cat(log_weights).softmax(0)
        if DRAWS * float(weights.max()) <= 1:
            break
    estimate = from_log_weights(torch.cat(log_weights).unsqueeze(1), 0, 1)
    error = (estimate.standard_error.square() + left**2).sqrt()
    return torch.cat(theta), weights, dataclasses.replace(estimate, standard_error=error)


def resampled(weights: Tensor) -> Tensor:
    """Which of the pool are drawn, by weight: systematic, so that none is twice unless expected so."""
    order = torch.randperm(len(weights))  # neighbours of the pool are no pairs of the sample
    ends = weights[order].cumsum(0)
    places = (torch.rand(1, dtype=ends.dtype) + torch.arange(DRAWS)) / DRAWS
    return order[torch.searchsorted(ends, places * ends[-1]).clamp(max=len(ends) - 1)]


def reference_evidence(name: str, x: Tensor, data: dict[str, Tensor]) -> tuple[float, float]:
    """Log evidence in closed form, or by many draws, with its error."""
    if name == "bernoulli_glm":
        return long_evidence(x, data["design_matrix"])
    return float(dist.Normal(0.0, (2 * VARIANCE) ** 0.5).log_prob(x).sum()), 0.0


def main(args: argparse.Namespace) -> bool:
    """Two tasks with a likelihood, at their first observations."""
    print(
        f"\ncorrected by the likelihood: {DRAWS} draws by weight, of a pool of a guide of 10,000 "
        f"simulations\n{'task':<16} {'obs':>3} {'C2ST':>6} {'corrected':>9} {'pool':>6} {'twice':>5} "
        f"{'ESS %':>6} {'k-hat':>6} {'log evidence':>19} {'reference':>19} {'s':>6}"
    )
    fine = []
    for name in [each for each in args.tasks if each != "two_moons"]:
        guide, data, _ = trained(name, 10_000, args.seeds[0], args)
        model = gaussian_linear
        if name == "bernoulli_glm":
            model = bernoulli_likelihood(data["design_matrix"])
        for i in range(1 if args.quick else args.observations):
            start = time.perf_counter()
            x, reference = data["observations"][i], data["reference_posterior_samples"][i][None]
            theta, weights, estimate = pool(model, guide, x)
            chosen = resampled(weights)
            before, after = (
                accuracies([draws], reference)[0] for draws in (theta[:DRAWS], theta[chosen])
            )
            exact, error = reference_evidence(name, x, data)
            own, own_error = float(estimate.value), float(estimate.standard_error)
            share = 100 * float(estimate.ess) / len(theta)
            inside = abs(own - exact) <= 2 * (own_error**2 + error**2) ** 0.5
            wanted = after <= 0.53 and share >= 20 and inside
            print(
                f"{name:<16} {i:>3} {before:>6.3f} {after:>9.3f} {len(theta):>6} "
                f"{DRAWS - len(chosen.unique()):>5} {share:>6.1f} {float(estimate.khat):>6.2f} "
                f"{own:>10.3f} +- {own_error:.3f} {exact:>10.3f} +- {error:.3f} "
                f"{time.perf_counter() - start:>6.1f}  as wanted: {wanted}",
                flush=True,
            )
            fine.append(wanted)
    return all(fine)
