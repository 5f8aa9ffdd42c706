"""Checkpoints: round trips, damage, other models, kills."""

import fcntl
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyro
import pytest
import safetensors
import safetensors.torch
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_diffusion import checkpoint
from pyro_diffusion.checkpoint import CheckpointError, files
from pyro_diffusion.checkpoint.saving import restore_module
from pyro_diffusion.optim import EMA


@pytest.fixture(autouse=True)
def seed():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        assert [type(key) for key in found] == [type(key) for key in expected]
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, torch.Tensor | np.ndarray):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        equal = found == expected
        assert (equal | ((found != found) & (expected != expected))).all()
    else:
        assert found == expected or (found != found and expected != expected)


class Pair(NamedTuple):
    first: int
    second: float


VALUES = {
    "scalars": {"none": None, "yes": True, "int": -3, "big": 2**80, "text": "naïve \ud800 {}"},
    "floats": {"all": [0.1, 1e-320, -0.0, 1e308, float("inf"), -float("inf"), float("nan")]},
    "nested": {"a": [1, (2, [3, ()], {}), {"b": ({},)}], "": {"": []}},
    "keys": {0: "int", "0": "str", 1.5: 1, None: 2, (1, "a", (True,)): 3, float("inf"): 4},
    "tagged": {"tensor": "no tensor", "dict": [["a", 1]], "float": {"float": "inf"}},
    "tensors": {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "double": torch.randn(2, 3, dtype=torch.float64),
        "half": torch.randn(3).half(),
        "bfloat": torch.randn(3).bfloat16(),
        "int": torch.arange(5),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "complex": torch.randn(2, dtype=torch.complex64),
        "conjugate": torch.randn(2, dtype=torch.complex64).conj(),
        "nan": torch.tensor([float("nan"), float("inf")]),
    },
    "strides": {
        "transposed": torch.randn(3, 4).T,
        "expanded": torch.randn(3, 1).expand(3, 4),
        "sliced": torch.randn(10)[::3],
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    },
    "names": {
        "a/b": torch.ones(1),
        "a": {"b": torch.zeros(2), "b#2": torch.ones(3)},
        "__metadata__": torch.ones(2),
        1: torch.ones(1),
        "1": torch.zeros(1),
        "list": [torch.ones(1), torch.zeros(2)],
        "": torch.ones(4),
    },
    "metadata": {"__metadata__": torch.ones(2)},
    "arrays": {
        "float": np.linspace(0, 1, 3),
        "int": np.arange(4, dtype=np.uint32),
        "scalar": np.array(2.0),
        "empty": np.zeros((0, 2)),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    },
    "random": {},
    "nothing": {},
}
VALUES["random"] = pyro.util.get_rng_state()


@pytest.mark.parametrize("name", VALUES)
def test_round_trip(tmp_path, name):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, VALUES[name])
    assert_same(checkpoint.load(path), VALUES[name])
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_what_changes_type(tmp_path):
    path = tmp_path / "a.safetensors"
    parameter = nn.Parameter(torch.ones(2))
    state = {
        "ordered": OrderedDict(b=1, a=2),
        "named": Pair(1, 2.0),
        "numpy": [np.float64(0.1), np.int64(3), np.bool_(True), np.float32(0.5)],
        "parameter": parameter,
    }
    checkpoint.save(str(path), state)
    expected = {
        "ordered": {"b": 1, "a": 2},
        "named": (1, 2.0),
        "numpy": [0.1, 3, True, 0.5],
        "parameter": torch.ones(2),
    }
    assert_same(checkpoint.load(str(path)), expected)


def test_shared_memory_comes_back_apart(tmp_path):
    path = tmp_path / "a.safetensors"
    base = torch.arange(6.0)
    checkpoint.save(path, {"base": base, "same": base, "view": base[2:4]})
    state = checkpoint.load(path)
    state["base"].zero_()
    assert torch.equal(state["same"], base) and torch.equal(state["view"], base[2:4])


def test_loaded_tensors_do_not_follow_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"a": torch.ones(1000)})
    state = checkpoint.load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert (state["a"] == 1).all()


