"""Embeddings of numbers as sines and cosines: of the noise level, of data and of places."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_diffusion.validation import check_number, check_positive_int, check_tensor

LONGEST_PERIOD = 80.0
SHORTEST_PERIOD = 1.0
LOG_SNR_BOUND = 20.0


def fourier_embedding(log_snr: Tensor, features: int) -> Tensor:
    r"""Embeds log signal-to-noise ratios as sines and cosines.

    .. math::

        e(\lambda) = (\sin \omega_k \lambda, \cos \omega_k \lambda)_{k = 1 \dots F/2}

    The :math:`\omega_k` are spaced geometrically, with periods from 80 nats (twice the range, so
    that the slowest pair tells any two levels apart) down to 1 nat. A categorical process may start
    and end exactly, at :math:`\lambda = \pm\infty`; levels are therefore clamped to [-20, 20].

    Args:
        log_snr: levels :math:`\lambda = \log(\alpha^2 / \sigma^2)` in nats, any shape, floating.
        features: number F of features, even and positive.

    Returns:
        A tensor of shape ``log_snr.shape + (features,)``, of the device and dtype of ``log_snr``, in at least
        float32: in half precision neighbouring levels would be embedded alike.

    Raises:
        ValueError: if ``features`` is odd or not positive.

    References:
        Vaswani et al. 2017, Attention Is All You Need, section 3.5.
    """
    check_tensor("log_snr", log_snr, meta=True)
    if check_positive_int("features", features) % 2:
        raise ValueError(f"features: got {features}, expected a positive even integer")
    log_snr = log_snr.to(torch.promote_types(log_snr.dtype, torch.float32))
    slow, fast = 2 * math.pi / LONGEST_PERIOD, 2 * math.pi / SHORTEST_PERIOD
    exponent = torch.linspace(0, 1, features // 2, dtype=log_snr.dtype, device=log_snr.device)
    frequency = slow * (fast / slow) ** exponent
    phase = log_snr.clamp(-LOG_SNR_BOUND, LOG_SNR_BOUND).unsqueeze(-1) * frequency
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


def distinct_levels(log_snr: Tensor) -> Tensor:
    """One row of levels (N,) that are one number, expanded, as a sampler asks about; else all of them.

    What a network computes of the level alone, for a perceptron half of its work, is then computed once. Only
    the strides are looked at, so nothing waits for a device. Levels that derivatives are asked by, row by
    row, and those of a graph that is recorded for other levels, are left as they are.
    """
    exporting = getattr(
        torch.compiler, "is_exporting", torch.compiler.is_compiling
    )  # new in torch 2.7
    recorded = torch.jit.is_tracing() or exporting()  # type: ignore[attr-defined]
    kept = log_snr.requires_grad or recorded
    expanded = not kept and log_snr.dim() == 1 and log_snr.stride(0) == 0
    return log_snr[:1] if expanded else log_snr


def with_waves(x: Tensor, frequencies: Sequence[float]) -> Tensor:
    r"""Puts sines and cosines of numbers beside them: :math:`(x, \sin \omega_k x, \cos \omega_k x)_k`.

    A network is slow to learn what varies on a scale much below one; it gets it from these at once.

    Args:
        x: numbers, shape ``(..., d)``, floating.
        frequencies: the :math:`\omega_k`, in radians per unit of x.

    Returns:
        A tensor of shape ``(..., d (1 + 2 len(frequencies)))``, in at least float32: in half precision the
        phases of high frequencies would be lost. ``x`` itself if there are no frequencies.

    References:
        Kingma et al. 2021, Variational Diffusion Models, appendix C (features at the network's input);
        Tancik et al. 2020, Fourier Features Let Networks Learn High Frequency Functions.
    """
    if not frequencies:
        return x
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    phase = torch.cat([frequency * x for frequency in frequencies], dim=-1)
    return torch.cat([x, phase.sin(), phase.cos()], dim=-1)


def check_frequencies(frequencies: object) -> tuple[float, ...]:
    """Frequencies as :func:`with_waves` takes them.

    Raises:
        ValueError: for anything but positive finite numbers.
    """
    if isinstance(frequencies, str) or not isinstance(frequencies, Sequence):
        raise ValueError(f"frequencies: got {frequencies!r}, expected a sequence of numbers > 0")
    return tuple(check_number("frequencies", each, above=0) for each in frequencies)
