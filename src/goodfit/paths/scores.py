"""How good each λ is: validation loss and its standard error, over the rows or over the folds; and which λ that chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap

from goodfit.fitting.data import mapped, to_device
from goodfit.fitting.loop import LossFunction
from goodfit.surgery.running import call_model, evaluating

__all__ = ["best_of", "one_se_of", "over_folds", "spread"]


@torch.no_grad()
def spread(model: nn.Module, batches: Any, measure: LossFunction) -> float:
    """The standard error of the mean loss over the rows; nan where the loss cannot take a single row."""
    home = next(model.parameters()).device
    rows: list[Tensor] = []
    with evaluating(model):
        for batch in batches:
            x, y = to_device(batch, home)
            rows.append(_of_each_row(call_model(model, x), y, measure))
    every = torch.cat(rows).double()
    return float(every.std() / math.sqrt(len(every))) if len(every) > 1 else math.nan


def _of_each_row(outputs: Any, y: Tensor, measure: LossFunction) -> Tensor:
    def alone(output: Any, target: Tensor) -> Tensor:
        return measure(mapped(output, lambda t: t[None]), target[None]).reshape(())

    try:
        return vmap(alone)(outputs, y)
    except (RuntimeError, ValueError, TypeError):  # a loss that looks at values, say
        pass
    try:
        return torch.stack([alone(mapped(outputs, lambda t, i=i: t[i]), y[i]) for i in range(len(y))])  # type: ignore[misc]
    except (RuntimeError, ValueError, TypeError, IndexError):
        return torch.full((len(y),), math.nan)


def over_folds(folds: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Mean over the folds, and its standard error, for each λ; `folds` holds the scores of each fold."""
    table = np.array(folds, dtype=np.float64)
    return table.mean(0).tolist(), (table.std(0, ddof=1) / math.sqrt(len(table))).tolist()


def best_of(scores: Sequence[float]) -> int:
    """The place of the lowest score, of the last of them; a score that is not finite never wins.

    >>> best_of([3.0, 1.0, float("nan"), 1.0, 2.0])
    3
    """
    return max((i for i, s in enumerate(scores) if math.isfinite(s)), key=lambda i: (-scores[i], i))


def one_se_of(scores: Sequence[float], stderrs: Sequence[float]) -> int:
    """The last place whose score is within one standard error of the best: the simplest model that is as good.

    >>> one_se_of([1.5, 1.0, 1.1, 1.3], [0.1, 0.2, 0.1, 0.1])
    2
    """
    best = best_of(scores)
    most = scores[best] + (stderrs[best] if math.isfinite(stderrs[best]) else 0.0)
    return max(i for i, s in enumerate(scores) if math.isfinite(s) and s <= most)