@pytest.mark.parametrize(
    "state, where",
    [
        ({"a": [1, object()]}, r"state\['a'\]\[1\]: got object, expected"),
        ({"a": {1, 2}}, r"state\['a'\]: got set"),
        ({"a": b"bytes"}, r"state\['a'\]: got bytes"),
        ({"f": lambda: 0}, r"state\['f'\]: got function"),
        ({"a": torch.ones(2).to_sparse()}, r"state\['a'\]: got torch.sparse_coo"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, r"state\['a'\]: got .*complex128"),
        ({"a": np.array(["x"])}, r"state\['a'\]: got an array of <U1"),
        ({torch.ones(1): 1}, "key tensor"),
        ([1], "state: got list, expected a mapping"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path, state, where):
    path = tmp_path / "a.safetensors"
    with pytest.raises(TypeError, match=where):
        checkpoint.save(path, state)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("description", [{"a": object()}, {"a": float("nan")}])
def test_description_is_json(tmp_path, description):
    path = tmp_path / "a.safetensors"
    with pytest.raises(TypeError, match="description: got"):
        checkpoint.save(path, {}, description)
    checkpoint.save(path, {})
    with pytest.raises(TypeError, match="description: got"):
        checkpoint.load(path, description)


DESCRIPTION = {"model": "UNet", "network": {"width": 32, "levels": (1, 2)}, "steps": 1000}


def test_description(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"n": 1}, DESCRIPTION)
    assert checkpoint.load(path, DESCRIPTION) == {"n": 1}
    assert checkpoint.load(path) == {"n": 1}
    assert checkpoint.saving.read_description(path)["network"] == {"width": 32, "levels": [1, 2]}
    other = {"model": "MLP", "network": {"width": 64, "levels": [1, 2]}, "data": "moons"}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path, other)
    message = str(caught.value)
    assert str(path) in message and "levels" not in message
    assert "model: got 'UNet', expected 'MLP'" in message
    assert "network.width: got 32, expected 64" in message
    assert "steps: got 1000, expected none" in message
    assert "data: got none, expected 'moons'" in message
    with pytest.raises(CheckpointError, match="model: got 'UNet', expected none"):
        checkpoint.load(path, {})


def test_safetensors_readers_see_names_and_description(tmp_path):
    path = tmp_path / "a.safetensors"
    module = nn.Sequential(nn.Linear(2, 3))
    checkpoint.save_module(path, module, {"width": 3})
    plain = safetensors.torch.load_file(path)
    assert set(plain) == {"0.weight", "0.bias"}
    assert torch.equal(plain["0.weight"], module[0].weight)
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["pyro_diffusion"])["description"] == {"width": 3}


