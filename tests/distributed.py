"""What tests/test_distributed.py has one process and two compute: RANK SIZE FOLDER WHAT."""

import functools
import json
import os
import signal
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as td
from pyro.infer.autoguide import AutoNormal, init_to_sample
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_diffusion import (
    MLP,
    Cosine,
    Diffusion,
    GaussianDenoiser,
    GaussianProcess,
    LearnedVariance,
    Trainer,
)
from pyro_diffusion.train import sharing
from tests.ranks import leave

ROWS = 48


def build(**arguments):
    """A diffusion with a parameter in the store; the same weights on all ranks only by the first's."""
    pyro.clear_param_store()
    pyro.set_rng_seed(7 + 100 * td.get_rank())
    denoiser = GaussianDenoiser(
        MLP(2, hidden=(8,), outputs=2), GaussianProcess(Cosine()), variance=LearnedVariance()
    )

    def model(x):
        pyro.module("denoiser", denoiser)
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("first", dist.Normal(0.0, scale), obs=x[:, 0])
            pyro.sample("x", Diffusion(denoiser, (2,), steps=20), obs=x)

    return Trainer(model, process_group=td.group.WORLD, **arguments)


def data() -> torch.Tensor:
    return torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(3)) + 1


def weights(trainer) -> list[float]:
    return torch.cat([p.detach().flatten() for _, p in trainer.program.trained()]).tolist()


def fit(trainer, steps, rows=16, **arguments):
    """A step's rows are the same on any number of processes."""
    size = rows // td.get_world_size()
    return trainer.fit(data(), steps=steps, batch_size=size, progress=False, **arguments)


def one_step(folder: Path) -> dict:
    """By a rate of one the step is the gradient."""
    found = {}
    for accumulate in (1, 2):
        make = functools.partial(torch.optim.SGD, lr=1.0)
        trainer = build(optimizer=make, ema=None, accumulate=accumulate)
        start = fit(trainer, 1).losses
        found[f"accumulate {accumulate}"] = weights(trainer) + start
    return found


def curve(folder: Path) -> dict:
    adam = functools.partial(torch.optim.Adam, lr=0.01)
    history = fit(build(optimizer=adam), 200, validation=data()[:20], validate_every=50)
    return {"losses": history.losses, "validations": list(history.validations.values())}


def loader(folder: Path) -> dict:
    """One epoch is one step of all rows of a program without noise; ranks have unequally many."""

    def model(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def without_some(rows):
        kept = [x for x, index in rows if index >= 13]
        counts.append(len(kept))
        return torch.stack(kept)

    counts: list[int] = []
    pyro.clear_param_store()
    dataset = TensorDataset(data(), torch.arange(ROWS))
    # Halves of 24 rows in batches of 16 and 8, or 48 in batches of 16, and of each what is kept.
    sampler = DistributedSampler(dataset)
    batches = DataLoader(dataset, batch_size=16, sampler=sampler, collate_fn=without_some)
    make = functools.partial(torch.optim.SGD, lr=1.0)
    trainer = Trainer(
        model,
        optimizer=make,
        ema=None,
        accumulate=len(batches),
        process_group=td.group.WORLD,
    )
    trainer.fit(batches, steps=1, progress=False)
    mine = torch.tensor(sum(counts[-len(batches) :]))
    everyone = [torch.zeros_like(mine) for _ in range(td.get_world_size())]
    td.all_gather(everyone, mine)
    return {"loc": weights(trainer), "rows": torch.stack(everyone).tolist()}


def numbers(folder: Path) -> dict:
    """Of the noise of each batch: those of one step have noise of their own."""
    found, whole = [], sharing.global_batch

    def noted(rows, *, seed, step, process_group):
        found.append(step)
        return whole(rows, seed=seed, step=step, process_group=process_group)

    sharing.global_batch = noted
    try:
        make = functools.partial(torch.optim.SGD, lr=0.0)
        fit(build(optimizer=make, accumulate=2), 3)
    finally:
        sharing.global_batch = whole
    return {"steps": found}


def resumed(folder: Path, name: str = "", stop: int | None = None) -> dict:
    """Eight steps with everything that a checkpoint has; perhaps killed."""
    name = name or f"run{td.get_world_size()}"

    def kill(trainer):
        if trainer.step == stop and td.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    adam = functools.partial(torch.optim.Adam, lr=0.01)
    schedule = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=8)
    trainer = build(optimizer=adam, schedule=schedule, ema=0.9, clip_norm=1.0, accumulate=2)
    history = fit(
        trainer,
        8,
        validation=data()[:20],
        validate_every=3,
        checkpoint=folder / f"{name}.safetensors",
        save_every=1,
        log=folder / f"{name}.csv",
        callback=kill,
    )
    validations = list(history.validations.values())
    return {"losses": history.losses, "weights": weights(trainer), "validations": validations}


