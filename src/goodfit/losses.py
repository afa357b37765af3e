"""The usual loss of a task, with the shapes that are silently wrong refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import copy
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from goodfit.errors import GoodfitError
from goodfit.hyper import plain

__all__ = ["loss_of", "refuse_whole", "rowwise", "score_of", "task_of"]


def loss_of(task: str) -> Callable[[Any, Tensor], Tensor]:
    """The mean loss over the rows for a task: cross-entropy for "classes", squared error for "numbers"."""
    if task not in _LOSSES:
        raise GoodfitError(f"task must be 'classes' or 'numbers', got {task!r}; give loss=f for another.")
    return _LOSSES[task]


def task_of(y: Tensor) -> str:
    """The task that targets speak of: integers are classes, reals are numbers."""
    return "numbers" if y.is_floating_point() else "classes"


def refuse_whole(y: Tensor, who: str) -> None:
    """Refuse targets that cannot be mixed: classes by their numbers."""
    if not y.is_floating_point():
        raise GoodfitError(
            f"{who} needs y as probabilities or reals, got {y.dtype} of shape {tuple(y.shape)}; for classes: "
            "y = torch.nn.functional.one_hot(y, n_classes).to(x.dtype)."
        )


def rowwise(loss: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor] | None:
    """The same loss without its mean, where it is one of a task or torch's own; else None."""
    known: Any = loss
    if known in _KNOWN or (isinstance(known, partial) and known.func in _KNOWN and "reduction" not in known.keywords):
        return partial(known, reduction="none")
    if type(loss).__module__ == nn.MSELoss.__module__ and getattr(loss, "reduction", "") == "mean":
        apart = copy(loss)
        apart.reduction = "none"  # type: ignore[attr-defined]
        return apart
    return None


def _squared_error(outputs: Any, y: Tensor, reduction: str = "mean") -> Tensor:
    _refuse_others(outputs)
    if outputs.shape != y.shape:
        if outputs.shape != (*y.shape, 1) and (*outputs.shape, 1) != y.shape:
            raise GoodfitError(
                f"The model must return one number per target of shape {tuple(y.shape)}, got {tuple(outputs.shape)}."
            )
        y = y.reshape(outputs.shape)
    return F.mse_loss(outputs, y.to(outputs.dtype), reduction=reduction)


def _cross_entropy(outputs: Any, y: Tensor, reduction: str = "mean") -> Tensor:
    _refuse_others(outputs)
    shape = tuple(outputs.shape)
    if outputs.ndim < 2 or shape[1] < 2:
        raise GoodfitError(
            f"The model must return one score per class, (rows, classes), got {shape}; for one score between two classes "
            "give loss=, such as binary_cross_entropy_with_logits with targets of that shape."
        )
    each = (shape[0], *shape[2:])
    if y.is_floating_point():
        expected, y = shape, y.to(outputs.dtype)
    else:
        expected, y = each, (y.squeeze(1) if y.shape == (*each, 1) and len(each) == 1 else y).to(torch.int64)
    if y.shape != expected:
        got = f"{str(y.dtype).removeprefix('torch.')} of shape {tuple(y.shape)}"
        raise GoodfitError(f"Class targets must be integers of shape {each}, or probabilities of shape {shape}, got {got}.")
    return F.cross_entropy(outputs, y, reduction=reduction)


def _refuse_others(outputs: Any) -> None:
    if not isinstance(outputs, Tensor):
        raise GoodfitError(f"The model must return one tensor, got a {type(outputs).__name__}; give loss=f(outputs, y).")


_LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {"classes": _cross_entropy, "numbers": _squared_error}
_KNOWN: tuple[Callable[..., Tensor], ...] = (
    *_LOSSES.values(),
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.cross_entropy,
    F.nll_loss,
    F.poisson_nll_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
)


def score_of(value: Any, name: str = "A score") -> Tensor:
    """A score, or what `name` says, as a tensor of one number: from Python, NumPy or torch, no bool and no list."""
    number = value if isinstance(value, Tensor) and value.is_meta else plain(value)
    if type(number) is not bool and isinstance(number, Real):
        with suppress(OverflowError):  # an integer beyond all floats
            return torch.tensor(float(number), dtype=torch.float64)
    raise GoodfitError(f"{name} must be one number, got {value!r:.80} ({type(value).__name__}).")