def test_same_state_same_bytes(tmp_path):
    state = {"b": torch.ones(2), "a": [torch.zeros(3), 1.5]}
    checkpoint.save(tmp_path / "a", state, {"x": 1, "y": 2})
    checkpoint.save(tmp_path / "b", state, {"x": 1, "y": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- damage


def saved(tmp_path):
    path = tmp_path / "a.safetensors"
    state = {"module": {"weight": torch.randn(5, 7)}, "epoch": 3, "loss": [0.1, 0.25]}
    checkpoint.save(path, state, {"width": 3})
    return path, path.read_bytes()


def test_truncated_anywhere(tmp_path):
    path, data = saved(tmp_path)
    header = 8 + int.from_bytes(data[:8], "little")
    offsets = {0, 1, 7, 8, 9, 20, header // 2, header - 1, header, header + 1, len(data) - 1}
    for offset in offsets:
        path.write_bytes(data[:offset])
        with pytest.raises(CheckpointError, match=r"a\.safetensors: truncated, damaged"):
            checkpoint.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


def test_every_flipped_bit_is_noticed(tmp_path):
    path, data = saved(tmp_path)
    expected = checkpoint.load(path)
    generator = random.Random(0)
    for offset in range(len(data)):
        damaged = bytearray(data)
        damaged[offset] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            state = checkpoint.load(path, {"width": 3})
        except CheckpointError:
            continue
        # padding of the header is the only thing that may change unnoticed
        assert_same(state, expected)


@pytest.mark.parametrize("content", [b"", b"plain text, and not a short one", b"\xff" * 64])
def test_other_files(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated, damaged or no safetensors"):
        checkpoint.load(path)


def test_pickles_are_not_opened(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"got a pickle, .* never loaded"):
        checkpoint.load(path)


def test_plain_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="without a pyro_diffusion header"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "header",
    [
        "not json",
        "[]",
        "{}",
        "[" * 100_000,
        '{"version": 1, "description": {}, "state": 1, "checksum": 0}',
    ],
)
def test_hostile_headers(tmp_path, header):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({}, path, metadata={"pyro_diffusion": header})
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "state",
    [
        1,
        {"pickle": "x"},
        {"dict": [[1]]},
        {"dict": [[{"list": []}, 1]]},
        {"dict": [["a", {"tensor": "x"}]]},
        {"dict": [["a", {"float": "one"}]]},
        {"dict": [["a", {"tensor": 1}]]},
        {"dict": [["a", []]]},
        {"list": []},
    ],
)
def test_hostile_states(tmp_path, state):
    path = tmp_path / "a.safetensors"
    header = {"version": 1, "description": {}, "state": state}
    header["checksum"] = files.checksum(header, {})
    safetensors.torch.save_file({}, path, metadata={"pyro_diffusion": json.dumps(header)})
    with pytest.raises(CheckpointError, match="damaged, the stored state does not fit"):
        checkpoint.load(path)


def test_later_version(tmp_path):
    path = tmp_path / "a.safetensors"
    header = {"version": 2, "description": {}, "state": {"dict": []}}
    header["checksum"] = files.checksum(header, {})
    safetensors.torch.save_file({}, path, metadata={"pyro_diffusion": json.dumps(header)})
    with pytest.raises(CheckpointError, match="got format version 2, expected 1"):
        checkpoint.load(path)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file") as caught:
        checkpoint.load(tmp_path / "none")
    assert caught.value.filename == str(tmp_path / "none")


def test_what_cannot_be_opened_is_no_missing_file(tmp_path, monkeypatch):
    with pytest.raises(IsADirectoryError):
        checkpoint.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # reading from it would wait for a writer
    with pytest.raises(CheckpointError, match="pipe: not a regular file"):
        checkpoint.load(tmp_path / "pipe")

    def refuse(path, flags):
        raise PermissionError(13, "Permission denied", path)

    path, _ = saved(tmp_path)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match="denied"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "text, error",
    [
        (b"[],", "header of 60000000 bytes, expected at most 33554432"),
        (b'{"a": {}},', "got 12000000 lists and mappings, expected at most 500000"),
    ],
)
def test_huge_headers_are_refused_before_they_are_parsed(tmp_path, monkeypatch, text, error):
    if b"a" in text:
        monkeypatch.setattr(files, "MAX_HEADER_BYTES", 2**30)
    path = tmp_path / "a.safetensors"
    inner = text * (60_000_000 // len(text))
    path.write_bytes(len(inner).to_bytes(8, "little") + inner)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=error):
            checkpoint.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (1 if b"a" not in text else 61) * 2**20


def test_a_tensor_that_is_not_there_is_not_waited_for(tmp_path):
    """The size of the file is compared with the header before the tensors are read."""
    path, _ = saved(tmp_path)
    with open(path, "r+b") as file:
        file.truncate(2**40)  # sparse: a terabyte of zeros that takes no space
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        checkpoint.load(path)


def test_what_could_not_be_loaded_is_not_saved(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    losses = {"losses": [0.123456789] * 100_000}
    checkpoint.save(path, losses)
    assert checkpoint.load(path) == losses
    monkeypatch.setattr(files, "MAX_HEADER_BYTES", 1_000_000)
    monkeypatch.setattr(files, "MAX_HEADER_BRACKETS", 10_000)
    with pytest.raises(ValueError, match=r"state: got a header of 1\d* bytes, expected at most"):
        checkpoint.save(path, losses)
    with pytest.raises(ValueError, match=r"state: got 1\d* lists and mappings, expected at most"):
        checkpoint.save(path, {"a": [{} for _ in range(5_000)]})
    assert os.listdir(tmp_path) == ["a.safetensors"]


# --- several processes


WRITE = """
import sys, torch
from pyro_diffusion import checkpoint
path, me, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
print("go", flush=True)
for n in range(count):
    checkpoint.save(path, {"by": me, "n": n, "x": torch.full((30_000,), float(n))})
"""


def test_two_writers_and_a_reader(tmp_path):
    """Every save succeeds, every load sees one whole checkpoint, and nothing is left over."""
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"by": 0, "n": 0, "x": torch.zeros(30_000)})

    def write(process):  # as the other process does, for as long
        n = 0
        while process.poll() is None:
            n += 1
            checkpoint.save(path, {"by": 1, "n": n, "x": torch.full((30_000,), float(n))})

    seen = set()
    with (
        subprocess.Popen(
            [sys.executable, "-c", WRITE, str(path), "2", "60"], stdout=subprocess.PIPE, text=True
        ) as process,
        ThreadPoolExecutor(1) as pool,
    ):
        assert process.stdout.readline() == "go\n"
        writer = pool.submit(write, process)
        while not writer.done():
            state = checkpoint.load(path)
            assert (state["x"] == state["n"]).all()
            seen.add(state["by"])
        writer.result()
    assert process.returncode == 0 and {1, 2} <= seen
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_threads_of_one_process(tmp_path):
    path = tmp_path / "a.safetensors"

    def write(n):
        checkpoint.save(path, {"n": n, "x": torch.full((3000,), float(n))})
        state = checkpoint.load(path)
        return bool((state["x"] == state["n"]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write, range(200)))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_header_and_tensors_are_of_one_file(tmp_path, monkeypatch):
    """A checkpoint that is replaced while it is being read is read to its end."""
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"n": 1, "x": torch.ones(5)})
    read_metadata = files._read_metadata

    def replaced_meanwhile(*args):
        found = read_metadata(*args)
        checkpoint.save(path, {"n": 2, "more": 0, "x": torch.full((9,), 2.0)})
        return found

    monkeypatch.setattr(files, "_read_metadata", replaced_meanwhile)
    assert_same(checkpoint.load(path), {"n": 1, "x": torch.ones(5)})
    assert checkpoint.load(path)["n"] == 2


