"""What tests/test_ranks.py has one process and two compute: ``python -m tests.ranks RANK SIZE FOLDER``."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as td
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pyro_diffusion import evaluate
from pyro_diffusion.distributions import (
    Dequantization,
    Diffusion,
    DiffusionCTMC,
    DiffusionSDE,
    ProbabilityFlow,
)
from pyro_diffusion.dynamics import Hutchinson, ODESolver, SDESolver
from pyro_diffusion.dynamics.trace_estimators import gaussian
from pyro_diffusion.processes import global_batch
from pyro_diffusion.samplers import DDIM
from tests.small_diffusions import SMALL_DIFFUSIONS

SMALL = {small.name: small for small in SMALL_DIFFUSIONS}
ROWS, BATCH = 7, 3  # three batches: two for the first of two ranks, and one short one


def same_everywhere(make: Callable[[], Any]) -> Any:
    """What is random in it is alike on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


# --- evaluation and sampling ----------------------------------------------------------------------------


def evaluations() -> dict[str, Callable[..., Any]]:
    """Functions of (batch_size, process_group), all with one seed."""
    out: dict[str, Callable[..., Any]] = {}
    for name in ("normal", "image", "absorbing"):
        law = same_everywhere(lambda small=SMALL[name]: small(small.denoiser().eval(), steps=3))
        data = same_everywhere(lambda small=SMALL[name]: small.data((ROWS,)))
        out[f"bound {name}"] = lambda law=law, x=data, **o: evaluate.log_likelihood(law, x, **o)
        out[f"draws {name}"] = lambda law=law, **o: evaluate.draw_samples(law, ROWS, **o)
    law, x = same_everywhere(lambda: (SMALL["normal"](), torch.randn(ROWS, 3)))
    denoiser = law.denoiser
    labelled = same_everywhere(lambda: SMALL["label"](context={}))
    label = {"label": torch.arange(ROWS) % 3}
    symbols = same_everywhere(SMALL["absorbing"].denoiser)
    scaled = dist.TransformedDistribution(law, [dist.transforms.AffineTransform(1.0, 2.0)])
    sde = DiffusionSDE(denoiser, (3,), solver=SDESolver("euler", steps=4))
    solver = ODESolver("rk4", steps=3)
    flow = ProbabilityFlow(denoiser, (3,), solver=solver)
    probed = flow.replace(trace=Hutchinson(2))
    models: dict[str, tuple[Callable[..., Any], Any, dict[str, Any]]] = {
        "some terms": (evaluate.log_likelihood, (law, x), {"num_terms": 3}),
        "sde": (evaluate.log_likelihood, (sde, x), {"num_terms": 3}),
        "labelled": (evaluate.log_likelihood, (labelled, x), {"context": label}),
        "few rows": (
            evaluate.log_likelihood,
            (law, x[:2]),
            {},
        ),  # one batch: none for the second rank
        "scaled": (evaluate.log_likelihood, (scaled, x), {}),
        "importance": (evaluate.importance_weighted, (law, x), {"num_samples": 30}),
        "weights": (evaluate.log_weights, (law, x), {"num_samples": 2}),
        "flow": (evaluate.flow_log_likelihood, (flow, x), {}),
        "flow probes": (evaluate.flow_log_likelihood, (probed, x), {}),
        "draws ddim": (evaluate.draw_samples, (law.replace(sampler=DDIM()), ROWS), {}),
        "draws labelled": (evaluate.draw_samples, (labelled, ROWS), {"context": label}),
        "draws scaled": (evaluate.draw_samples, (scaled, ROWS), {}),
        "draws sde": (evaluate.draw_samples, (sde, ROWS), {}),
        "draws ctmc": (evaluate.draw_samples, (DiffusionCTMC(symbols, (3,), 4), ROWS), {}),
        "draws flow": (evaluate.draw_samples, (flow, ROWS), {}),
    }
    for name, (function, given, more) in models.items():
        out[name] = lambda f=function, g=given, m=more, **o: f(*g, **m, **o)
    return out


