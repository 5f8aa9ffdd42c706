"""What a piece of work takes: seconds, and the most memory that is held meanwhile."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, REFRESH = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Used:
    """Filled in at the end.

    Attributes:
        seconds: of processor time, which other work on the machine does not change; on a GPU by the clock.
        memory: largest resident memory, MiB, all of the process, on a GPU what tensors hold there; NaN where
            the system does not say.
    """

    seconds: float = float("nan")
    memory: float = float("nan")


@contextmanager
def used(device: torch.device) -> Iterator[Used]:
    """Measures the body, which works on a device."""
    result = Used()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        yield result
        torch.cuda.synchronize(device)
        result.seconds = time.perf_counter() - start
        result.memory = torch.cuda.max_memory_allocated(device) / 2**20
        return
    if REFRESH.exists():
        REFRESH.write_text("5")  # the high-water mark starts anew
    start = time.process_time()
    yield result
    result.seconds = time.process_time() - start
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM"):
                result.memory = int(line.split()[1]) / 1024
