"""The usual loss of a task, with the shapes that are silently wrong refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from goodfit.errors import GoodfitError, nearest

__all__ = ["loss_of", "task_of"]


def loss_of(task: str) -> Callable[[Any, Tensor], Tensor]:
    """The mean loss over the rows for a task: cross-entropy for "classes", squared error for "numbers"."""
    if task not in _LOSSES:
        raise GoodfitError(f"task must be 'classes' or 'numbers', got {task!r}; {nearest(str(task), _LOSSES)}")
    return _LOSSES[task]


def task_of(y: Tensor) -> str:
    """The task that targets speak of: integers are classes, reals are numbers."""
    return "numbers" if y.is_floating_point() else "classes"


def _squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    if outputs.shape != y.shape:
        if outputs.shape != (*y.shape, 1) and (*outputs.shape, 1) != y.shape:
            raise GoodfitError(
                f"The model must return one number per target of shape {tuple(y.shape)}, got {tuple(outputs.shape)}."
            )
        y = y.reshape(outputs.shape)
    return F.mse_loss(outputs, y)


def _cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    if not y.is_floating_point():
        y = y.to(torch.int64)
        if outputs.ndim < 2:
            raise GoodfitError(f"The model must return one score per class, (rows, classes), got {tuple(outputs.shape)}.")
    return F.cross_entropy(outputs, y)


_LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {"classes": _cross_entropy, "numbers": _squared_error}
