"""The training loop: equal to a loop by hand, to one large batch, and to itself after it was killed."""

import csv
import functools
import math
import shutil
import sys
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from pyro_diffusion import (
    MLP,
    Cosine,
    Diffusion,
    GaussianDenoiser,
    GaussianProcess,
    LearnedVariance,
)
from pyro_diffusion.checkpoint import CheckpointError
from pyro_diffusion.train import Trainer
from pyro_diffusion.train.program import Program
from pyro_diffusion.train.units import Unit

SGD = functools.partial(torch.optim.SGD, lr=0.1)
SLOW = functools.partial(torch.optim.SGD, lr=0.02)
ADAM = functools.partial(torch.optim.Adam, lr=0.02)


def normal(x):
    """A program without noise: rows are normal around a parameter."""
    loc = pyro.param("loc", torch.zeros(x.shape[1:]))
    scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def rows(count: int = 60, width: int = 3) -> torch.Tensor:
    return torch.randn(count, width) + torch.arange(width)


def fit(trainer, data, steps=5, **arguments):
    return trainer.fit(data, steps=steps, progress=False, **arguments)


# --- what is trained, and by which gradient -----------------------------------------------------


def test_steps_are_those_of_svi():
    """Of a program without noise, so that the order of rows is all that differs."""
    data = rows()
    history = fit(Trainer(normal, optimizer=ADAM, ema=None), data)
    found = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    pyro.clear_param_store()
    scaled = pyro.poutine.scale(normal, 1 / len(data))
    svi = SVI(scaled, lambda x: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(data) for _ in range(5)]
    assert history.losses == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(found, dict(pyro.get_param_store().items()))


class Normals(PyroModule):
    """A parameter of its own, a constrained one, and a network with a frozen layer and a buffer."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))
        self.scale = PyroParam(torch.ones(()), dist.constraints.positive)
        self.network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    def forward(self, x):
        loc = self.loc + self.network(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, self.scale).to_event(1), obs=x)


def test_modules_and_autoguides_in_both_modes(module_local_params):
    model = Normals()
    guide = AutoNormal(pyro.poutine.block(model, hide=["x"]))
    trainer = Trainer(model, guide, optimizer=ADAM)
    history = fit(trainer, rows(), steps=40)
    names = [name for name, _ in trainer.program.trained()]
    assert "model.loc" in names and "model.scale_unconstrained" in names
    assert "model.network.0.weight" in names
    assert any(name.startswith("guide.") for name in names)
    assert history.losses[-1] < history.losses[0]
    assert len(names) == len(set(names)) == 8


def test_the_elbos_module_and_methods():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(3))

        def model(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1), obs=x)

        def guide(self, x):
            pass

    owner, data = Owner(), rows()
    fit(Trainer(owner.model, owner.guide, optimizer=SGD, ema=None), data)
    one = owner.loc.detach().clone()
    owner.loc.data.zero_()
    fit(Trainer(Trace_ELBO()(owner.model, owner.guide), optimizer=SGD, ema=None), data)
    assert one.abs().max() > 0 and one.allclose(owner.loc)


def test_modules_of_a_function_are_found_and_others_left_alone():
    class Net(nn.Sequential):
        pass

    known = Net(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    frozen = Net(nn.Linear(3, 3), nn.Dropout(0.5)).requires_grad_(False).eval()
    foreign = Net(nn.Linear(3, 3))

    def model(x):
        pyro.module("known", known)
        loc = known(x) + frozen(x) + foreign(x)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    trainer, modes = Trainer(model, optimizer=SGD), []
    before = foreign[0].weight.detach().clone()
    fit(trainer, rows(), callback=lambda t: modes.append((known[2].training, frozen.training)))
    assert list(trainer.program.parts) == ["known"]
    assert modes[0] == (True, False) and not known.training
    assert foreign[0].weight.equal(before)
    assert "known.1.running_mean" in trainer.average.average


def whole_plate(x):
    """The same rows as a subsample of 60."""
    loc = pyro.param("loc", torch.zeros(3))
    with pyro.plate("data", 60, subsample=torch.arange(len(x))):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def own_batches(x=None):
    """A program that takes its rows itself."""
    x = OWN if x is None else x
    loc = pyro.param("loc", torch.zeros(3))
    with pyro.plate("data", len(x), subsample_size=20) as index:
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x[index])


OWN = torch.zeros(60, 3)


@pytest.mark.parametrize("unit", ["nats/datum", "bits/datum", "nats/dim", "bits/pixel"])
@pytest.mark.parametrize(
    ("model", "data", "batch"),
    [
        (normal, OWN, None),
        (normal, OWN, 7),
        (whole_plate, OWN, 7),
        (own_batches, None, None),
        (own_batches, OWN, None),
    ],
)
def test_the_loss_is_in_its_unit_whatever_plates_say(unit, model, data, batch):
    history = fit(Trainer(model, optimizer=SGD, unit=unit), data, steps=1, batch_size=batch)
    expected = 0.5 * math.log(2 * math.pi)
    expected *= 3 if "datum" in unit else 1
    expected /= math.log(2) if "bits" in unit else 1
    assert history.losses[0] == pytest.approx(expected, rel=1e-5)
    assert history.unit == unit


def whole_latent(x):
    """A latent variable of all 60 rows, so the plate must say how many there are."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", 60, subsample=torch.arange(len(x))):
        pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)


