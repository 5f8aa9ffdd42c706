"""Training on two processes: the gradient, the curve and the checkpoint of one; what goes wrong is said."""

import json
import os
import subprocess
import sys

import pytest
import torch


def start(size: int, folder, *names: str) -> list[subprocess.Popen]:
    command = [sys.executable, "-W", "error", "-m", "tests.distributed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder), *names],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(running: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit codes and errors."""
    try:
        return [(p.communicate(timeout=300)[1], p.returncode)[::-1] for p in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def found(size: int, folder, *names: str) -> list[dict]:
    """What every rank computed."""
    for code, errors in finish(start(size, folder, *names)):
        assert code == 0, errors
    path = folder / "_".join(names)
    return [
        json.loads(path.with_name(f"{path.name}_{r}_{size}.json").read_text()) for r in range(size)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    names = ("one_step", "curve", "loader", "numbers", "resumed", "stopped", "lazy")
    (one,) = found(1, folder, *names)
    return folder, one, found(2, folder, *names, "refusals")


def test_ranks_agree(runs):
    _, _, (first, second) = runs
    for name in ("one_step", "curve", "loader", "numbers", "resumed", "stopped", "lazy"):
        assert first[name] == second[name], name
    assert first["numbers"] == {"steps": [0, 1, 2, 3, 4, 5]}
    assert first["stopped"] == {"steps": 3, "stopped": "callback"}


def test_the_gradient_is_that_of_one_process_with_all_rows(runs):
    _, one, (two, _) = runs
    for name, value in one["one_step"].items():
        torch.testing.assert_close(two["one_step"][name], value, rtol=1e-6, atol=1e-6)


def test_batches_of_a_loader_weigh_by_their_rows(runs):
    _, one, (two, _) = runs
    first, second = two["loader"]["rows"]
    assert first != second and [first + second] == one["loader"]["rows"] == [35]
    torch.testing.assert_close(two["loader"]["loc"], one["loader"]["loc"], rtol=1e-6, atol=1e-6)


def test_two_hundred_steps_have_the_same_losses(runs):
    """Noise is keyed by row, so that they are the same but for rounding, not only on average."""
    _, one, (two, _) = runs
    losses = two["curve"]["losses"]
    torch.testing.assert_close(losses, one["curve"]["losses"], rtol=2e-3, atol=2e-3)
    assert sum(losses[-50:]) < sum(losses[:50])
    assert len(two["curve"]["validations"]) == 4


def test_a_killed_rank_ends_the_others_and_the_run_goes_on_where_it_was(runs):
    folder, _, (two, _) = runs
    (code, errors), (signal, _) = finish(start(2, folder, "killed"))
    assert signal == -9 and code != 0
    assert "RuntimeError" in errors or "DistBackendError" in errors
    again = found(2, folder, "resumed_killed")[0]["resumed_killed"]
    assert again == two["resumed"]  # bit for bit
    table = [(folder / f"{name}.csv").read_text().splitlines() for name in ("killed", "run2")]
    drop = [[line.rsplit(",", 1)[0] for line in lines] for lines in table]
    assert drop[0] == drop[1]


def test_a_checkpoint_of_two_processes_goes_on_with_one(runs, tmp_path):
    _, one, _ = runs
    finish(start(2, tmp_path, "killed"))
    (found_by_one,) = found(1, tmp_path, "resumed_killed")
    losses = found_by_one["resumed_killed"]["losses"]
    torch.testing.assert_close(losses, one["resumed"]["losses"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unequal", r"rows: got [48, 47] on ranks 0 to 1, expected the same on every rank"),
        ("too few", r"batch_size: got 48, expected at most 24, the data's rows for each of 2"),
        ("none", r"rows: got [48, 0] on ranks 0 to 1, expected the same on every rank"),
        ("empty loader", "got an empty DataLoader, expected at least one batch on every rank"),
        ("no group", r"process_group: got None in a default group of 2 processes, expected"),
        ("steps", r"steps: got [1, 2] on ranks 0 to 1"),
        ("shares", r"data: got other values on rank(s) [1] than on rank 0, expected the same"),
        ("average", "ema: got 0."),
        ("rate", "optimizers: got {'0': {'0': {'parameters': "),
        ("sampler", r"data: got a DataLoader with a SequentialSampler on 2 ranks, expected a Dist"),
    ],
)
def test_bad_shares_are_refused_on_every_rank(runs, case, message):
    for rank in runs[2]:
        assert message in rank["refusals"][case]
