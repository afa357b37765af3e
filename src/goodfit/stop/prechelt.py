"""The three families of Prechelt 1998: generalization loss, its quotient with training progress, and rises in a row.

Differences are scaled by the size of the reference, so that negative and maximised scores are judged like positive ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from goodfit.hyper import hyper
from goodfit.phases import Report, State
from goodfit.stop.criterion import Criterion, Reason

__all__ = ["GL", "PQ", "UP"]


@dataclass(frozen=True, repr=False)
class GL(Criterion):
    """Stop when the score is worse than the best so far by more than alpha per cent of it.

    Formula: GL = 100 · (v − best) / |best| > alpha, with the best finite score so far; where best is 0, any score above it is
        beyond every alpha.
    Needs: nothing but the score.
    Numbers: alpha, per cent, >= 0; 1 to 5 in the paper.
    Errors: alpha outside its range. A score that is nan or infinite decides nothing and is never the best.
    Source: Prechelt 1998, Early stopping, but when?

    >>> from goodfit import EarlyStopping
    >>> stopping = EarlyStopping(GL(5)).watch(nn.Linear(1, 1))
    >>> [stopping(loss) for loss in (1.0, 0.5, 0.52, 0.53)]
    [False, False, False, True]
    """

    kind: ClassVar[Reason] = Reason.GENERALIZATION_LOSS

    alpha: float = hyper(5.0, valid="[0, inf)", low=1.0, high=20.0, log=True, unit="per cent", fixed=True)

    def init(self) -> State:
        return {"best": _number(math.inf), "loss": _number(0.0)}

    def check(self, report: Report, state: State) -> tuple[Tensor, State]:
        best, loss = _generalization_loss(report.score, state["best"])
        return report.score.isfinite() & (loss > self.alpha), {"best": best, "loss": loss}

    def reason(self, state: State, sign: float = 1.0, unit: str = "checks") -> str:
        return f"a generalization loss of {float(state['loss']):.4g} %, above {self.alpha:g} %"


@dataclass(frozen=True, repr=False)
class PQ(Criterion):
    """Stop when the generalization loss is large beside what the training loss still gains.

    Formula: at the last check of each strip of k: GL / P > alpha, with GL as for `GL` and P = 1000 · (mean − min) / |min| of
        the training losses of the strip. P = 0, a training loss that stands still: stop iff GL > 0. min = 0 below a mean
        above it: P is infinite, go on.
    Needs: the training loss, as a mean since the check before. It must be lower for better, whatever the score is.
    Numbers: alpha, per cent over per mille, > 0, 0.5 to 3 in the paper; k, checks in a strip, an integer >= 2.
    Errors: numbers outside their range; a missing training loss. Training losses that are nan or infinite are left out. No
        decision before the first strip is complete, at a score that is nan or infinite, or with fewer than two finite
        training losses in the strip.
    Source: Prechelt 1998, Early stopping, but when?

    >>> from goodfit import EarlyStopping
    >>> stopping = EarlyStopping(PQ(1, k=2)).watch(nn.Linear(1, 1))
    >>> [stopping(v, train_loss=t) for v, t in ((1.0, 1.0), (0.9, 0.8), (1.0, 0.80), (1.0, 0.79))]
    [False, False, False, True]
    """

    kind: ClassVar[Reason] = Reason.PROGRESS

    alpha: float = hyper(1.0, valid="(0, inf)", low=0.1, high=5.0, log=True, fixed=True)
    k: int = hyper(5, valid="[2, inf)", low=3, high=10, unit="checks", fixed=True)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("train_loss",)

    def init(self) -> State:
        strip = torch.full((int(self.k),), math.nan, dtype=torch.float64)
        numbers = {name: _number(value) for name, value in (("best", math.inf), ("loss", 0.0), ("progress", 0.0))}
        return {**numbers, "strip": strip, "checks": torch.tensor(0)}

    def check(self, report: Report, state: State) -> tuple[Tensor, State]:
        assert report.train_loss is not None
        best, loss = _generalization_loss(report.score, state["best"])
        checks = state["checks"] + 1
        strip = torch.cat([state["strip"][1:], report.train_loss.to(state["strip"]).reshape(1)])
        known = strip.isfinite()
        low = torch.where(known, strip, math.inf).min()
        spread = torch.where(known, strip - low, 0.0).sum() / known.sum()
        progress = torch.where(spread == 0, 0.0, 1000 * spread / low.abs())
        stop = (checks % self.k == 0) & report.score.isfinite() & (known.sum() > 1) & (loss > self.alpha * progress)
        return stop, {"best": best, "loss": loss, "progress": progress, "strip": strip, "checks": checks}

    def reason(self, state: State, sign: float = 1.0, unit: str = "checks") -> str:
        loss, progress = float(state["loss"]), float(state["progress"])
        return (
            f"a generalization loss of {loss:.4g} %, more than {self.alpha:g} times the training progress of {progress:.4g} "
            f"per mille over {self.k} checks"
        )


@dataclass(frozen=True, repr=False)
class UP(Criterion):
    """Stop when the score got worse over s strips of k checks in a row.

    Formula: at the last check of each strip: worse iff v > v of the last check of the strip before, whatever was between.
        Stop at the s-th worse strip in a row.
    Needs: nothing but the score.
    Numbers: s, strips, an integer >= 1, 2 to 8 in the paper; k, checks in a strip, an integer >= 1.
    Errors: numbers outside their range. The first strip has none before it and is not worse. A strip that ends on a score
        that is nan or infinite is worse, and the next is held against the last finite end.
    Source: Prechelt 1998, Early stopping, but when?

    >>> from goodfit import EarlyStopping
    >>> stopping = EarlyStopping(UP(2, k=1)).watch(nn.Linear(1, 1))
    >>> [stopping(loss) for loss in (0.5, 0.6, 0.4, 0.5, 0.7)]
    [False, False, False, False, True]
    """

    kind: ClassVar[Reason] = Reason.RISE

    s: int = hyper(3, valid="[1, inf)", low=1, high=8, unit="strips", fixed=True)
    k: int = hyper(5, valid="[1, inf)", low=3, high=10, unit="checks", fixed=True)

    def init(self) -> State:
        return {"end": _number(math.inf), "worse": torch.tensor(0), "checks": torch.tensor(0)}

    def check(self, report: Report, state: State) -> tuple[Tensor, State]:
        v, end = report.score, state["end"]
        checks = state["checks"] + 1
        ends = checks % self.k == 0
        rose = ~v.isfinite() | (end.isfinite() & (v > end))
        worse = torch.where(ends, torch.where(rose, state["worse"] + 1, 0), state["worse"])
        new = {"end": torch.where(ends & v.isfinite(), v, end), "worse": worse, "checks": checks}
        return ends & (worse >= self.s), new

    def reason(self, state: State, sign: float = 1.0, unit: str = "checks") -> str:
        strips, checks = int(state["worse"]), f"{self.k} check{'s' if self.k != 1 else ''}"
        return f"the score got worse over {strips} strip{'s' if strips != 1 else ''} of {checks} in a row"


def _generalization_loss(v: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """The best score with this one, and how far this one is from it, in per cent of the best."""
    best = torch.where(v.isfinite() & (v < best), v, best)
    return best, torch.where(v == best, 0.0, 100 * (v - best) / best.abs())


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
