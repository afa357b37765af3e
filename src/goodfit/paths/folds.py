"""Which rows train and which are held out: the folds of a cross-validation, and what a network holds out to stop by."""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from goodfit.errors import GoodfitError
from goodfit.fitting.data import Batches, batches_of, mapped, to_device
from goodfit.noise import Noise

__all__ = ["Pair", "finite_pair", "folds_of", "held_out", "is_split", "rows_of", "whole"]

HELD = 0.1
Pair = tuple[Any, Tensor]


def is_split(valid: Any) -> bool:
    """Whether `valid` asks for folds: a number, or a splitter of scikit-learn."""
    number = isinstance(valid, Integral) and not isinstance(valid, bool)
    return number or (hasattr(valid, "split") and hasattr(valid, "get_n_splits"))


def finite_pair(data: Any, name: str) -> Any:
    """The data as batches know them, refusing numbers that are not finite where they can be seen beforehand."""
    batches = batches_of(data, name, 1, shuffle=False, seed=0)
    if not isinstance(batches, Batches):
        return data

    def refuse(t: Tensor, what: str) -> Tensor:
        if t.is_floating_point() and not bool(t.isfinite().all()):
            row = int((~t.isfinite()).reshape(len(t), -1).any(1).nonzero()[0, 0])
            raise GoodfitError(f"{name} must be finite, got nan or inf in {what}, first in row {row}; fill or drop such rows.")
        return t

    return mapped(batches.x, lambda t: refuse(t, "x")), refuse(batches.y, "y")


def rows_of(data: Pair, rows: Tensor) -> Pair:
    """Some rows of a pair."""
    return mapped(data[0], lambda t: t[rows.to(t.device)]), data[1][rows.to(data[1].device)]


def folds_of(valid: Any, data: Any, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Row numbers (train, held out) of each fold: stratified for classes, or as the splitter has it."""
    if not isinstance(data, tuple):
        raise GoodfitError(f"Folds need train as a pair (x, y) of tensors or arrays, got a {type(data).__name__}.")
    y = data[1].cpu().numpy()
    count = len(y)
    if isinstance(valid, Integral) and not 2 <= int(valid) <= count:
        raise GoodfitError(f"valid as a number of folds must be in [2, {count}], the rows of train, got {valid}.")
    splitter = _splitter(int(valid), y, seed) if isinstance(valid, Integral) else valid
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            parts = [tuple(torch.as_tensor(np.asarray(p)) for p in pair) for pair in splitter.split(np.zeros((count, 1)), y)]
    except (ValueError, TypeError) as wrong:
        raise GoodfitError(f"The splitter {splitter} cannot split {count} rows: {str(wrong).splitlines()[0]}") from None
    if len(parts) < 2 or any(not len(p) for pair in parts for p in pair):
        raise GoodfitError(f"valid must make at least 2 folds with rows in both parts, got {len(parts)} by {splitter}.")
    return [(train, held) for train, held in parts]


def _splitter(count: int, y: Any, seed: int) -> Any:
    from sklearn.model_selection import KFold, StratifiedKFold

    classes = y.dtype.kind in "biu" and y.ndim == 1
    enough = classes and max(np.unique(y, return_counts=True)[1]) >= count
    return (StratifiedKFold if enough else KFold)(count, shuffle=True, random_state=seed)


def held_out(data: Pair, seed: int) -> tuple[Pair, Pair]:
    """A tenth of the rows set aside, drawn from the seed: a network stops by them, so that the fold's score stays unseen."""
    count = len(data[1])
    if count < 4:
        raise GoodfitError(f"A network on folds needs at least 4 rows to train on, got {count}; give fewer folds or more rows.")
    order = torch.randperm(count, generator=Noise(seed, "held", 0).generator())
    cut = max(2, round(HELD * count))
    return rows_of(data, order[cut:].sort().values), rows_of(data, order[:cut].sort().values)


def whole(data: Any, size: int, home: torch.device) -> Pair:
    """All rows as one pair."""
    batches = batches_of(data, "train", size, shuffle=False, seed=0)
    if isinstance(batches, Batches):
        return to_device((batches.x, batches.y), home)
    parts = [to_device(batch, home) for batch in batches]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
