"""The digits by the probability-flow ODE, beside the two bounds of the same network.

Run: make demo, then python benchmarks/digits_flow.py

A density over real numbers becomes one over integers x by a law q(y | x) of real numbers that stand for it,

    log P(x) >= E_q[ log p(y) + log P(x | y) - log q(y | x) ].

The forward process is the natural q: y = x_0 + (sigma/alpha) eps at the log-SNR where the flow ends, with the
decoder for P(x | y). Uniform noise over each integer's bin, with P(x | y) = 1, is the usual choice, and fits
a model that knows its data are integers badly. Draws of y are averaged, not importance-weighted: an estimated
trace makes log p(y) noisy, and weights would turn that noise into likelihood.
"""

import argparse
import math
import sys
from pathlib import Path

import pyro
import torch
from pyro.distributions import Normal
from torch import Tensor

from pyro_diffusion import evaluate
from pyro_diffusion.denoisers import LevelsDenoiser
from pyro_diffusion.distributions import Diffusion, ProbabilityFlow, QuantizedDecoder
from pyro_diffusion.dynamics import ExactTrace, Hutchinson, ODESolver, TraceEstimator
from pyro_diffusion.estimate import Estimate
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits

DECODER = QuantizedDecoder(digits.LEVELS)


def flow_of(denoiser: LevelsDenoiser, log_snr_max: float, trace: TraceEstimator) -> ProbabilityFlow:
    """The same network's flow, ending where noise is left to dequantize with."""
    process = GaussianProcess(Cosine(log_snr_max, -9.0, shift=1.25), event_dim=3)
    cut = LevelsDenoiser(denoiser.network, process, denoiser.values).eval()
    return ProbabilityFlow(
        cut, digits.EVENT_SHAPE, trace=trace, solver=ODESolver(rtol=1e-4, atol=1e-4)
    )


def dequantized(
    flow: ProbabilityFlow, x: Tensor, samples: int, uniform: bool
) -> tuple[evaluate.LogLikelihoodEstimate, float]:
    """Lower bound by dequantizations; and the probes' part of its mean's error (nats)."""
    schedule = flow.denoiser.process.schedule
    noise = math.exp(-schedule.log_snr_max / 2)
    ends = torch.tensor([0.0, 1.0])
    chain = Diffusion(flow.denoiser, digits.EVENT_SHAPE, times=ends, decoder=DECODER)
    x0 = DECODER.encode(x, torch.float32)
    weights, variances, evaluations = [], [], 0.0
    for _ in range(samples):
        if uniform:
            y = x0 + DECODER.width * (torch.rand_like(x0) - 0.5)
            rest = torch.full((len(x),), x0[0].numel() * math.log(DECODER.width))
        else:
            q = Normal(x0, noise).to_event(3)
            y = q.sample()
            rest = chain.decode(y * schedule.alpha(ends[0])).log_prob(x) - q.log_prob(y)
        density = evaluate.flow_log_likelihood(flow.replace(), y, batch_size=len(x))
        weights.append(density.value + rest)
        variances.append(density.standard_error.square())
        evaluations += density.evaluations
    terms = torch.stack(weights)
    result = evaluate.LogLikelihoodEstimate(
        value=terms.mean(0),
        standard_error=terms.std(0) / math.sqrt(samples),
        kind="lower bound",
        evaluations=evaluations,
        dimensions=x0[0].numel(),
    )
    return result, float((torch.stack(variances).mean(0) / samples).sum().sqrt() / len(x))


def line(title: str, figure: Estimate, kind: str, probes: float = 0.0) -> None:
    """One row of the table."""
    print(
        f"{title:<46} {figure.value:>8.4f} {figure.standard_error:>8.4f} {probes:>8.4f} "
        f"{figure.evaluations:>8.0f}  {kind}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=Path, default=Path("results/digits"))
    parser.add_argument("--images", type=int, default=36, help="first test images to score")
    parser.add_argument("--samples", type=int, default=2, help="dequantizations of every image")
    parser.add_argument("--probes", type=int, default=8, help="Hutchinson probes; 0: exact trace")
    parser.add_argument("--log-snr", type=float, default=9.0, help="where the flow ends")
    args = parser.parse_args()
    denoiser = digits.trained(args.digits).requires_grad_(False)
    pyro.set_rng_seed(0)
    x = digits.load()["test"][: args.images]
    title = f"first {len(x)} test images, bits/dim"
    print(f"\n{title:<46} {'value':>8} {'s.e.':>8} {'probes':>8} {'reads':>8}  kind")
    chain = digits.diffusion(denoiser, 1000)
    bound = evaluate.log_likelihood(chain, x, num_terms=500)
    line("bound, 1000 steps", bound.bits_per_dim, bound.kind)
    short = digits.diffusion(denoiser, 100)
    weighted = evaluate.importance_weighted(short, x, num_samples=8)
    line("8 weighted chains of 100 steps", weighted.bits_per_dim, weighted.kind)
    trace: TraceEstimator = Hutchinson(args.probes) if args.probes else ExactTrace()
    flow = flow_of(denoiser, args.log_snr, trace)
    scale = x[0].numel() * math.log(2)
    rows = {"bound": bound, "weighted chains": weighted}
    for uniform in (False, True):
        law = "uniform" if uniform else f"the process's at log-SNR {args.log_snr:g}"
        result, probes = dequantized(flow, x, args.samples, uniform)
        kind = f"lower bound, {args.samples} draws of y, {flow.trace}"
        line(f"ODE, noise: {law}", result.bits_per_dim, kind, probes / scale)
        rows[f"ODE, {'uniform' if uniform else 'process'} noise"] = result
    print(f"\nthe same, paired (nats per image)\n{evaluate.compare(rows).round(1).to_string()}")


if __name__ == "__main__":
    main()
