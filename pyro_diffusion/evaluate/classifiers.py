"""Many small networks that tell two samples apart, trained in one batch."""

import itertools
import math

import torch
from torch import Tensor, nn

__all__ = ["Layers", "fit_classifiers", "scores"]

Layers = list[tuple[Tensor, Tensor]]


def fit_classifiers(
    rows: Tensor,
    labels: Tensor,
    weights: Tensor,
    width: int,
    iterations: int,
    learning_rate: float,
) -> Layers:
    """Networks of two hidden layers, by full-batch AdamW on the weighted cross-entropy.

    Args:
        rows: (n, size), what all networks see.
        labels: (networks, n), 0 or 1.
        weights: (networks, n), of the terms of each network's loss.
        width: of the hidden layers.
        iterations: of the optimizer.
        learning_rate: likewise.
    """
    sizes = [rows.shape[1], width, width, 1]
    count = len(labels)
    layers = [
        (_uniform(count, a, b, rows), rows.new_zeros(count, 1, b).requires_grad_())
        for a, b in itertools.pairwise(sizes)
    ]
    optimizer = torch.optim.AdamW(
        [p for layer in layers for p in layer], lr=learning_rate, weight_decay=1e-2
    )
    with torch.enable_grad():
        for _ in range(iterations):
            loss = nn.functional.binary_cross_entropy_with_logits(
                scores(rows, layers), labels, weight=weights, reduction="sum"
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return layers


def scores(rows: Tensor, layers: Layers) -> Tensor:
    """Logits that a row is of the second sample, (networks, n)."""
    hidden = rows
    for weight, bias in layers[:-1]:
        hidden = torch.relu(hidden @ weight + bias)
    weight, bias = layers[-1]
    return (hidden @ weight + bias).squeeze(-1)


def _uniform(count: int, inputs: int, outputs: int, like: Tensor) -> Tensor:
    bound = math.sqrt(6 / inputs)
    weight = torch.rand(count, inputs, outputs, dtype=like.dtype, device=like.device)
    return ((2 * weight - 1) * bound).requires_grad_()