def test_planted_links_are_not_followed(tmp_path, monkeypatch):
    path, other = tmp_path / "a.safetensors", tmp_path / "other"
    other.write_text("precious")
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0" * 2 * size)
    for name in (".a.safetensors.tmp", ".a.safetensors.0000000000000000.tmp"):
        (tmp_path / name).symlink_to(other)
    with pytest.raises(FileExistsError):
        checkpoint.save(path, {"n": 1})
    monkeypatch.undo()
    checkpoint.save(path, {"n": 1})
    assert checkpoint.load(path) == {"n": 1} and other.read_text() == "precious"


def test_mode_is_that_of_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "a.safetensors", {})
    finally:
        os.umask(previous)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_files_of_other_writers_stay(tmp_path):
    """One that is being written is locked; one of another name is none of ours."""
    path = tmp_path / "a.safetensors"
    names = [
        ".a.safetensors.notes.tmp",
        ".b.safetensors.tmp",
        ".a.safetensors.0000000000000000.tmp",
    ]
    for name in names:
        (tmp_path / name).write_text("x")
    with open(tmp_path / names[-1]) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        checkpoint.save(path, {})
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "a.safetensors"])
    checkpoint.save(path, {})
    assert sorted(os.listdir(tmp_path)) == sorted([*names[:-1], "a.safetensors"])


# --- kills


def test_left_over_temporary_file_is_harmless(tmp_path):
    path, data = saved(tmp_path)
    (tmp_path / ".a.safetensors.tmp").write_bytes(data[: len(data) // 2])
    assert checkpoint.load(path)["epoch"] == 3
    checkpoint.save(path, {"epoch": 4})
    assert checkpoint.load(path) == {"epoch": 4}
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch, broken):
    path, data = saved(tmp_path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"epoch": 4})
    assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["a.safetensors"]


WRITER = """
import sys, torch
from pyro_diffusion import checkpoint
n = 0
while True:
    n += 1
    checkpoint.save(sys.argv[1], {"n": n, "x": torch.full((300_000,), float(n))})
    if n == 1:
        print("go", flush=True)
"""


def test_killed_writer_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "a.safetensors"
    generator = random.Random(0)
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline() == "go\n"
            time.sleep(generator.uniform(0.0, 0.05))
            process.send_signal(signal.SIGKILL)
        state = checkpoint.load(path)
        assert (state["x"] == state["n"]).all()
    checkpoint.save(path, {})
    assert os.listdir(tmp_path) == ["a.safetensors"]


