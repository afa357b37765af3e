"""Rows of inputs: how many, some of them, all of them several times; and the one tensor of a model's answer.

Inputs are what a model is called with: (positions, keywords).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from goodfit.dataflow.flows import tensors_in
from goodfit.errors import GoodfitError
from goodfit.sampling.kept import fresh
from goodfit.surgery.proof import mapped

__all__ = [
    "answer_of",
    "between",
    "call_with",
    "few",
    "form_of",
    "inputs_of",
    "is_empty",
    "other",
    "repeated",
    "rows_of",
    "sliced",
]

_FEW = 4


def inputs_of(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One input batch as positions and keywords: a dict goes in as keywords, a tuple as positions, else as it is."""
    if isinstance(x, dict):
        return (), dict(x)
    return (tuple(x) if isinstance(x, tuple) else (x,)), {}


def call_with(model: nn.Module, inputs: Any) -> Any:
    """Run a model on copies of its inputs."""
    args, kwargs = inputs
    return model(*fresh(args), **fresh(kwargs))


def is_empty(x: Any) -> bool:
    """Whether there are tensors with rows, and none has any."""
    lengths = [len(t) for t in tensors_in(x) if t.ndim]
    return bool(lengths) and not any(lengths)


def few(x: Any) -> Any:
    """The first rows of many, where every tensor has as many rows, so that no index points to one that is gone; else x."""
    rows = rows_of(x)
    first = sliced(x, 0, _FEW)
    return first if rows > _FEW and all(t.ndim and len(t) == _FEW for t in tensors_in(first)) else x


def form_of(x: Any) -> Any:
    """What inputs share that differ in numbers and in the count of their rows alone; objects unknown here are like no other."""
    rows = rows_of(x)

    def form(value: Any) -> Any:
        if isinstance(value, Tensor):
            whole = value.ndim > 0 and len(value) == rows
            return whole, value.shape[1:] if whole else value.shape, value.dtype, value.device
        if type(value) is dict:
            return tuple((key, form(one)) for key, one in value.items())
        if type(value) in (list, tuple):
            return type(value), tuple(form(one) for one in value)
        return (type(value), value) if isinstance(value, str | int | float | None) else object()

    return form(x)


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


def other(x: Any, count: int, more: bool) -> Any:
    """Rows of other numbers that a model may take, all alike: reals changed, integers turned round or as they are."""
    rows = rows_of(x)

    def changed(t: Tensor) -> Tensor:
        if not t.ndim or len(t) != rows:
            return t
        row = (t[-1:] if more else t[:1]).expand(count, *t.shape[1:])
        if t.is_floating_point():
            return 5 * row + 1 if more else -2 * row
        return row if more or t.ndim == 1 else row.flip(1)

    return mapped(x, changed)


def between(before: Any, x: Any, after: Any) -> Any:
    """The rows of x between those of others of its form."""
    rows, above, below = rows_of(x), tensors_in(before), tensors_in(after)

    def joined(t: Tensor) -> Tensor:
        parts = [next(above), t, next(below)]
        return torch.cat(parts) if t.ndim and len(t) == rows else t

    return mapped(x, joined)


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