def figures(found: Any) -> dict[str, Tensor]:
    """All numbers of a result."""
    if isinstance(found, Tensor):
        return {"value": found}
    out = {name: getattr(found, name) for name in ("value", "standard_error", "ess", "khat")}
    out["evaluations"] = torch.tensor(found.evaluations)
    if found.terms is not None:
        terms = vars(found.terms)
        out |= {f"terms.{k}": torch.as_tensor(v, dtype=torch.float64) for k, v in terms.items()}
    return {k: v for k, v in out.items() if v is not None}


def evaluated(process_group: Any, batch_size: int = BATCH, seed: int = 5) -> dict[str, Tensor]:
    """Every figure of every evaluation."""
    out = {}
    for name, function in evaluations().items():
        found = function(batch_size=batch_size, seed=seed, process_group=process_group)
        out |= {f"{name}/{k}": v for k, v in figures(found).items()}
    return out


# --- training -------------------------------------------------------------------------------------------

SHARES = (3, 5)


class Model(PyroModule):
    """A program with one site of data."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.denoiser = SMALL["absorbing" if kind == "symbols" else "normal"].denoiser()

    def distribution(self) -> Any:
        if self.kind == "sde":
            return DiffusionSDE(self.denoiser, (3,))
        if self.kind == "flow":
            solver = ODESolver("rk4", steps=2)
            return ProbabilityFlow(self.denoiser, (3,), solver=solver, trace=Hutchinson(1))
        return Diffusion(self.denoiser, (3,), steps=20)

    def forward(self, x: Tensor, total: int) -> None:
        # Each rank's sum counts as often as there are ranks: the mean over them is the sum over all rows.
        count = td.get_world_size() if td.is_initialized() else 1
        with pyro.poutine.scale(scale=count / total), pyro.plate("data", len(x)):
            pyro.sample("x", self.distribution(), obs=x)


def nothing(x: Tensor, total: int) -> None:
    """An empty guide."""


def own_rows(x: Tensor) -> Tensor:
    """The rows of this rank: the first three of eight, or the other five; all for one process."""
    return x.split(SHARES)[td.get_rank()] if td.is_initialized() else x


def sharded(module: Any) -> Any:
    """The network by itself and the rest together, as the documentation has it."""
    fully_shard(module.model.denoiser.network)
    return fully_shard(module)


def loss_of(kind: str, parallel: Callable[[Any], Any] = DistributedDataParallel) -> Any:
    particles = 2 if kind == "particles" else 1
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    module = same_everywhere(lambda: elbo(Model(kind), nothing))
    return parallel(module) if td.is_initialized() else module


def gradients(process_group: Any) -> dict[str, Tensor]:
    """Gradients of the loss of eight rows, and the loss over sixty steps."""
    out = {}
    for kind in ("chain", "particles", "sde", "flow", "symbols"):
        loss, small = loss_of(kind), SMALL["absorbing" if kind == "symbols" else "normal"]
        data = same_everywhere(lambda small=small: small.data((8,)))
        x = own_rows(data)
        with global_batch(len(x), seed=3, step=1, process_group=process_group):
            loss(x, 8).backward()
        grads = [p.grad.flatten() for p in loss.parameters() if p.grad is not None]
        out[kind] = torch.cat(grads)
    out["curve"] = curve(loss_of("chain"), process_group)
    out["curve of FSDP2"] = curve(loss_of("chain", sharded), process_group)
    return out


def curve(loss: Any, process_group: Any) -> Tensor:
    """The loss of all rows over sixty steps."""
    optimizer, values = torch.optim.Adam(loss.parameters(), lr=0.01), []
    for step in range(60):
        torch.manual_seed(step)
        x = own_rows(torch.randn(8, 3))
        optimizer.zero_grad()
        with global_batch(len(x), seed=3, step=step, process_group=process_group):
            value = loss(x, 8)
            value.backward()
        optimizer.step()
        values.append(value.detach())
    out = torch.stack(values)
    if td.is_initialized():
        td.all_reduce(out)
        out = out / td.get_world_size()
    return out


# --- what only two ranks can show -----------------------------------------------------------------------


def noises(process_group: Any) -> dict[str, Tensor]:
    """Numbers that must differ from rank to rank, though all ranks have one seed; `same` must not."""
    pyro.set_rng_seed(1)
    x, denoiser = torch.zeros(4, 3), SMALL["normal"].denoiser()
    flow = ProbabilityFlow(denoiser, (3,), solver=ODESolver("rk4", steps=2))
    out = {
        "chain": Diffusion(denoiser, (3,), 5).log_prob(x),
        "probes": flow.replace(trace=Hutchinson(1, gaussian)).log_prob(x),
        "dequantization": Dequantization()._inverse(x),
    }
    with global_batch(len(x), seed=0, process_group=process_group):
        out["chain of a step"] = Diffusion(denoiser, (3,), 5).log_prob(x)
        out["one datum of a step"] = Diffusion(denoiser, (3,), 5).log_prob(x[0])
        out["probes of a step"] = flow.replace(trace=Hutchinson(1, gaussian)).log_prob(x)
        out["dequantization of a step"] = Dequantization()._inverse(x[:, 0])
        out["site of a step"] = pyro.sample("z", dist.Normal(0.0, 1.0))
        out["draws of a step"] = SMALL["normal"](denoiser).sample((4,))
    out["same"] = torch.rand(3)
    return out


def refusals(process_group: Any) -> list[str]:
    """What each rank is told when ranks disagree, one has nothing, or one fails."""
    rank = td.get_rank()
    law = same_everywhere(SMALL["normal"])
    x = torch.zeros(3, 3)
    group = {"process_group": process_group, "batch_size": 2}

    def fails() -> Any:
        data = x.clone()
        data[2] = torch.nan  # in the second batch, the second rank's
        return evaluate.log_likelihood(law, data, seed=0, **group)

    def batch(rows: int, **given: Any) -> Any:
        with global_batch(rows, **{"seed": 0, "process_group": process_group, **given}):
            pass

    calls = [
        lambda: evaluate.log_likelihood(law, x + rank, seed=0, **group),
        lambda: evaluate.log_likelihood(law, x[: 2 + rank], seed=0, **group),
        lambda: evaluate.draw_samples(law, 3 + rank, seed=0, **group),
        lambda: evaluate.draw_samples(law, 3, seed=rank, **group),
        fails,
        lambda: batch(rank),
        lambda: batch(2, step=rank),
        lambda: batch(2, process_group=None),
    ]
    return [told(call) for call in calls]


def told(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def documented() -> dict[str, Tensor]:
    """What the page on several processes computes."""
    text = (Path(__file__).parent.parent / "docs/distributed.md").read_text()
    page = text.split("\n## FSDP2\n")[0]
    namespace: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), namespace)
    weights = [p.detach().flatten() for p in namespace["loss"].parameters()]
    return {
        "weights": torch.cat(weights),
        "bound": namespace["bound"].value,
        "draws": namespace["draws"],
    }


def leave() -> None:
    """End this process, which has left all that it found on disk, without the interpreter's own teardown.

    FSDP2's caches, and default arguments of ``torch.distributed.nn.functional`` where it is imported after
    ``init_process_group``, keep the group past ``destroy_process_group``, and gloo's threads with it.
    A thread that asks for the lock of an interpreter that ends is cancelled, and the process aborts.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main(rank: int, size: int, folder: Path) -> None:
    """Compute everything, and leave it in a folder."""
    torch.set_num_threads(1)
    td.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size)
    world = td.group.WORLD
    tables = {"evaluated": evaluated(world), "gradients": gradients(world), "noises": noises(world)}
    tables["documented"] = documented()
    numbers = {f"{k}/{name}": x.clone() for k, table in tables.items() for name, x in table.items()}
    unseeded = evaluate.draw_samples(same_everywhere(SMALL["normal"]), 3, process_group=world)
    save_file({**numbers, "unseeded": unseeded}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(refusals(world)))
    td.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    leave()
