"""Targets that are less sure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from goodfit.errors import GoodfitError
from goodfit.hyper import hyper
from goodfit.noise import Noise
from goodfit.phases import Batch
from goodfit.tensors import truth

__all__ = ["LabelSmoothing"]


@dataclass(frozen=True)
class LabelSmoothing(Batch):
    """Label smoothing: a share of every target is spread evenly over the classes, its own class included.

    Formula: y ← (1 − share) · y + share / classes.
    Phase: Batch. y holds probabilities (rows, classes, ...); gf.fit makes the classes of y one-hot. With cross-entropy it is
        torch's CrossEntropyLoss(label_smoothing=share), but in training alone: validation is scored against the targets as
        they are. Beside that argument targets are smoothed twice. Before or behind MixUp and CutMix is the same.
    Numbers: share of the probability that is spread, in [0, 1], off at 0.
    Errors: share outside [0, 1]; y without an axis of two classes or more, or with rows that are no probabilities, such as the
        reals of a regression.
    Source: Szegedy et al. 2016, Rethinking the inception architecture for computer vision, section 7, arXiv 1512.00567.

    >>> LabelSmoothing(0.1).batch(torch.zeros(2, 3), torch.eye(2), Noise(0, "labelsmoothing"))[1]
    tensor([[0.9500, 0.0500],
            [0.0500, 0.9500]])
    """

    share: float = hyper(0.1, valid="[0, 1]", off=0.0, low=0.0, high=0.5)

    def batch(self, x: Any, y: Tensor, noise: Noise) -> tuple[Any, Tensor]:
        _refuse_reals(y)
        wide = torch.promote_types(y.dtype, torch.float32)
        return x, ((1 - self.share) * y.to(wide) + self.share / y.shape[1]).to(y.dtype)


def _refuse_reals(y: Tensor) -> None:
    """Refuse targets that are no probabilities over classes; of rows whose numbers stand for many members, the shape alone."""
    if y.ndim < 2 or y.shape[1] < 2:
        one = "; for one score between two classes, give the model two" if y.ndim == 2 else ""
        raise GoodfitError(
            f"LabelSmoothing needs probabilities (rows, classes), got y of shape {tuple(y.shape)}{one}; leave it out for reals."
        )
    far = (y.double().sum(1) - 1).abs() > 0.01 + 2 * torch.finfo(y.dtype).eps
    if truth(far.any() | (y < 0).any()):
        raise GoodfitError(
            "LabelSmoothing needs probabilities, numbers >= 0 with the sum 1 over axis 1 of y, got other numbers in y of shape "
            f"{tuple(y.shape)}; leave it out for reals."
        )
