"""The written rules of early stopping as one plain loop over numbers, and the situations in which implementations differ.

Nothing here knows goodfit: the rules are those of its documentation, said a second time, to hold it and others against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["SITUATIONS", "Asked", "Situation", "Verdict", "expected", "verdict"]

NAN, INF = math.nan, math.inf


class Verdict(NamedTuple):
    """Index of the check that stops, None for never; the best score that was heard, and the number of its check, from 1."""

    stop: int | None
    best: float
    best_check: int


def verdict(
    scores: Sequence[float],
    patience: float,
    min_delta: float = 0.0,
    rel_delta: float = 0.0,
    warmup: float = 0.0,
    mode: str = "min",
    nonfinite: str = "bad",
    steps: Sequence[int] | None = None,
) -> Verdict:
    """What the rules say; steps: the optimizer step of each check, where patience and warm-up are counted in those.

    ValueError where a number has no meaning, FloatingPointError where a score that is not finite is to raise.
    """
    if not (patience >= 1 and min_delta >= 0 and rel_delta >= 0 and warmup >= 0):
        raise ValueError("a number without a meaning")
    sign = -1.0 if mode == "max" else 1.0
    anchor, improved_at = INF, 0
    best, best_check, checks = INF, 0, 0
    for i, score in enumerate(scores):
        v, finite = sign * score, math.isfinite(score)
        if not finite and nonfinite == "raise":
            raise FloatingPointError(i)
        if not finite and nonfinite == "ignore":
            continue
        checks += 1
        now = checks if steps is None else steps[i]
        if finite and v < best:
            best, best_check = v, checks
        if finite and (anchor == INF or anchor - v > max(min_delta, rel_delta * abs(anchor))):
            anchor, improved_at = v, now
            continue
        enough = now - improved_at >= patience or (not finite and nonfinite == "stop")
        if enough and (now > warmup or not warmup):
            return Verdict(i, sign * best, best_check)
    return Verdict(None, sign * best, best_check)


@dataclass(frozen=True)
class Asked:
    """What a user asks of any system, for scores that are lower for better."""

    patience: int = 3
    delta: float = 0.0
    relative: bool = False
    warmup: int = 0
    restore: bool = False


@dataclass(frozen=True)
class Situation:
    """Scores, and what is asked; resumed: what is asked of what resumes behind two checks; beside: of a second one."""

    scores: Sequence[float]
    asked: Asked = field(default_factory=Asked)
    resumed: Asked | None = None
    beside: Asked | None = None


CUT = 2
CONSTANT = [1.0] * 12
FALLING = [1 - k / 16 for k in range(12)]
DRIFT = [1 - 0.001 * k for k in range(40)]
MIDDLE = [1.0, 0.9, NAN, *[0.95] * 8]
WORSE = [-16.0 + k / 4 for k in range(12)]
BACK = [1.0, 0.5, 0.75, 0.75, 0.75, 0.75]

SITUATIONS = {
    "delta exactly reached, p=1": Situation([1.0, *[0.75] * 5], Asked(1, 0.25)),
    "drift 0.001, delta 0.005, p=6": Situation(DRIFT, Asked(6, 0.005)),
    "constant": Situation(CONSTANT),
    "p=0, constant": Situation(CONSTANT, Asked(0)),
    "p=0, improving": Situation(FALLING, Asked(0)),
    "delta -0.1, constant": Situation(CONSTANT, Asked(delta=-0.1)),
    "nan first, improving": Situation([NAN, *FALLING]),
    "nan in the middle": Situation(MIDDLE),
    "all nan": Situation([NAN] * 12),
    "inf first, improving": Situation([INF, *FALLING]),
    "relative, negative and worse": Situation(WORSE, Asked(delta=0.1, relative=True)),
    "warm-up 5, constant": Situation(CONSTANT, Asked(warmup=5)),
    "kept: the best": Situation(BACK, Asked(restore=True)),
    "kept: nan first": Situation([NAN, *BACK], Asked(restore=True)),
    "kept: better by less than delta": Situation([1.0, 0.75, 0.625, 0.875], Asked(delta=0.5, restore=True)),
    "resumed": Situation(CONSTANT, resumed=Asked()),
    "resumed, p=3 becomes 6": Situation(CONSTANT, resumed=Asked(6)),
    "p=3 beside p=6, resumed": Situation(CONSTANT, resumed=Asked(), beside=Asked(6)),
}
"""One patience of 3 where nothing else is said. Two checks are heard before what is resumed."""


def expected(situation: Situation) -> str:
    """The cell of the rules: index of the check that stops, never, or error; or that of the weights kept."""
    one = situation.resumed or situation.asked
    absolute, relative = (0.0, one.delta) if one.relative else (one.delta, 0.0)
    try:
        found = verdict(situation.scores, one.patience, absolute, relative, one.warmup)
    except ValueError:
        return "error"
    if one.restore:
        return str(found.best_check - 1)
    return "never" if found.stop is None else str(found.stop)
