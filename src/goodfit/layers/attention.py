"""The rate of dropout on attention probabilities that functions draw."""

from __future__ import annotations

from torch import Tensor

from goodfit.layers.seeded import Seeded

__all__ = ["AttentionRate"]


class AttentionRate(Seeded):
    """Says to its host's calls of scaled dot product attention, and of dropout on a softmax, whether to drop and how much.

    The masks are drawn by torch's functions from torch's generator.
    """

    def __init__(self, name: str = "attention_dropout", p: float = 0.0) -> None:
        super().__init__(name, p)

    @property
    def now(self) -> float:
        """The rate in training, 0 in eval."""
        return self.p if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Its host never runs it."""
        return x
