"""One seed, one result; and a killed run ends where an uninterrupted one does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = (
    *("--steps", "30", "--save-every", "4", "--batch", "8", "--width", "8", "--chain", "20"),
    *("--draws", "2", "--weighted-images", "2", "--weighted-steps", "4", "--weighted-samples", "2"),
    *("--samples", "4", "--no-progress"),
)


def start(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), *TINY, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first")
    finish(start(out))
    return out


def test_two_runs_with_one_seed_write_the_same_metrics(uninterrupted: Path, tmp_path: Path) -> None:
    finish(start(tmp_path))
    again = (tmp_path / "metrics.json").read_bytes()
    assert again == (uninterrupted / "metrics.json").read_bytes()


def test_killed_runs_end_where_the_uninterrupted_one_ends(
    uninterrupted: Path, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    for moment in (0.0, 0.05):  # after the first checkpoint of this life, at two moments of a step
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = start(tmp_path)
        while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.005)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert path.exists()
    finish(start(tmp_path))
    resumed = (tmp_path / "metrics.json").read_bytes()
    assert resumed == (uninterrupted / "metrics.json").read_bytes()
