"""Rows of batches as loaders give them: tensors in nested tuples, lists and dicts, with the rows on axis 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from goodfit.errors import GoodfitError

__all__ = ["joined", "mapped", "rows_of", "to_device"]


def rows_of(batch: Any) -> int | None:
    """How many rows a batch has, by its first tensor; None where it has none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    inside = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((n for n in map(rows_of, inside) if n is not None), None)


def joined(parts: Sequence[Any]) -> Any:
    """The rows of several batches as one batch of the same form; what is no tensor must be the same in all."""
    first = parts[0]
    kinds = {type(part) for part in parts}
    if len(kinds) == 1 and isinstance(first, Tensor) and first.ndim:
        shapes = {(tuple(part.shape[1:]), part.dtype) for part in parts}
        if len(shapes) == 1:
            return torch.cat(list(parts))
        raise GoodfitError(
            f"Rows can be joined where they are of one shape, got {' and '.join(map(str, sorted(map(str, shapes))))}."
        )
    if len(kinds) == 1 and isinstance(first, Mapping) and all(part.keys() == first.keys() for part in parts):
        return {key: joined([part[key] for part in parts]) for key in first}
    if len(kinds) == 1 and isinstance(first, tuple | list):
        if hasattr(first, "_fields"):
            return type(first)(*(joined(one) for one in zip(*parts, strict=True)))
        if rows_of(first) is not None and len({len(part) for part in parts}) == 1:
            return type(first)(joined(one) for one in zip(*parts, strict=True))
        if rows_of(first) is None:  # rows that are no numbers, such as texts
            return type(first)(row for part in parts for row in part)
    if len(kinds) == 1 and isinstance(first, str | bytes | int | float | None) and all(part == first for part in parts):
        return first  # of the batch, not of a row
    shown = " and ".join(sorted(kind.__name__ for kind in kinds))
    raise GoodfitError(f"Rows can be joined in tensors, tuples, lists and dicts of them, got {shown}.")


def to_device(batch: Any, device: torch.device) -> tuple[Any, Tensor]:
    """An (x, y) batch on a device; refuses another shape of batch."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        shown = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list | dict) else type(batch).__name__
        raise GoodfitError(f"A batch must be a pair (x, y), got a {shown}.")
    if not isinstance(batch[1], Tensor):
        raise GoodfitError(
            f"The y of a batch must be a tensor, got a {type(batch[1]).__name__}; return (x, y) from the dataset."
        )
    x = tuple(batch[0]) if isinstance(batch[0], list) else batch[0]
    return mapped(x, lambda t: t.to(device, non_blocking=True)), batch[1].to(device, non_blocking=True)


def mapped(x: Any, f: Callable[[Any], Any]) -> Any:
    """Apply `f` to each tensor of a nested dict or tuple."""
    if isinstance(x, dict):
        return {k: mapped(v, f) for k, v in x.items()}
    return tuple(mapped(v, f) for v in x) if isinstance(x, tuple) else f(x)
