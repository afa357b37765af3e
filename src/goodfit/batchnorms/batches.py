"""Input batches of a model from what loaders give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.dataflow.flows import tensors_in
from goodfit.errors import GoodfitError

__all__ = ["inputs"]


def inputs(model: nn.Module, batches: Iterable[Any], samples: int | None) -> Iterator[Any]:
    """What the model is to be run on, on its device, until about so many rows. Every pass starts at the same random numbers."""
    device = next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    rows = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for batch in batches:
            x = _moved(_input(batch), device)
            rows += next((len(t) for t in tensors_in([x]) if t.ndim), 0)
            yield x
            if samples is not None and rows >= samples:
                break
    if not rows:
        raise GoodfitError(
            "recalibrate needs batches with rows, got none (a stream is empty after one pass): give a DataLoader."
        )


def _input(batch: Any) -> Any:
    """The x of x, [x], (x, y); a dict is keywords as it is."""
    if isinstance(batch, tuple | list):
        if not 1 <= len(batch) <= 2:
            kind = f"{type(batch).__name__} of {len(batch)}"
            raise GoodfitError(
                f"A batch must be x, (x, y) or a dict of keywords, got a {kind}; several inputs go as ((a, b), y)."
            )
        batch = batch[0]
    if isinstance(batch, Mapping):
        return dict(batch)
    return tuple(batch) if isinstance(batch, list) else batch


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device, non_blocking=True)
    if isinstance(x, dict):
        return {key: _moved(value, device) for key, value in x.items()}
    return type(x)(_moved(value, device) for value in x) if type(x) in (tuple, list) else x
