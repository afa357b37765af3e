"""Rows of an input batch: how many, some of them, all of them several times; and the one tensor of a model's answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from goodfit.dataflow.flows import tensors_in
from goodfit.errors import GoodfitError

__all__ = ["answer_of", "beside", "other", "repeated", "rows_of", "sliced"]


def rows_of(x: Any) -> int:
    """The length of the first axis of the first tensor that has one; 0 without."""
    return next((len(t) for t in tensors_in(x) if t.ndim), 0)


def repeated(x: Any, times: int) -> Any:
    """The whole batch several times along the first axis; what has another length there stays."""
    rows = rows_of(x)
    return mapped(x, lambda t: t.repeat(times, *[1] * (t.ndim - 1)) if t.ndim and len(t) == rows else t)


def sliced(x: Any, start: int, stop: int) -> Any:
    """The rows from start to stop."""
    rows = rows_of(x)
    return mapped(x, lambda t: t[start:stop] if t.ndim and len(t) == rows else t)


def other(x: Any) -> Any:
    """As many rows of other numbers that a model may take: the first row everywhere, reals scaled, integers turned round."""
    rows = rows_of(x)

    def changed(t: Tensor) -> Tensor:
        if not t.ndim or len(t) != rows:
            return t
        first = t[:1].expand_as(t)
        return -2 * first if t.is_floating_point() else first.flip(1) if t.ndim > 1 else first

    return mapped(x, changed)


def beside(x: Any, y: Any) -> Any:
    """The rows of x and then those of y, a batch of the same form."""
    rows, more = rows_of(x), tensors_in(y)

    def joined(t: Tensor) -> Tensor:
        following = next(more)
        return torch.cat([t, following]) if t.ndim and len(t) == rows else t

    return mapped(x, joined)


def mapped(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return f(value.detach())
    if type(value) is dict:
        return {key: mapped(one, f) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(one, f) for one in value)
    return value


def answer_of(outputs: Any) -> Tensor:
    """The tensor to predict with: the output itself, its `logits`, or the only tensor of real numbers in it."""
    logits = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if isinstance(outputs, Tensor):
        found = [outputs]
    elif isinstance(logits, Tensor):
        found = [logits]
    else:
        found = [t for t in tensors_in(outputs) if t.is_floating_point()]
    if len(found) != 1 or not found[0].is_floating_point():
        kind = type(outputs).__name__
        got = f"a {kind} with {len(found)} of them" if len(found) != 1 else str(found[0].dtype)
        raise GoodfitError(
            f"mc_predict needs a model that returns one tensor of real numbers, or logits, got {got}: wrap the model in a "
            "module that returns the one to predict with."
        )
    answer = found[0].detach()
    return answer if answer.dtype in (torch.float32, torch.float64) else answer.float()
