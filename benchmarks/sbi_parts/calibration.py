"""SBC and expected coverage of a right guide and of two deliberately broken ones."""

import argparse
import functools

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyro_diffusion import evaluate
from pyro_diffusion.infer import AutoAmortized
from pyro_diffusion.train import fit_amortized
from sbi_parts import VARIANCE, gaussian_linear

TESTS = 300
LEVEL = 0.01


class Nothing(nn.Module):
    """A summary that says nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """One constant for every datum."""
        return x.new_zeros(len(x), 1)


def fit(sites: dict[str, Tensor]) -> Tensor:
    """The log-likelihood: a test quantity that depends on the data."""
    noise = dist.Normal(sites["theta"], VARIANCE**0.5)
    return noise.log_prob(sites["x"]).sum(-1)


def main(args: argparse.Namespace) -> bool:
    """Every guide is asked about 300 simulations of the one program."""
    half = functools.partial(gaussian_linear, noise=0.5)
    guides = {
        "right": (gaussian_linear, None),
        "half the noise": (half, None),
        "no summary": (gaussian_linear, Nothing()),
    }
    quantities = {f"theta[{i}]": functools.partial(_coordinate, i) for i in range(10)}
    # ten numbers and the likelihood by ranks, and the coverage
    limit = LEVEL / (len(quantities) + 2)
    print(
        f"\ncalibration of gaussian_linear, {TESTS} simulations, 99 draws; p above {LEVEL} / "
        f"{len(quantities) + 2} = {limit:.2g} passes\n{'guide':<16} {'SBC, least p':>14} {'TARP p':>10}"
    )
    fine = []
    for name, (program, summary) in guides.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoAmortized(program, summary, observed=["x"])
        fit_amortized(guide, guide.simulate(10_000), steps=args.steps, progress=args.progress)
        ranks = evaluate.sbc(
            gaussian_linear, guide, num_simulations=TESTS, quantities={**quantities, "fit": fit}
        )
        coverage = evaluate.tarp(gaussian_linear, guide, num_simulations=TESTS)
        least = {each: ranks.p_value(each) for each in ranks.ranks}
        worst = min(least, key=lambda each: least[each])
        passes = [least[worst] > limit, coverage.p_value() > limit]
        wanted = passes == [True, True] if name == "right" else passes == [False, False]
        print(
            f"{name:<16} {least[worst]:>14.2g} {coverage.p_value():>10.2g}   ({worst}) "
            f"passes: {passes}, as wanted: {wanted}",
            flush=True,
        )
        fine.append(wanted)
    return all(fine)


def _coordinate(i: int, sites: dict[str, Tensor]) -> Tensor:
    return sites["theta"][..., i]
