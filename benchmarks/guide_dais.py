"""numpyro's AutoDAIS on three targets of `guides.py`, at equal wall time.

Run: JAX_PLATFORMS=cpu python benchmarks/guide_dais.py --data DIR [--seconds 60] [--seeds 0 1 2]

numpyro and jax have to be installed beside. AutoDAIS (Geffner & Domke; Zhang et al., arXiv 2107.10150) trains
an annealed chain of K Hamiltonian steps without acceptance, from a normal base. It is fitted by SVI for the
given seconds, compilation apart; the ELBO is of 100,000 draws, with its standard error, and the log mean
weight is of the same draws.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDAIS
from numpyro.infer.initialization import init_to_value

DRAWS, AT_ONCE = 100_000, 1000


def funnel() -> None:
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (10,)))
    wide = dist.Normal(0.0, jnp.exp(x[0] / 2)).log_prob(x[1:]).sum()
    numpyro.factor("target", dist.Normal(0.0, 3.0).log_prob(x[0]) + wide)


def schools(y: Any, sigma: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        raw = numpyro.sample("raw", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * raw, sigma), obs=y)


def logistic(x: Any, y: Any) -> None:
    w = numpyro.sample("w", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ w).to_event(1), obs=y)


def load(name: str, folder: Path) -> tuple[Callable[[], None], dict[str, Any]]:
    """A program, and the values that its guide starts at."""
    if name == "funnel":
        return funnel, {"x": jnp.zeros(10)}
    if name == "eight_schools":
        read = json.loads((folder / "posteriordb/eight_schools.data.json").read_text())
        data = (jnp.array(read[k], dtype=float) for k in ("y", "sigma"))
        return partial(schools, *data), {"mu": 0.0, "tau": 1.0, "raw": jnp.zeros(8)}
    with np.load(folder / "samplers/ionosphere.npz", allow_pickle=False) as file:
        x, y = (np.asarray(file[k], dtype=np.float64) for k in ("X", "y"))
    sd = x.std(0)
    x = (x - x.mean(0)) / np.where(sd > 0, sd, 1.0)
    x = jnp.array(np.concatenate([np.ones_like(x[:, :1]), x], -1))
    return partial(logistic, x, jnp.array(y > 0, dtype=float)), {"w": jnp.zeros(x.shape[1])}


def run(name: str, seed: int, args: argparse.Namespace) -> None:
    """Fit it, and print a row."""
    model, values = load(name, args.data)
    guide = AutoDAIS(
        model, K=args.steps, base_dist=args.base, init_loc_fn=init_to_value(values=values)
    )
    svi = SVI(model, guide, numpyro.optim.Adam(args.lr), Trace_ELBO())
    state = svi.init(jax.random.PRNGKey(seed))
    many = jax.jit(lambda state: jax.lax.scan(lambda s, _: svi.update(s), state, None, args.block))
    jax.block_until_ready(many(state))
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < args.seconds:
        state, losses = many(state)
        losses.block_until_ready()
        steps += args.block
    seconds = time.perf_counter() - start
    params = svi.get_params(state)

    def weights(key: Any) -> Any:
        one = lambda k: -Trace_ELBO().loss(k, params, model, guide)  # noqa: E731
        return jax.vmap(one)(jax.random.split(key, AT_ONCE))

    keys = jax.random.split(jax.random.PRNGKey(seed + 1), DRAWS // AT_ONCE)
    found = np.asarray(jax.lax.map(jax.jit(weights), keys)).ravel()
    elbo, error = float(found.mean()), float(found.std() / math.sqrt(len(found)))
    log_z = float(np.logaddexp.reduce(found) - math.log(len(found)))
    print(
        f"{name:<15} {seed:>4} {seconds:>6.1f} {steps:>8} {elbo:>10.3f} +- {error:<7.3f} log mean weight "
        f"{log_z:.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    names = ["funnel", "eight_schools", "ionosphere"]
    parser.add_argument("--targets", nargs="+", default=names, choices=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=8, help="K")
    parser.add_argument("--base", default="cholesky", choices=["diagonal", "cholesky"])
    parser.add_argument("--lr", type=float, default=0.005, help="of Adam")
    parser.add_argument(
        "--block", type=int, default=100, help="steps of SVI between looks at the clock"
    )
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    print(f"numpyro {numpyro.__version__}, jax {jax.__version__}: {vars(args)}")
    print(f"{'target':<15} {'seed':>4} {'s':>6} {'steps':>8} {'ELBO':>10}")
    for name in args.targets:
        for seed in args.seeds:
            run(name, seed, args)


if __name__ == "__main__":
    main()