def point(x):
    pyro.sample("w", dist.Delta(pyro.param("w_loc", torch.ones(3))).to_event(1))


@pytest.mark.parametrize(
    ("model", "guide"), [(normal, None), (whole_plate, None), (whole_latent, point)]
)
def test_accumulated_gradients_are_those_of_one_large_batch(model, guide):
    data, found = rows(60), []
    for size, accumulate in ((60, 1), (15, 4), (7, 8)):
        pyro.clear_param_store()
        kept = data[: size * accumulate]
        trainer = Trainer(model, guide, optimizer=SGD, ema=None, accumulate=accumulate)
        fit(trainer, kept, steps=1, batch_size=size)
        found.append([p.detach().clone() for _, p in trainer.program.trained()])
        if size == 7:  # 56 rows: another mean
            pyro.clear_param_store()
            trainer = Trainer(model, guide, optimizer=SGD, ema=None)
            fit(trainer, kept, steps=1)
            torch.testing.assert_close(found.pop(), [p for _, p in trainer.program.trained()])
    torch.testing.assert_close(found[0], found[1])


def test_accumulated_batches_of_unequal_size_weigh_by_their_rows():
    data = rows(10)
    loader = DataLoader(TensorDataset(data), batch_size=4)  # 4, 4 and 2 rows
    fit(Trainer(normal, optimizer=SGD, ema=None, accumulate=3), loader, steps=1)
    one = pyro.param("loc").detach().clone()
    pyro.clear_param_store()
    fit(Trainer(normal, optimizer=SGD, ema=None), data, steps=1)
    torch.testing.assert_close(one, pyro.param("loc"))


def test_clipping_by_the_global_norm():
    before = torch.zeros(4)
    data = rows() + 50
    fit(Trainer(normal, optimizer=SGD, ema=None, clip_norm=0.5), data, steps=1)
    moved = torch.cat([pyro.param("loc"), pyro.param("scale").log().view(1)]) - before
    assert float(moved.detach().norm()) == pytest.approx(0.1 * 0.5, rel=1e-4)


