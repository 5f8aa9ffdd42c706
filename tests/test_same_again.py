"""One seed, one result: a killed run ends where an uninterrupted one does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def test_killed_runs_end_where_the_uninterrupted_one_ends(tmp_path: Path) -> None:
    """So do two whole runs with one seed: what a run draws before its kills, it draws as the other does."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    finish(start(whole))
    path = resumed / "checkpoint.safetensors"
    for moment in (0.0, 0.05):  # after the first checkpoint of this life, at two moments of a step
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = start(resumed)
        while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.005)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert path.exists()
    finish(start(resumed))
    assert (resumed / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
