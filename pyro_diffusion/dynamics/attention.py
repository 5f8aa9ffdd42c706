"""Attention that can be differentiated twice."""

import contextlib
import threading
from collections.abc import Iterator

from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["twice_differentiable_attention"]


class _Shared:
    """The one setting of torch's, and how many are inside."""

    lock = threading.Lock()
    inside = 0
    setting = contextlib.ExitStack()


@contextlib.contextmanager
def twice_differentiable_attention() -> Iterator[None]:
    """Have ``scaled_dot_product_attention`` computed from elementary operations within.

    The fused kernels know no second derivative. The choice of kernel is global in torch, hence the count: it
    is restored when the last thread leaves, and what other threads compute meanwhile is right as well.
    """
    with _Shared.lock:
        if not _Shared.inside:
            _Shared.setting.enter_context(sdpa_kernel(SDPBackend.MATH))
        _Shared.inside += 1
    try:
        yield
    finally:
        with _Shared.lock:
            _Shared.inside -= 1
            if not _Shared.inside:
                _Shared.setting.close()