def test_several_optimizers_and_a_schedule():
    def optimizers(parameters):
        return [torch.optim.SGD(parameters[:1], lr=0.1), torch.optim.Adam(parameters[1:], lr=0.2)]

    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.1)
    trainer = Trainer(normal, optimizer=optimizers, schedule=schedule)
    rates = []
    fit(
        trainer,
        rows(),
        callback=lambda t: rates.append(
            [each.param_groups[0]["lr"] for each in t._updates.optimizers]
        ),
    )
    assert rates[0] == pytest.approx([0.1, 0.2]) and rates[2] == pytest.approx([0.01, 0.02])


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_tuples_are_arguments_and_dictionaries_keywords(as_dictionary):
    seen = []

    def model(x, label):
        seen.append((x, label))
        loc = pyro.param("loc", torch.zeros(2, 3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc[label], 1.0).to_event(1), obs=x)

    x, label = rows(), torch.arange(60) % 2
    data = {"label": label, "x": x} if as_dictionary else (x, label)
    fit(Trainer(model, optimizer=SGD), data, batch_size=20)
    for some, labels in seen:
        index = (x.unsqueeze(0) == some.unsqueeze(1)).all(-1).int().argmax(1)
        assert labels.equal(label[index])


def test_each_row_is_seen_once_an_epoch():
    seen = []

    def model(x):
        seen.append(x)
        normal(x)

    data = rows(30)
    fit(Trainer(model, optimizer=SGD), data, steps=6, batch_size=10)
    for epoch in (seen[1:4], seen[4:7]):  # the first run finds the parameters
        assert torch.cat(epoch).sort(0).values.equal(data.sort(0).values)
    assert not torch.cat(seen[1:4]).equal(torch.cat(seen[4:7]))


def test_bfloat16_is_for_networks_only():
    network = nn.Linear(3, 3)
    seen = []

    def model(x):
        pyro.module("network", network)
        loc = network(x)
        seen.append(loc.dtype)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc.float(), 1.0).to_event(1), obs=x)

    history = fit(Trainer(model, optimizer=SGD, autocast=torch.bfloat16), rows(), steps=20)
    assert set(seen) == {torch.bfloat16}
    assert network.weight.dtype == torch.float32
    assert history.losses[-1] < history.losses[0]


# --- validation ---------------------------------------------------------------------------------


def test_validation_has_common_noise_and_leaves_training_alone():
    def noisy(x):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc + torch.randn(3), 1.0).to_event(1), obs=x)

    def run(**arguments):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        frozen = functools.partial(torch.optim.SGD, lr=1e-12)
        return fit(Trainer(noisy, optimizer=frozen), data, steps=6, batch_size=10, **arguments)

    data = rows()
    with_validation = run(validation=data[:20], validate_every=2)
    assert list(with_validation.validations) == [2, 4, 6]
    assert len({round(v, 4) for v in with_validation.validations.values()}) == 1
    assert with_validation.losses == run().losses


def test_training_stops_and_the_best_averages_are_left():
    figures = iter([3.0, 1.0, 2.0, 2.5, 0.1])
    network, kept = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), []

    def model(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(network(x), 1.0).to_event(1), obs=x)

    def figure():
        assert not network.training and not torch.is_grad_enabled()
        kept.append(network[0].weight.detach().clone())
        return next(figures)

    trainer = Trainer(model, optimizer=SGD, ema=0.5)
    history = fit(trainer, rows(), steps=50, validation=figure, validate_every=5, patience=2)
    assert (trainer.step, history.stopped, history.best_step) == (20, "patience", 10)
    assert network[0].weight.equal(kept[1]) and not kept[1].equal(kept[3])
    assert not network.training
    # It goes on from the weights of its last step, not from the averages.
    fit(trainer, rows(), steps=21, callback=lambda t: kept.append(network.training))
    assert kept[-1] is True and len(history.losses) == 21


def test_without_validation_the_averages_of_the_last_step_are_left():
    trainer, last = Trainer(normal, optimizer=SGD, ema=0.9), []
    fit(trainer, rows(), callback=lambda t: last.append(pyro.param("loc").detach().clone()))
    assert pyro.param("loc").equal(trainer.average.average["store.loc"])
    assert not pyro.param("loc").equal(last[-1])


