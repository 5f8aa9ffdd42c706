"""Exact in closed form: the bound against log p where both are known.

Run: python benchmarks/exactness.py

The bound is the mean log importance weight of chains drawn from Pyro's own traces of the model and its
guide, so nothing here is specific to the one-site estimate. Everything is in float64. "gap" is
(log p - bound) / dimensions in nats; its standard error is over data and chains together.
"""

import argparse
import math

import torch
from torch import Tensor

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.evaluate import log_weights
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine, LinearBeta, LogLinear, Schedule

PILOT = 512


def gaps(denoiser: MixtureDenoiser, steps: int, count: int) -> Tensor:
    """(log p - log weight) / d of fresh data."""
    law, d = denoiser.data(), denoiser.means.shape[1]
    x = law.sample((count,))
    weights = log_weights(Diffusion(denoiser, (d,), steps), x, batch_size=500)[0]
    return (law.log_prob(x) - weights) / d


def gap(denoiser: MixtureDenoiser, steps: int, error: float, most: int) -> tuple[float, float, int]:
    """Mean gap with a standard error near ``error``: a pilot run sets the sample size."""
    scatter = float(gaps(denoiser, steps, PILOT).std())
    count = min(most, max(PILOT, math.ceil((scatter / error) ** 2)))
    values = gaps(denoiser, steps, count)
    return float(values.mean()), float(values.std() / math.sqrt(count)), count


def isotropic() -> bool:
    """Isotropic normal data and its exact posterior: no gap at any number of steps."""
    print("\nIsotropic normal data (mean 0.3, sd 0.7, d = 8), exact posterior variance")
    print(f"{'steps':>6} {'gap nats/dim':>14} {'std. error':>11} {'wanted':>9}")
    process = GaussianProcess(Cosine())
    denoiser = MixtureDenoiser(process, torch.ones(1), torch.full((1, 8), 0.3), 0.49)
    fine = True
    for steps in (1, 5, 50):
        value, error, _ = gap(denoiser, steps, 2e-5, 20_000)
        fine &= abs(value) <= 1e-4
        print(f"{steps:>6} {value:>14.2e} {error:>11.1e} {'<= 1e-4':>9}")
    return fine


def mixture(d: int, most: int) -> bool:
    """The 25-component mixture with the exact variance per coordinate, and with a point mass."""
    print(f"\n25 components, means N(0, I), variance 0.05, d = {d}; log-SNR from about 9 to -9")
    header = f"{'grid':<16} {'posterior':<22} {'steps':>6} {'gap nats/dim':>13} {'std. error':>11}"
    print(f"{header} {'data':>7} {'wanted':>9}")
    means = torch.randn(25, d, generator=torch.Generator().manual_seed(d))
    grids: dict[str, Schedule] = {
        "uniform log-SNR": LogLinear(9, -9),
        "cosine": Cosine(8.77, -9),  # its start is that of the paper's offset of 0.008
        "linear beta": LinearBeta(log_snr_max=9),
    }
    wanted = {
        ("cosine", False, 50): 0.02,
        ("cosine", False, 1000): 0.005,
        ("uniform log-SNR", True, 1000): 0.05,
    }
    fine, slope = True, []
    for point_mass in (False, True):
        for name, schedule in grids.items():
            for steps in (50, 250, 1000) if point_mass else (50, 1000):
                process = GaussianProcess(schedule)
                denoiser = MixtureDenoiser(process, torch.ones(25), means, 0.05, point_mass)
                bound = wanted.get((name, point_mass, steps))
                value, error, count = gap(denoiser, steps, 0.0015, most if bound else most // 5)
                fine &= bound is None or (value <= bound and error <= 0.002)
                posterior = "point mass" if point_mass else "variance per coord."
                print(
                    f"{name:<16} {posterior:<22} {steps:>6} {value:>13.4f} {error:>11.4f} {count:>7}"
                    f" {'' if bound is None else f'<= {bound:g}':>9}"
                )
                if point_mass and name == "uniform log-SNR":
                    slope.append((math.log(steps), math.log(value)))
    fall = -(slope[-1][1] - slope[0][1]) / (slope[-1][0] - slope[0][0])
    print(f"point mass on the uniform log-SNR grid falls like steps^-{fall:.2f} from 50 to 1000")
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=20_000, help="most data per figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(args.seed)
    fine = [isotropic(), mixture(2, args.most), mixture(16, args.most)]
    print(f"\nevery figure as wanted: {all(fine)}")


if __name__ == "__main__":
    main()
