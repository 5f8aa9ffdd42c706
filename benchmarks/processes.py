"""Every forward process on data whose density is known, with the exact denoiser: one table.

Run: python benchmarks/processes.py [--rows NAME ...] [--draws N]

Gap: log p less the bound, in nats a datum, by number of steps and in continuous time ("inf"), beside its
standard error. It is never negative beyond chance; it closes with the number of steps where the forward
process is Markov, and widens where it is not. ODE: largest error of its log-density, nats a dimension.
Samples: largest deviation of a moment, or that of all frequencies, in standard errors, by sampler.

Each process is a module of ``process_rows`` with a function ``row_<module>(draws)`` that returns a
:class:`~process_rows.Row`.
"""

import argparse
import importlib
import pkgutil

import process_rows
import torch
from process_rows import STEPS, Row


def main() -> None:
    names = sorted(m.name for m in pkgutil.iter_modules(process_rows.__path__) if m.name[0] != "_")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="*", default=names, choices=names, help="processes")
    parser.add_argument("--draws", type=int, default=100_000, help="draws per number")
    arguments = parser.parse_args()
    columns = [*map(str, STEPS), "inf"]
    print(
        f"{'process':28}{'Markov':8}"
        + "".join(f"{'gap, K = ' + c:>18}" for c in columns)
        + f"{'ODE':>10}"
    )
    rows: list[Row] = []
    for name in arguments.rows:
        torch.manual_seed(0)
        row = getattr(importlib.import_module(f"process_rows.{name}"), f"row_{name}")(
            arguments.draws
        )
        cells = (row.gaps.get(c) for c in columns)
        text = "".join(f"{'-' if c is None else f'{c[0]:.3f} ({c[1]:.3f})':>18}" for c in cells)
        ode = "-" if row.ode is None else f"{row.ode:.1e}"
        print(f"{row.name:28}{'yes' if row.markov else 'no':8}{text}{ode:>10}", flush=True)
        rows.append(row)
    print("\nSamples: deviation in standard errors")
    for row in rows:
        print(f"{row.name:28}" + ", ".join(f"{k} {v:.2f}" for k, v in row.samples.items()))
    for note in (note for row in rows for note in row.notes):
        print(f"\n{note}")


if __name__ == "__main__":
    main()