# --- checkpoints --------------------------------------------------------------------------------


class Killed(Exception):
    pass


def build(seed: int = 3):
    """A diffusion with dropout under everything that a run may have."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    network = nn.ModuleList([nn.Dropout(0.3)])
    process = GaussianProcess(Cosine())
    denoiser = GaussianDenoiser(MLP(2, hidden=(8,), outputs=2), process, variance=LearnedVariance())

    def model(x):
        pyro.module("denoiser", denoiser)
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = network[0](torch.ones(len(x)))
            pyro.sample("y", dist.Normal(z * scale, 1.0), obs=x[:, 0])
            pyro.sample("x", Diffusion(denoiser, (2,), steps=10), obs=x)

    schedule = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=12)
    trainer = Trainer(
        model, optimizer=ADAM, schedule=schedule, ema=0.9, clip_norm=1.0, accumulate=2
    )
    return trainer, denoiser


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SOURCES = {
    "tensor": lambda x: (x, 8),
    "loader": lambda x: (DataLoader(TensorDataset(x), batch_size=8, shuffle=True), None),
    "loader with a generator": lambda x: (
        DataLoader(TensorDataset(x), batch_size=8, shuffle=True, generator=generator(5)),
        None,
    ),
}


@pytest.mark.parametrize(
    ("source", "killed_at"),
    [("tensor", 2), ("tensor", 7), ("loader", 5), ("loader with a generator", 7)],
)
def test_a_killed_run_ends_where_it_would_have_ended(source, killed_at, tmp_path):
    x = torch.randn(40, 2)  # 5 batches an epoch, 2 a step: most checkpoints are amid an epoch

    def run(path, stop=None):
        def kill(trainer):
            if trainer.step == stop:
                raise Killed

        trainer, denoiser = build()
        data, size = SOURCES[source](x)
        history = fit(
            trainer,
            data,
            steps=8,
            batch_size=size,
            validation=x[:10],
            validate_every=3,
            checkpoint=path,
            save_every=1,
            log=path.with_suffix(".csv"),
            log_every=2,
            callback=kill,
        )
        return trainer, denoiser, history

    _, expected, whole = run(tmp_path / "whole.safetensors")
    # The callback is called before the checkpoint, so that one step is done again.
    with pytest.raises(Killed):
        run(tmp_path / "killed.safetensors", killed_at)
    _, found, history = run(tmp_path / "killed.safetensors")
    assert history.losses == whole.losses and history.validations == whole.validations
    for name, value in expected.state_dict().items():
        assert value.equal(found.state_dict()[name]), name
    with (tmp_path / "killed.csv").open() as one, (tmp_path / "whole.csv").open() as other:
        killed, uninterrupted = list(csv.DictReader(one)), list(csv.DictReader(other))
    for a, b in zip(killed, uninterrupted, strict=True):
        assert {**a, "seconds": ""} == {**b, "seconds": ""}
    # A run that is over is loaded and left.
    again, same, _ = run(tmp_path / "killed.safetensors")
    assert again.step == 8 and same.state_dict()["network.last.weight"].equal(
        found.state_dict()["network.last.weight"]
    )


def test_a_trainer_goes_on_from_where_another_took_its_run(tmp_path):
    x, path, taken = rows(), tmp_path / "run.safetensors", tmp_path / "taken.safetensors"

    class Normal(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1), obs=x)

    def goes_on(trainer, steps, path):
        history = fit(trainer, x, steps, batch_size=10, checkpoint=path)
        return [*history.losses, *trainer.program.trained()[0][1].tolist()]

    with pyro.settings.context(module_local_params=True):
        first, *others = (Trainer(Normal(), optimizer=ADAM, ema=0.9) for _ in range(3))
        goes_on(first, 2, path)
        goes_on(others[0], 4, path)  # in a process of its own, say
        shutil.copy(path, taken)
        assert goes_on(first, 6, path) == goes_on(others[1], 6, taken)


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    arguments = {"checkpoint": path, "description": {"width": 8}}
    fit(Trainer(normal, optimizer=ADAM), rows(), batch_size=10, **arguments)
    for other, change, message in (
        ({"ema": 0.5}, {}, "trainer.ema: got 0.999, expected 0.5"),
        ({}, {"batch_size": 20}, "trainer.batch_size: got 10, expected 20"),
        ({}, {"description": {"width": 9}}, "description.width: got 8, expected 9"),
    ):
        trainer = Trainer(normal, **{"optimizer": ADAM, **other})
        with pytest.raises(CheckpointError, match=message):
            fit(trainer, rows(), **{"batch_size": 10, **arguments, **change})
    with pytest.raises(ValueError, match=r"got classes \['Adam'\], expected \['SGD'\]"):
        fit(Trainer(normal, optimizer=SGD), rows(), batch_size=10, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": SGD}, "optimizers.0.0.lr: got 0.02, expected 0.1"),
        ({"T_max": 20}, "schedules.0.T_max: got 10, expected 20"),
        ({"data": rows(59)}, "trainer.rows: got 60, expected 59"),
        ({"data": rows().double()}, "trainer.dtype: got 'torch.float32', expected 'torch.float64'"),
        (
            {"data": DataLoader(rows(), batch_size=10)},
            "trainer.data: got 'tensors', expected 'Data",
        ),
    ],
)
def test_a_run_goes_on_with_nothing_else_in_secret(tmp_path, change, message):
    """Rates, schedules, data and dtypes, which the state of a checkpoint would otherwise overrule or meet."""

    def run(optimizer=SLOW, T_max=10, data=None):
        pyro.clear_param_store()
        data = rows() if data is None else data
        cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=T_max)
        torch.set_default_dtype(torch.float32 if isinstance(data, DataLoader) else data.dtype)
        trainer = Trainer(normal, optimizer=optimizer, schedule=cosine)
        size = None if isinstance(data, DataLoader) else 10
        fit(trainer, data, batch_size=size, checkpoint=tmp_path / "run.safetensors")

    run()
    try:
        with pytest.raises(ValueError, match=message):
            run(**change)
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_order_that_cannot_be_repeated_is_refused_beside_a_checkpoint(tmp_path):
    class Odd(Sampler):
        def __iter__(self):
            return iter(range(60))

        def __len__(self):
            return 60

    loader = DataLoader(TensorDataset(rows()), batch_size=10, sampler=Odd())
    fit(Trainer(normal, optimizer=SGD), loader)
    with pytest.raises(ValueError, match="checkpoint: got a DataLoader with a Odd, whose order"):
        fit(Trainer(normal, optimizer=SGD), loader, checkpoint=tmp_path / "a.safetensors")


def test_the_first_batch_goes_to_where_the_parameters_are():
    """A plain function tells only when it runs; data on the host serve parameters on a device."""
    seen = []

    class Called(Trace_ELBO):
        def differentiable_loss(self, model, guide, *args):
            return model(*args)

    def model(x):
        loc = pyro.param("loc", torch.zeros(2, device="meta"))
        seen.append(x.device.type)
        if x.device != loc.device:
            raise ValueError("two devices")
        if len(x) > 5:
            raise ValueError("too many")

    program = Program(model, lambda x: None, Called(), Unit("nats/datum"))
    program.prepare(torch.zeros(3, 2))
    assert seen == ["cpu", "meta"] and program.device.type == "meta"
    with pytest.raises(ValueError, match="too many") as caught:
        program.prepare(torch.zeros(6, 2))
    assert seen[2:] == ["cpu", "meta"] and len(caught.value.__notes__) == 1


# --- callbacks and logs -------------------------------------------------------------------------


def test_the_callback_sees_every_step_and_may_stop():
    seen = []

    def callback(trainer):
        with trainer.averaged():
            seen.append((trainer.step, len(trainer.history.losses)))
        return trainer.step == 3

    history = fit(Trainer(normal, optimizer=SGD), rows(), steps=10, callback=callback)
    assert seen == [(1, 1), (2, 2), (3, 3)] and history.stopped == "callback"


def test_there_is_a_validation_after_the_step_that_a_callback_stopped_at():
    """Weights since the validation before are not lost."""
    figures = iter([3.0, 2.0, 1.0])
    checked = {"validation": lambda: next(figures), "validate_every": 2, "patience": 1}
    trainer = Trainer(normal, optimizer=SGD, ema=None)
    history = fit(trainer, rows(), 10, callback=lambda t: t.step == 3, **checked)
    assert history.validations == {2: 3.0, 3: 2.0}
    assert (history.best_step, history.stopped) == (3, "callback")
    figures = iter([4.0])  # no second one where there was one already
    history = fit(trainer, rows(), 10, callback=lambda t: t.step == 4, **checked)
    assert history.validations == {2: 3.0, 3: 2.0, 4: 4.0}
    assert (history.best_step, history.stopped) == (3, "patience")


def test_the_table_has_means_of_losses(tmp_path):
    path = tmp_path / "log.csv"
    validated = {"validation": rows(), "validate_every": 5}
    history = fit(Trainer(normal, optimizer=SGD), rows(), 10, log=path, log_every=4, **validated)
    with path.open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["step"]) for row in table] == [4, 5, 8, 10]
    assert float(table[0]["loss"]) == pytest.approx(sum(history.losses[:4]) / 4)
    assert float(table[2]["loss"]) == pytest.approx(sum(history.losses[5:8]) / 3)
    assert [bool(row["validation"]) for row in table] == [False, True, False, True]
    assert float(table[0]["learning_rate"]) == 0.1


def test_tensorboard_is_optional(monkeypatch, tmp_path):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with pytest.raises(ValueError, match=r"log: got the folder .* expected a file"):
        fit(Trainer(normal, optimizer=SGD), rows(), log=tmp_path / "events")
    module.SummaryWriter = SummaryWriter
    fit(Trainer(normal, optimizer=SGD), rows(), 2, log=tmp_path / "events", log_every=2)
    assert written[0] == (str(tmp_path / "events"), None) and written[-1] == "closed"
    assert ("loss (nats/datum)", 2) in written and ("learning_rate", 2) in written


def test_the_bar_names_the_unit(capsys):
    Trainer(normal, optimizer=SGD, unit="bits/dim").fit(rows(), steps=2)
    assert "bits/dim" in capsys.readouterr().err


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_at_its_step(value):
    def model(x):
        loc = pyro.param("loc", torch.zeros(3))
        pyro.factor("f", (loc.sum() - x.sum()) * (value if trainer.step == 2 else 1.0))

    trainer = Trainer(model, optimizer=SGD)
    message = r"loss: got -?(nan|inf) at step 3, expected .*rate"
    with pyro.validation_enabled(False), pytest.raises(FloatingPointError, match=message):
        fit(trainer, rows())


def test_unused_parameters_are_named():
    network = nn.ModuleDict({"mean": nn.Linear(3, 3), "variance": nn.Linear(3, 3)})

    def model(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(network["mean"](x), 1.0).to_event(1), obs=x)

    with pytest.raises(
        ValueError, match=r"no gradient for \['.*variance.bias', '.*variance.weight'"
    ):
        fit(Trainer(model, optimizer=SGD), rows())
    before = network["variance"].weight.detach().clone()
    fit(Trainer(model, optimizer=ADAM, allow_unused=True), rows())
    assert network["variance"].weight.equal(before)


def test_parameters_that_appear_late_are_named():
    def model(x):
        normal(x)
        if trainer.step == 2:
            pyro.param("late", torch.zeros(()))

    trainer = Trainer(model, optimizer=SGD)
    with pytest.raises(ValueError, match=r"got parameters \['late'\] that its first run had not"):
        fit(trainer, rows())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": torch.zeros(0, 3)}, "data: got no rows"),
        ({"data": ()}, "data: got no rows"),
        ({"data": 3}, "data: got int, expected a tensor"),
        ({"data": torch.tensor(1.0)}, "data: got a scalar"),
        ({"data": (torch.ones(3), torch.ones(4))}, "rows, expected equally many"),
        ({"data": None}, "data: got None and a program with 0 plates of subsamples"),
        ({"batch_size": 61}, "batch_size: got 61, expected at most 60"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"steps": 0}, "steps: got 0"),
        ({"patience": 2}, "patience: got 2 and no validation"),
        ({"validate_every": 2}, "validate_every: got 2 and no validation"),
        ({"validation": torch.zeros(0, 3)}, "validation: got no rows"),
        ({"validation": lambda: "low"}, "validation: got str from it"),
        ({"validation": lambda: math.nan}, "validation: got nan from it"),
        ({"save_every": 2}, "save_every: got 2 and no checkpoint"),
        ({"callback": 3}, "callback: got int"),
        ({"log_every": 0}, "log_every: got 0"),
        ({"batch_size": "all"}, "batch_size: got 'all', expected an integer"),
        ({"validation": rows, "validate_every": "often"}, "validate_every: got 'often'"),
        ({"validation": DataLoader(torch.zeros(0, 3))}, "validation: got no rows"),
        ({"checkpoint": 3}, "checkpoint: got int, expected a path"),
        ({"checkpoint": "nowhere/a"}, "checkpoint: got 'nowhere/a', expected a file in a folder"),
        ({"log": "nowhere/a.csv"}, "log: got 'nowhere/a.csv', expected a file in a folder"),
        ({"checkpoint": "a", "description": "mine"}, "description: got str, expected a dict"),
        ({"checkpoint": "a", "description": {"x": rows}}, "description: got .*, expected JSON"),
    ],
)
def test_bad_arguments_of_fit(arguments, message):
    given = {"data": rows(), "steps": 3, "progress": False, **arguments}

    def model(x=None):
        normal(torch.zeros(2, 3) if x is None else x)

    with pytest.raises(ValueError, match=message):
        Trainer(model, optimizer=SGD).fit(given.pop("data"), **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": pyro.optim.Adam({"lr": 0.1})}, "optimizer: got pyro.optim.optim.PyroOptim"),
        (
            {"optimizer": torch.optim.SGD([torch.ones(1)], 0.1)},
            "optimizer: got torch.optim.sgd.SGD",
        ),
        ({"schedule": 3}, "schedule: got int"),
        ({"unit": "bits"}, "unit: got 'bits', expected \"nats/datum\""),
        ({"ema": 1.0}, "ema: got 1.0"),
        ({"clip_norm": 0.0}, "clip_norm: got 0.0"),
        ({"accumulate": 0}, "accumulate: got 0"),
        ({"autocast": "half"}, "autocast: got 'half'"),
        ({"autocast": torch.float64}, "autocast: got torch.float64, expected torch.bfloat16"),
        ({"model": dist.Normal(0.0, 1.0)}, "model: got Normal"),
        (
            {"loss": pyro.infer.TraceGraph_ELBO()},
            "loss: got TraceGraph_ELBO, expected an ELBO with",
        ),
        ({"model": 3}, "model: got int"),
        ({"guide": 3}, "guide: got int"),
    ],
)
def test_bad_arguments_of_the_trainer(arguments, message):
    with pytest.raises(ValueError, match=message):
        Trainer(**{"model": normal, "optimizer": SGD, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": torch.optim.LBFGS}, "optimizer: got LBFGS"),
        ({"optimizer": lambda p: []}, r"optimizer: got optimizers without \['loc', 'scale'\]"),
        ({"optimizer": lambda p: SGD(p[:1])}, r"optimizer: got optimizers without \['scale'\]"),
        ({"optimizer": lambda p: [SGD(p), SGD(p[1:])]}, r"with more than once \['scale'\]"),
        (
            {"optimizer": lambda p: SGD([torch.ones(1)])},
            "optimizer: got 1 tensors that the program",
        ),
        (
            {"schedule": torch.optim.lr_scheduler.ReduceLROnPlateau},
            "schedule: got ReduceLROnPlateau",
        ),
        ({"schedule": lambda optimizer: None}, "schedule: got NoneType from it"),
    ],
)
def test_optimizers_and_schedules_are_looked_at_before_a_step(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(Trainer(**{"model": normal, "optimizer": SGD, **arguments}), rows())


def test_autocast_of_double_parameters_is_refused():
    network = nn.Linear(3, 3).double()

    def model(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(network(x), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"network.weight of torch.float64, which it leaves"):
        fit(Trainer(model, optimizer=SGD, autocast=torch.bfloat16), rows().double())


def test_a_module_under_the_name_of_an_earlier_one_is_refused():
    """As when a cell of a notebook is run again: Pyro's store keeps the parameters that it has."""

    def trainer():
        network = nn.Linear(3, 3)

        def model(x):
            pyro.module("network", network)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(network(x), 1.0).to_event(1), obs=x)

        return Trainer(model, optimizer=SGD)

    fit(trainer(), rows())
    with pytest.raises(ValueError, match=r"got 'network\$\$\$bias' of another module.*clear_param"):
        fit(trainer(), rows())


