"""Input batches of a model from what loaders give, to measure on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.errors import GoodfitError
from goodfit.rows import rows_of
from goodfit.surgery.proof import mapped

__all__ = ["device_of", "inputs"]


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def inputs(model: nn.Module, batches: Iterable[Any], samples: int | None, who: str) -> Iterator[Any]:
    """The x of batches on the model's device, until about so many rows. Every pass starts at the same random numbers."""
    if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 1):
        raise GoodfitError(f"{who} takes samples, a number of rows >= 1, got samples={samples!r}.")
    if isinstance(batches, Tensor | Mapping | tuple) or not isinstance(batches, Iterable):
        raise GoodfitError(f"{who} takes a DataLoader or a list of batches, got a {type(batches).__name__}: give [x].")
    return _stream(device_of(model), batches, samples, who)


def _stream(device: torch.device, batches: Iterable[Any], samples: int | None, who: str) -> Iterator[Any]:
    rows = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for batch in batches:
            x = mapped(_input(batch, who), lambda t: t.to(device, non_blocking=True))
            rows += rows_of(x) or 0
            yield x
            if samples is not None and rows >= samples:
                break
    if not rows:
        raise GoodfitError(f"{who} needs batches with rows, got none (a stream is empty after one pass): give a DataLoader.")


def _input(batch: Any, who: str) -> Any:
    """The x of x, [x], (x, y); a dict is keywords as it is."""
    if isinstance(batch, tuple | list):
        if not 1 <= len(batch) <= 2:
            kind = f"{type(batch).__name__} of {len(batch)}"
            raise GoodfitError(
                f"{who} takes batches x, (x, y) or dicts of keywords, got a {kind}; several inputs: ((a, b), y)."
            )
        batch = batch[0]
    if isinstance(batch, Mapping):
        return dict(batch)
    return tuple(batch) if isinstance(batch, list) else batch
