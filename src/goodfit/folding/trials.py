"""Fold pairs as far as a proof holds, and take it back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from goodfit.folding.chains import Pair
from goodfit.folding.rounding import MOST, in_double, rounding_alone
from goodfit.folding.weights import fold_into
from goodfit.surgery.proof import Proof
from goodfit.surgery.snapshot import Snapshot
from goodfit.tensors import put

__all__ = ["Folding"]


class Folding:
    """The folds of one model, each from the weights at the start."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example, self.start = model, example, Snapshot(model)
        self.proof: Proof | None = None  # made when there is something to prove
        self.weights: dict[nn.Parameter, Tensor] = {}  # as they were, of those that were written
        self.folded: list[Pair] = []
        self.spoiled: dict[nn.Module, str] = {}
        self.error, self.trials = 0.0, 0

    def restore(self) -> None:
        """Put everything back, bit by bit."""
        self.start.restore()
        for parameter, before in self.weights.items():
            put(parameter, before)

    def apply(self, pairs: list[Pair]) -> None:
        """Fold these, into the model as it was at the start."""
        self.restore()
        for parameter in (p for pair in pairs for p in pair.layer.parameters(recurse=False)):
            self.weights.setdefault(parameter, parameter.detach().clone())
        fold_into(self.model, pairs)

    def grow(self, pairs: list[Pair]) -> None:
        """Fold those of the pairs that the proof accepts, beside what is folded already: all, or by halves."""
        self.trials += 1
        wanted = [*self.folded, *pairs]
        over, error = self._gap(wanted)
        if over <= 1 or (error <= MOST and self._by_rounding(wanted)):
            self.folded, self.error = wanted, error
            return
        self.apply(self.folded)
        if len(pairs) == 1 or self.trials > 64:
            shown = f"differ by {error:.1e} of the largest" if error < float("inf") else "be others"
            self.spoiled |= {pair.norm: f"fails the proof: outputs would {shown}" for pair in pairs}
            return
        half = len(pairs) // 2
        self.grow(pairs[:half])
        self.grow(pairs[half:])

    def _gap(self, pairs: list[Pair]) -> tuple[float, float]:
        """The error of the model with these folds, over its bound, and by itself."""
        self.proof = self.proof or Proof(self.model, self.example)
        try:
            self.apply(pairs)
            return self.proof.gap()
        except Exception:
            return float("inf"), float("inf")

    def _by_rounding(self, pairs: list[Pair]) -> bool:
        """Whether the rounding of the model itself explains that error; leaves these folds applied."""
        self.restore()
        try:
            precise, twins = in_double(self.model, pairs)
        except Exception:
            return False
        self.apply(pairs)
        return self.proof is not None and rounding_alone(self.model, precise, twins, self.proof.truth)
