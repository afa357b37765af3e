"""A criterion that hears a smoothed score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from goodfit.errors import GoodfitError
from goodfit.hyper import hyper, lifted
from goodfit.phases import Report, State
from goodfit.stop.criterion import Criterion, Reason
from goodfit.tensors import below, under

__all__ = ["Smoothed"]


@dataclass(frozen=True, repr=False)
class Smoothed(Criterion):
    """Let a criterion hear a running average or median of the scores, for a validation that is noisy.

    Formula: ema: m ← ema · m + (1 − ema) · v and n ← ema · n + (1 − ema) from 0; heard is m / n, the weighted mean of what
        came. median: of the last so many scores, of as many as there are at first.
    Needs: what the criterion needs.
    Numbers: ema, share of the past, in [0, 1), off at 0; median, checks, an integer >= 1, off at 1. One of both.
    Errors: none or both of ema and median; what is no criterion. A score that is nan or infinite leaves the average as it is,
        and is heard as it is. A standard error is not smoothed. Kept is what has the strictly best score as it was told: an
        average says when to stop, but it is of several weights, and none of them has it.
    Source: Kingma and Ba 2015, arXiv 1412.6980, for the average without a bias to its start.

    >>> from goodfit import EarlyStopping
    >>> from goodfit.stop import Patience
    >>> stopping = EarlyStopping(Smoothed(Patience(2), median=3)).watch(nn.Linear(1, 1))
    >>> [stopping(loss) for loss in (1.0, 0.9, 0.8, 5.0, 0.7, 0.9, 0.9)]
    [False, False, False, False, False, False, True]
    """

    criterion: Criterion
    ema: float = hyper(0.0, valid="[0, 1)", low=0.5, high=0.95, fixed=True)
    median: int = hyper(1, valid="[1, inf)", low=3, high=9, unit="checks", fixed=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.criterion, Criterion):
            raise GoodfitError(f"Smoothed.criterion must be one such as Patience(10), got criterion={self.criterion!r}.")
        if (self.ema > 0) == (self.median > 1):
            raise GoodfitError(f"Smoothed takes one of ema= and median=, such as ema=0.9 or median=5, got {self!r}.")

    @property
    def needs(self) -> tuple[str, ...]:
        return self.criterion.needs

    def init(self) -> State:
        zero = torch.zeros((), dtype=torch.float64)
        past = torch.full((int(self.median),), math.nan, dtype=torch.float64)
        return {"past": past, "mean": zero, "share": zero.clone(), **under("of.", self.criterion.init())}

    def check(self, report: Report, state: State) -> tuple[Tensor, State]:
        return self.hear(report, state, torch.tensor(True))

    def hear(self, report: Report, state: State, counts: Tensor) -> tuple[Tensor, State]:
        v = report.score
        known = v.isfinite() & counts
        past = torch.where(known, torch.cat([state["past"][1:], v.reshape(1)]), state["past"])
        mean = torch.where(known, self.ema * state["mean"] + (1 - self.ema) * v, state["mean"])
        share = torch.where(known, self.ema * state["share"] + (1 - self.ema), state["share"])
        smooth = _median(past) if self.median > 1 else mean / share
        heard = replace(report, score=torch.where(known, smooth, v))
        stop, inner = self.criterion.hear(heard, below("of.", state), counts)
        return stop, {"past": past, "mean": mean, "share": share, **under("of.", inner)}

    def reason(self, state: State, sign: float = 1.0, unit: str = "checks") -> str:
        how = f"median of {self.median}" if self.median > 1 else f"average of ema={self.ema:g}"
        return f"{self.criterion.reason(below('of.', state), sign, unit)}, by the {how}"

    def why(self, state: State) -> Reason:
        return self.criterion.why(below("of.", state))

    def mirrored(self) -> Criterion:
        return lifted(self, criterion=self.criterion.mirrored())

    def leaves(self) -> Iterator[Criterion]:
        return self.criterion.leaves()

    def patience_left(self, state: State) -> float | None:
        return self.criterion.patience_left(below("of.", state))


def _median(past: Tensor) -> Tensor:
    """The median of the finite numbers, the mean of the middle two where they are even."""
    known = past.isfinite()
    ordered = torch.where(known, past, math.inf).sort().values
    count = known.sum().clamp(min=1)
    middle = torch.stack([(count - 1) // 2, count // 2])
    return ordered.gather(0, middle).mean()