# --- modules


def test_module_round_trip(tmp_path):
    path = tmp_path / "a.safetensors"
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    module(torch.randn(4, 2, dtype=torch.float64))
    checkpoint.save_module(path, module, {"width": 3})
    other = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    checkpoint.load_module(path, other, {"width": 3})
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    with pytest.raises(CheckpointError, match="width: got 3, expected 4"):
        checkpoint.load_module(path, other, {"width": 4})


def test_module_of_another_kind_is_refused_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save_module(path, nn.ModuleDict({"a": nn.Linear(2, 3), "c": nn.Linear(1, 1)}))
    other = nn.ModuleDict({"b": nn.Linear(2, 3, bias=False), "a": nn.Linear(2, 4)})
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_module(path, other)
    message = str(caught.value)
    assert "misses b.weight" in message
    assert "has unexpected c.weight" in message
    assert "a.weight has shape (3, 2), expected (4, 2)" in message
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_restore_module_wants_tensors():
    module = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"part: .*weight has shape int"):
        restore_module(module, {"weight": 1, "bias": torch.zeros(1)}, name="part")


# --- training


class Training:
    """A regression through SVI, with everything a run is made of."""

    def __init__(self, kind):
        pyro.clear_param_store()
        pyro.set_rng_seed(7)
        self.network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.kind = kind
        if kind == "Adam":
            self.optimizer = pyro.optim.Adam({"lr": 0.01, "betas": (0.9, 0.99)})
        elif kind == "ClippedAdam":
            self.optimizer = pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.99})
        elif kind == "SGD":
            self.optimizer = pyro.optim.SGD({"lr": 0.01, "momentum": 0.9})
        else:
            options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}}
            schedules = {
                "ExponentialLR": {"gamma": 0.9},
                "MultiStepLR": {"milestones": [3, 6]},
                "OneCycleLR": {"max_lr": 0.05, "total_steps": 50},
                "ReduceLROnPlateau": {"patience": 1},
            }
            self.optimizer = getattr(pyro.optim, kind)({**options, **schedules[kind]})
        self.svi = SVI(self.model, lambda x, y: None, self.optimizer, Trace_ELBO())
        self.ema = EMA(self.network)
        self.losses = []

    def model(self, x, y):
        network = pyro.module("network", self.network)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(network(x).squeeze(-1), 0.3), obs=y)

    def run(self, steps):
        for _ in range(steps):
            x = torch.randn(16, 2)
            self.losses.append(self.svi.step(x, x.sum(1)))
            self.ema.update()
            if hasattr(self.optimizer, "step"):
                plateau = self.kind == "ReduceLROnPlateau"
                self.optimizer.step(*[self.losses[-1]] if plateau else [])

    def save(self, path):
        state = {
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.get_state(),
            "random": pyro.util.get_rng_state(),
            "losses": self.losses,
        }
        checkpoint.save(path, state, {"kind": self.kind})
        return state

    def resume(self, path):
        state = checkpoint.load(path, {"kind": self.kind})
        restore_module(self.network, state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.set_state(state["optimizer"])
        self.losses = state["losses"]
        pyro.util.set_rng_state(state["random"])


KINDS = [
    "Adam",
    "ClippedAdam",
    "SGD",
    "ExponentialLR",
    "MultiStepLR",
    "OneCycleLR",
    "ReduceLROnPlateau",
]


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_is_the_uninterrupted_one(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    whole = Training(kind)
    whole.run(10)
    whole.save(tmp_path / "whole")

    first = Training(kind)
    first.run(4)
    state = first.save(path)
    if kind in ("Adam", "ClippedAdam", "SGD"):  # schedulers' states hold subclasses of dict
        assert_same(checkpoint.load(path)["optimizer"], state["optimizer"])
    del first
    second = Training(kind)
    second.resume(path)
    second.run(6)
    second.save(tmp_path / "resumed")
    assert second.losses == whole.losses
    resumed, uninterrupted = (checkpoint.load(tmp_path / name) for name in ("resumed", "whole"))
    # SVI hands parameters over as a set, so the optimizer meets them in any order
    assert_same(*(dict(sorted(each.pop("optimizer").items())) for each in (resumed, uninterrupted)))
    assert_same(resumed, uninterrupted)
