"""What a model scores on data."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.errors import GoodfitError
from goodfit.fitting.data import to_device
from goodfit.processes import rank, summed, world
from goodfit.surgery.running import call_model, evaluating

__all__ = ["LossFunction", "Prepare", "evaluate", "mean_and_stderr"]

LossFunction = Callable[[Any, Tensor], Tensor]
Prepare = Callable[[Tensor], Tensor]


def evaluate(model: nn.Module, batches: Any, measure: LossFunction) -> float:
    """The mean of `measure` over the rows, in eval mode; every submodule gets its own mode back."""
    return mean_and_stderr(model, batches, measure, None)[0]


@torch.no_grad()
def mean_and_stderr(
    model: nn.Module, batches: Any, measure: LossFunction, rowwise: LossFunction | None
) -> tuple[float, float | None]:
    """The same, and the standard error of that mean: over the rows where `rowwise` gives the loss of each, else over the
    batches. None where there are too few of them to tell. Processes that train together score the batches by turns."""
    home = next(model.parameters()).device
    means: list[Tensor] = []
    sizes: list[int] = []
    each: list[Tensor] | None = None if rowwise is None else []
    with evaluating(model):
        for batch in islice(batches, rank(), None, world()):
            x, y = to_device(batch, home)
            outputs = call_model(model, x)
            means.append(measure(outputs, y).double().reshape(()))
            sizes.append(len(y))
            rows = None if rowwise is None or each is None else _rows(rowwise(outputs, y), means[-1], sizes[-1])
            each = None if rows is None or each is None else [*each, rows]
    none = torch.zeros(0, dtype=torch.float64, device=home)
    mean, weights = torch.stack(means or [none.sum()]), torch.tensor(sizes or [0.0], dtype=torch.float64, device=home)
    total, rows, unknown = summed((mean * weights).sum(), weights.sum(), each is None).tolist()
    if not rows:
        raise GoodfitError("valid has no rows; give at least one batch.")
    score = total / rows
    if unknown or each is None:
        parts, counts = mean[: len(means)], weights[: len(means)]
    else:
        parts, counts = torch.cat([none, *each]), torch.ones((), dtype=torch.float64, device=home)
    spread, number = summed((counts * (parts - score).square()).sum(), len(parts)).tolist()
    return score, None if number < 2 else math.sqrt(spread / (number - 1) / rows)


def _rows(losses: Tensor, mean: Tensor, count: int) -> Tensor | None:
    """The loss of each row, None where their mean is not that of the batch: the loss weighs its rows, say."""
    if losses.ndim == 0 or len(losses) != count or not count:
        return None
    rows = losses.double().reshape(count, -1).mean(1)
    close = torch.isclose(rows.mean(), mean, rtol=torch.finfo(losses.dtype).eps ** 0.5, atol=0.0, equal_nan=True)
    return rows if close else None