def test_what_would_be_lost_between_two_calls_is_refused():
    trainer = Trainer(normal, optimizer=SGD)
    fit(trainer, rows())
    with pytest.raises(ValueError, match="steps: got 5 and a trainer that has taken 5"):
        fit(trainer, rows())
    with torch.no_grad():
        pyro.param("loc").add_(1.0)
    with pytest.raises(ValueError, match="got weights that were changed since the last call"):
        fit(trainer, rows(), steps=6)


def test_a_plate_of_neither_batch_nor_all_rows_is_refused():
    def model(x):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", 1000, subsample_size=7):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x[:7])

    with pytest.raises(ValueError, match=r"batches of 10 rows and plates of \{7: 1000\}"):
        fit(Trainer(model, optimizer=SGD), rows(), batch_size=10)


def test_two_plates_with_subsamples_of_one_size_are_refused():
    def model(x):
        scale = pyro.param("scale", torch.ones(40))
        rows = pyro.plate("data", 60, subsample=torch.arange(20), dim=-2)
        columns = pyro.plate("features", 40, subsample=torch.arange(20), dim=-1)
        with rows, columns as j:
            pyro.sample("x", dist.Normal(0.0, scale[j].exp()), obs=x)

    trainer = Trainer(model, optimizer=ADAM)
    with pytest.raises(ValueError, match=r"data: got batches of 20 rows .*\[40, 60\] in all"):
        trainer.fit(torch.randn(60, 20), steps=1, batch_size=20, progress=False)


def test_a_loader_that_can_be_read_once_is_refused_when_it_ends():
    class Once(IterableDataset):
        rows = iter(rows(20))

        def __iter__(self):
            return self.rows

    with pytest.raises(ValueError, match=r"got an empty DataLoader.*iterator that ends"):
        fit(Trainer(normal, optimizer=SGD), DataLoader(Once(), batch_size=5))


def test_true_of_numpy_stops_training():
    history = fit(Trainer(normal, optimizer=SGD), rows(), callback=lambda t: np.bool_(t.step == 2))
    assert (history.stopped, len(history.losses)) == ("callback", 2)


def test_a_program_without_parameters_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=x)

    with pytest.raises(ValueError, match="got a program without parameters to train"):
        fit(Trainer(model, optimizer=SGD), rows())
