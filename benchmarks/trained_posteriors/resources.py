"""What a piece of work takes: processor seconds, and the most memory that the process holds meanwhile."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATUS, REFRESH = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Used:
    """Filled in at the end.

    Attributes:
        seconds: of processor time, which other work on the machine does not change.
        memory: largest resident memory, MiB, all of the process; NaN where the system does not say.
    """

    seconds: float = float("nan")
    memory: float = float("nan")


@contextmanager
def used() -> Iterator[Used]:
    """Measures the body."""
    result = Used()
    if REFRESH.exists():
        REFRESH.write_text("5")  # the high-water mark starts anew
    start = time.process_time()
    yield result
    result.seconds = time.process_time() - start
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM"):
                result.memory = int(line.split()[1]) / 1024
