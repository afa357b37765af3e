"""A price on sureness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from goodfit.errors import GoodfitError
from goodfit.hyper import hyper
from goodfit.phases import Loss

__all__ = ["ConfidencePenalty"]


@dataclass(frozen=True)
class ConfidencePenalty(Loss):
    """Confidence penalty: the entropy of what a classifier predicts is worth something.

    Formula: loss − beta · mean H(softmax(outputs)), with H = −Σ p log p over the classes, the mean over rows (and places).
    Phase: Loss; outputs are scores (logits) of shape (rows, classes, ...), with two classes or more.
    Numbers: beta, per unit of the loss, >= 0, off at 0.
    Errors: beta < 0; outputs that are not scores of classes.
    Source: Pereyra et al. 2017, Regularizing neural networks by penalizing confident output distributions, arXiv 1701.06548,
        with beta from 0.1 to 4.

    >>> ConfidencePenalty(0.1).loss(torch.tensor(1.0), torch.zeros(4, 2), None)  # 1 − 0.1 · ln 2
    tensor(0.9307)
    """

    beta: float = hyper(0.1, valid="[0, inf)", off=0.0, low=1e-3, high=4.0, log=True)

    def loss(self, loss: Tensor, outputs: Tensor, y: Tensor) -> Tensor:
        if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[1] < 2:
            shown = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise GoodfitError(
                f"ConfidencePenalty needs scores of classes, (rows, classes), got {shown}; leave it out, or give the model an "
                "output for each class."
            )
        logs = torch.log_softmax(outputs, dim=1)
        return loss - self.beta * -(logs.exp() * logs).sum(1).mean()
