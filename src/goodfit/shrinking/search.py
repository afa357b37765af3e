"""Cut as much as the proof accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from goodfit.shrinking.choice import Choice
from goodfit.shrinking.inputs import ignored, take
from goodfit.shrinking.slicing import cut
from goodfit.surgery.snapshot import Snapshot

__all__ = ["Search"]

_Family = tuple[int, ...]


class Search:
    """Cuts as much as the proof accepts: all; else all but inputs; else what no view laid out, and by halves."""

    def __init__(
        self,
        model: nn.Module,
        choice: Choice,
        shared: dict[str, str],
        before: Snapshot,
        gap: Callable[[], tuple[float, float]],
    ) -> None:
        self.model, self.choice, self.shared, self.before, self.gap = model, choice, shared, before, gap
        self.inputs: dict[str, Tensor] = {}
        self.trials, self.with_inputs = 0, True

    def largest(self) -> float:
        """Leave the model with the largest cut that holds, and return the error of its proof."""
        families = list(self.choice.families)
        error = self._attempt([])
        if error is not None:
            return error
        self.with_inputs = False
        error = self._attempt([])
        if error is not None:
            return error
        laid = torch.zeros(len(self.choice.label), dtype=torch.bool)
        for rectangle in self.choice.run.rectangles.values():
            laid[self.choice.label[rectangle.ids]] = True
        plain = [f for f in families if not laid[self.choice.families[f]].any()]
        accepted = self._grow([], plain)
        accepted = self._grow(accepted, [f for f in families if f not in set(plain)])
        for self.with_inputs in (True, False):
            error = self._attempt(self._others(accepted))
            if error is not None:
                return error
        self.choice.settle(families, self._reason)
        return 0.0

    _reason = "fails the proof: the code of the model fixes its size"

    def _others(self, accepted: Iterable[_Family]) -> list[_Family]:
        return [f for f in self.choice.families if f not in set(accepted)]

    def _grow(self, accepted: list[_Family], more: list[_Family]) -> list[_Family]:
        if not more or self.trials > 64:
            return accepted
        if self._attempt(self._others([*accepted, *more])) is not None:
            return [*accepted, *more]
        if len(more) == 1:
            return accepted
        half = len(more) // 2
        return self._grow(self._grow(accepted, more[:half]), more[half:])

    def _attempt(self, banned: list[_Family]) -> float | None:
        """The error of the proof of one cut, None where it fails; the model is then as before."""
        self.trials += 1
        self.before.restore()
        self.choice.settle(banned, self._reason)
        self.inputs = ignored(self.model, self.choice, self.shared) if self.with_inputs else {}
        if not self.choice.removed.any() and not self.inputs:
            return 0.0
        try:
            cut(self.model, self.choice)
            take(self.model, self.inputs)
            over, error = self.gap()
        except Exception:
            over = float("inf")
        if over <= 1:
            return error
        self.before.restore()
        return None
