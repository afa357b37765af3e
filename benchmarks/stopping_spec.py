"""The rules of early stopping in plain Python, one number at a time: what goodfit and all others are measured against.

Written from the rules alone; it knows neither torch nor goodfit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal


class Refused(Exception):
    """The settings have no meaning, or the score is missing."""


@dataclass(frozen=True)
class Rule:
    """What a user asks for. target: stop at a score as good as this. nonfinite: what nan or inf does."""

    patience: int = 3
    min_delta: float = 0.0
    rel_delta: float = 0.0
    warmup: int = 0
    mode: Literal["min", "max"] = "min"
    target: float | None = None
    nonfinite: Literal["bad", "stop", "raise", "ignore"] = "bad"


class Spec:
    """Hears one score after another; `spec(score)` is whether to stop.

    best and best_index are of the strictly best score, anchor is the last accepted one; None before the first.
    """

    def __init__(self, rule: Rule) -> None:
        if rule.patience < 1 or rule.min_delta < 0 or rule.rel_delta < 0 or rule.warmup < 0:
            raise Refused
        self.rule = rule
        self.checks = self.bad = 0
        self.best_index: int | None = None
        self._best: float | None = None
        self._anchor: float | None = None

    def __call__(self, score: float | None) -> bool:
        rule = self.rule
        if score is None or (rule.nonfinite == "raise" and not math.isfinite(score)):
            raise Refused
        if rule.nonfinite == "ignore" and not math.isfinite(score):
            return False
        v = score if rule.mode == "min" else -score
        self.checks += 1
        if math.isfinite(v) and (self._best is None or v < self._best):
            self._best, self.best_index = v, self.checks - 1
        if math.isfinite(v) and (self._anchor is None or self._anchor - v > self._margin(self._anchor)):
            self._anchor, self.bad = v, 0
        else:
            self.bad += 1
        stop = self.bad >= rule.patience
        if rule.target is not None and math.isfinite(v):
            stop = stop or v <= (rule.target if rule.mode == "min" else -rule.target)
        if rule.nonfinite == "stop" and not math.isfinite(v):
            stop = True
        return stop and self.checks > rule.warmup

    def _margin(self, anchor: float) -> float:
        return max(self.rule.min_delta, self.rule.rel_delta * abs(anchor))

    @property
    def best(self) -> float | None:
        return self._best if self._best is None or self.rule.mode == "min" else -self._best

    @property
    def anchor(self) -> float | None:
        return self._anchor if self._anchor is None or self.rule.mode == "min" else -self._anchor

    def resumed(self, **settings: int | float) -> Spec:
        """The same memory under other settings: only what was heard is remembered."""
        self.rule = replace(self.rule, **settings)  # type: ignore[arg-type]
        return self
