"""How many members fit into memory at a time."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.errors import GoodfitError
from goodfit.noise import Clock, Noisy
from goodfit.surgery.running import call_model, quiet

__all__ = ["at_once", "free_bytes"]

KEPT = 5
"""Copies of a member's weights in memory: the weights, gradients, two moments, and one that a regularizer keeps."""


def at_once(model: nn.Module, members: int, example: Any, memory: float | None) -> int:
    """How many members of this kind one backward pass may hold, as one of them has run on the example; at least one.

    memory: bytes for all of it, None for half of what is free. What all members keep between steps is taken off first.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    free = free_bytes(device) / 2 if memory is None else memory
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    left = free - KEPT * held * members
    if left <= 0:
        need = f"{KEPT * held * members / 1e9:.2g} GB"
        raise GoodfitError(
            f"{members} members need {need} for weights, gradients and moments, and {free / 1e9:.2g} GB are to be had; make "
            "stacks of fewer members, one after the other, or say memory=."
        )
    return max(1, int(min(members, left / max(_passing(model, example), 1))))


def free_bytes(device: torch.device) -> float:
    """Memory that is free on a device, inf where that cannot be told."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _passing(model: nn.Module, example: Any) -> int:
    """Bytes that one forward pass keeps for its backward, weights aside."""
    model, kept = deepcopy(model), dict[int, int]()
    for module in model.modules():
        if isinstance(module, Noisy):
            module.clock = Clock()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(t: Tensor) -> Tensor:
        place = t.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = t.untyped_storage().nbytes()
        return t

    with quiet(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model.train()
        alive = call_model(model, example)
    del alive
    return sum(kept.values())
