"""The network for tables: a multilayer perceptron, bare; norms and dropout come with the cocktail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["mlp", "outputs_of", "pinned"]

ROWS_AT_ONCE = 1024


def mlp(inputs: int, outputs: int, *, width: int = 256, depth: int = 2, seed: int = 0) -> nn.Sequential:
    """inputs → width → … → width → outputs with ReLU between, initialised from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, outputs))


@torch.no_grad()
def outputs_of(model: nn.Module, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The model's outputs in eval mode, row by row the same bits however many rows there are.

    A matrix product may round otherwise for another number of rows, so each goes through in blocks of one size.
    """
    model.eval()
    device = next(model.parameters()).device
    blocks = []
    for start in range(0, len(x), ROWS_AT_ONCE):
        block = torch.zeros(ROWS_AT_ONCE, x.shape[1])
        rows = torch.from_numpy(x[start : start + ROWS_AT_ONCE])
        block[: len(rows)] = rows
        blocks.append(model(block.to(device))[: len(rows)].cpu())
    return torch.cat(blocks).numpy() if blocks else np.empty((0, 0), dtype=np.float32)


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """So many threads of torch within, and as many as before afterwards; another number rounds otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