def killed(folder: Path) -> dict:
    return resumed(folder, "killed", stop=5)


def resumed_killed(folder: Path) -> dict:
    return resumed(folder, "killed")


def stopped(folder: Path) -> dict:
    """By what the callback says on the last rank."""
    last = td.get_rank() == td.get_world_size() - 1
    trainer = build(optimizer=functools.partial(torch.optim.Adam, lr=0.01))
    history = fit(trainer, 5, callback=lambda t: last and t.step == 3)
    return {"steps": len(history.losses), "stopped": history.stopped}


def lazy(folder: Path) -> dict:
    """A guide whose parameters are drawn when it is first run, by each rank for itself."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    pyro.clear_param_store()
    pyro.set_rng_seed(7 + 100 * td.get_rank())
    guide = AutoNormal(model, init_loc_fn=init_to_sample)
    make = functools.partial(torch.optim.SGD, lr=1e-3)
    trainer = Trainer(model, guide, optimizer=make, process_group=td.group.WORLD)
    fit(trainer, 3)
    return {"weights": weights(trainer)}


def refusals(folder: Path) -> dict:
    """What is said on every rank."""
    make, found = functools.partial(torch.optim.SGD, lr=1.0), {}
    rank, x = td.get_rank(), data()
    cases = {
        "unequal": lambda t: t.fit(x[: ROWS - rank], steps=1, batch_size=4, progress=False),
        "too few": lambda t: t.fit(x, steps=1, batch_size=ROWS, progress=False),
        "steps": lambda t: t.fit(x, steps=1 + rank, batch_size=4, progress=False),
        "sampler": lambda t: t.fit(
            DataLoader(TensorDataset(x), batch_size=4), steps=1, progress=False
        ),
    }
    cases["no group"] = lambda t: Trainer(t.program, optimizer=make)
    cases["none"] = lambda t: t.fit(x[: ROWS * (1 - rank)], steps=1, progress=False)
    some = TensorDataset(x[: ROWS * (1 - rank)])
    cases["empty loader"] = lambda t: t.fit(
        DataLoader(some, batch_size=4, sampler=DistributedSampler(some)), steps=1, progress=False
    )
    cases["shares"] = lambda t: t.fit(x + rank, steps=1, batch_size=4, progress=False)
    cases["average"] = cases["rate"] = lambda t: t.fit(x, steps=1, batch_size=4, progress=False)
    own = functools.partial(torch.optim.SGD, lr=1.0 + rank)
    for name, case in cases.items():
        try:
            case(
                build(
                    optimizer=own if name == "rate" else make,
                    ema=0.5 + 0.1 * rank * (name == "average"),
                )
            )
        except ValueError as error:
            found[name] = str(error)
    return found


def main() -> None:
    rank, size, folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    store = f"file://{folder}/{'_'.join(names)}_{size}.store"
    td.init_process_group("gloo", init_method=store, rank=int(rank), world_size=int(size))
    found = {name: globals()[name](Path(folder)) for name in names}
    path = Path(folder) / f"{'_'.join(names)}_{rank}_{size}.json"
    path.write_text(json.dumps(found))
    td.destroy_process_group()


if __name__ == "__main__":
    main()
    leave()
