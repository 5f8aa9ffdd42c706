"""Every forward process on data whose density is known, with the exact denoiser: one table.

Run: python benchmarks/processes.py [--rows NAME ...] [--draws N] [--workers N]

Gap: log p less the bound, in nats a datum, by number of steps and in continuous time ("inf"), beside its
standard error. It is never negative beyond chance; it closes with the number of steps where the forward
process is Markov, and widens where it is not. ODE: largest error of its log-density, nats a dimension.
Samples: largest deviation of a moment, or that of all frequencies, in standard errors, by sampler.

Each process is a module of ``process_rows`` with a function ``row_<module>(draws)`` that returns a
:class:`~process_rows.Row`. The command fails if any row is not as the rules say.
"""

import argparse
import importlib
import pkgutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import process_rows
import torch
from process_rows import STEPS, Row

COARSE = 0.01
NEARLY = 0.005
ODE = 1e-3
RULES = f"""
As wanted, where e is the standard error:
  gaps      e <= {COARSE} (or that share of the gap, if that is more), and gap >= -3 e at any number of
            steps; where the process is Markov, gap <= 3 e in continuous time, and at {STEPS[-1]} steps
            <= 3 e + {NEARLY} (it falls like 1/K)
  ODE       <= {ODE}
  samples   <= 3
A right table fails one given gap with chance 0.0013 to 0.0027 and one given sampler with chance at most 0.014
(the largest of five moments). The seeds are fixed."""


def faults(row: Row) -> list[str]:
    """What is not as wanted in a row."""
    out = []
    for steps, (gap, error) in row.gaps.items():
        where = f"K = {steps}"
        allowed = {"inf": 0.0, str(STEPS[-1]): NEARLY}.get(steps) if row.markov else None
        if not error <= max(COARSE, gap * COARSE):
            out.append(f"{where}: too coarse to tell")
        if not gap >= -3 * error:
            out.append(f"{where}: above log p")
        if allowed is not None and not gap <= 3 * error + allowed:
            out.append(f"{where}: not closed")
    if row.ode is not None and not row.ode <= ODE:
        out.append("ODE")
    out += [f"{sampler} samples" for sampler, value in row.samples.items() if not value <= 3]
    return out + [what for what, (value, limit) in row.claims.items() if not value <= limit]


def row_of(name: str, draws: int) -> Row:
    """The row of one module, its seed fixed."""
    torch.manual_seed(0)
    module = importlib.import_module(f"process_rows.{name}")
    row: Row = getattr(module, f"row_{name}")(draws)
    return row


def show(row: Row) -> None:
    """One line of the table."""
    cells = (row.gaps.get(c) for c in [*map(str, STEPS), "inf"])
    text = "".join(f"{'-' if c is None else f'{c[0]:.4f} ({c[1]:.4f})':>17}" for c in cells)
    ode = "-" if row.ode is None else f"{row.ode:.1e}"
    verdict = "; ".join(faults(row)) or "as wanted"
    print(f"{row.name:28}{'yes' if row.markov else 'no':7}{text}{ode:>9}  {verdict}", flush=True)


def main() -> None:
    names = sorted(m.name for m in pkgutil.iter_modules(process_rows.__path__) if m.name[0] != "_")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="*", default=names, choices=names, help="processes")
    parser.add_argument("--draws", type=int, default=30_000, help="data per gap")
    parser.add_argument("--workers", type=int, default=2, help="rows computed at a time")
    arguments = parser.parse_args()
    head = "".join(f"{'gap, K = ' + c:>17}" for c in [*map(str, STEPS), "inf"])
    print(f"{'process':28}{'Markov':7}{head}{'ODE':>9}")
    rows: list[Row] = []
    pool = ProcessPoolExecutor(arguments.workers, get_context("spawn"), torch.set_num_threads, (1,))
    with pool:
        for row in pool.map(row_of, arguments.rows, [arguments.draws] * len(arguments.rows)):
            show(row)
            rows.append(row)
    print("\nSamples: deviation in standard errors")
    for row in rows:
        print(f"{row.name:28}" + ", ".join(f"{k} {v:.2f}" for k, v in row.samples.items()))
    print("\nOther claims: number and what it may be at most")
    for row in rows:
        for what, (value, limit) in row.claims.items():
            print(f"{row.name:28}{what}: {value:.3g}, at most {limit:.3g}")
    for note in (note for row in rows for note in row.notes):
        print(f"\n{note}")
    print(RULES)
    failed = [row.name for row in rows if faults(row)]
    if failed:
        sys.exit(f"not as wanted: {', '.join(failed)}")


if __name__ == "__main__":
    main()
