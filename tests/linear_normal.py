"""Independent normals under a process of scales that differ by coordinate, in closed form.

Nothing here is the package's: levels, conditionals, chains and posteriors are written from their definitions,
for the process and the data of :mod:`per_coordinate`.
"""

import math

import torch
from per_coordinate import F64, GROWTHS, MEAN, RATES, SHIFTS, VARIANCE

M = torch.tensor(MEAN, dtype=F64)
A = torch.tensor([[1.0, 0.5], [-0.4, 1.2]], dtype=F64)
Y, TAU = torch.tensor([1.5, 0.3], dtype=F64), 0.4


def scales(t):
    """alpha and sigma at times of any shape, + (2,)."""
    t = torch.as_tensor(t, dtype=F64).unsqueeze(-1)
    rate, shift, growth = (torch.tensor(v, dtype=F64) for v in (RATES, SHIFTS, GROWTHS))
    log_snr = rate * (10 - 20 * t) + shift
    gain = (growth * t).exp()
    return gain / (1 + (-log_snr).exp()).sqrt(), gain / (1 + log_snr.exp()).sqrt()


def posterior(xt, t):
    """Mean and variances of x_0 given x_t, by Bayes' rule."""
    alpha, sigma = scales(t)
    variance = 1 / (1 / VARIANCE + alpha**2 / sigma**2)
    return variance * (M / VARIANCE + alpha * xt / sigma**2), variance


def conditioned(mean, covariance, y=Y, a=A, tau=TAU):
    """Mean and covariance of a normal x_0 given y = a x_0 + tau noise, and log p(y)."""
    s = a @ covariance @ a.mT + tau**2 * torch.eye(len(a), dtype=F64)
    gap = y - mean @ a.mT
    gain = covariance @ a.mT @ torch.linalg.inv(s)
    log_evidence = -0.5 * (
        torch.einsum("...i,...ij,...j->...", gap, torch.linalg.inv(s), gap)
        + torch.logdet(s)
        + len(a) * math.log(2 * math.pi)
    )
    found = mean + torch.einsum("...ij,...j->...i", gain, gap)
    return found, covariance - gain @ a @ covariance, log_evidence


def backward(early, late):
    """Weights of x_t and x_0 in the bridge to an earlier time, and its variance, by coordinate."""
    (a, s), (b, t) = scales(early), scales(late)
    ratio = b / a
    weight = ratio * s**2 / t**2
    return weight, a - weight * b, s**2 * (1 - ratio**2 * s**2 / t**2)


def chain(times, guided, left=False):
    """Mean and covariance of the data that the ancestral chain makes, guided exactly by y or not at all.

    The guided chain has the posterior mean given y, and the variance that the prior alone has or, by
    coordinate, what y leaves of it.
    """
    alpha, sigma = scales(1.0)  # the prior is that of t = 1, wherever the grid ends
    mean, covariance = torch.zeros(2, dtype=F64), torch.diag(alpha**2 + sigma**2)
    eye = torch.eye(2, dtype=F64)
    for k in range(len(times) - 1, -1, -1):
        # E[x_0 | x_t (, y)] is an affine function of x_t: offset and matrix from three of its values.
        points = torch.cat([torch.zeros(1, 2, dtype=F64), eye])
        values, variance = posterior(points, times[k])
        if guided:
            values, covariance_left, _ = conditioned(values, torch.diag(variance))
            variance = covariance_left.diagonal() if left else variance
        offset, matrix = values[0], (values[1:] - values[0]).mT
        here, data, fresh = (
            backward(times[k - 1], times[k])
            if k
            else (torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64))
        )
        step = torch.diag(here) + data.unsqueeze(-1) * matrix
        mean = step @ mean + data * offset
        covariance = step @ covariance @ step.mT + torch.diag(fresh + data**2 * variance)
    return mean, covariance
