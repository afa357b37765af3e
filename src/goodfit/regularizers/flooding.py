"""A floor under the training loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from goodfit.hyper import hyper
from goodfit.phases import Loss

__all__ = ["Flooding"]


@dataclass(frozen=True)
class Flooding(Loss):
    """Flooding: below a level the training loss is climbed again, so that it floats there.

    Formula: |loss − level| + level, with the loss of a batch.
    Phase: Loss; a scalar → a scalar. Loss functions that are not negative are meant.
    Numbers: level, in units of the loss, >= 0, off at 0. It must lie below what a model that does not overfit reaches: the
        source tries 0 to 0.1 for cross-entropy.
    Errors: level < 0.
    Source: Ishida et al. 2020, Do we need zero training loss after achieving zero training error?, arXiv 2002.08709. Of several
        batches in a step, or processes, each has a floor of its own.

    >>> Flooding(0.1).loss(torch.tensor(0.04), None, None)
    tensor(0.1600)
    """

    level: float = hyper(0.02, valid="[0, inf)", off=0.0, low=1e-3, high=0.5, log=True)

    def loss(self, loss: Tensor, outputs: Tensor, y: Tensor) -> Tensor:
        return (loss - self.level).abs() + self.level
