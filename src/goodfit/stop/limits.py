"""Limits: a score that is good enough or hopeless, time that is over, gradients that are noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from goodfit.hyper import hyper, lifted
from goodfit.phases import Report, State
from goodfit.stop.criterion import Criterion, Reason

__all__ = ["Budget", "Divergence", "Evidence", "Target"]


@dataclass(frozen=True, repr=False)
class Target(Criterion):
    """Stop as soon as the score is good enough.

    Formula: v <= score; v >= score where the mode is "max".
    Needs: nothing but the score.
    Numbers: score, in units of the score and in the user's sign, any finite number.
    Errors: a score that is no finite number. A v that is nan or infinite does not reach it.
    Source: the early stopping of every boosting package.

    >>> from goodfit import EarlyStopping
    >>> stopping = EarlyStopping(Target(0.9), mode="max").watch(nn.Linear(1, 1))
    >>> [stopping(accuracy) for accuracy in (0.5, 0.89, 0.9)]
    [False, False, True]
    """

    kind: ClassVar[Reason] = Reason.TARGET

    score: float = hyper(0.0, valid="(-inf, inf)", low=0.0, high=0.0, unit="score", fixed=True, required=True)

    def init(self) -> State:
        return {"last": torch.zeros((), dtype=torch.float64)}

    def check(self, report: Report, state: State) -> tuple[Tensor, State]:
        return report.score.isfinite() & (report.score <= self.score), {"last": report.score}

    def mirrored(self) -> Criterion:
        return lifted(self, score=-self.score)

    def reason(self, state: State, sign: float = 1.0, unit: str = "checks") -> str:
        return f"the score {sign * float(state['last']):.6g} reached the target {sign * self.score:g}"


@dataclass(frozen=True, repr=False)
class Divergence(Criterion):
    """Stop as soon as the score is beyond a bound, on the bad side.

    Formula: v > score; v < score where the mode is "max".
    Needs: nothing but the score.
    Numbers: score, in units of the score and in the user's sign, any finite number.
    Errors: a score that is no finite number. inf (-inf for "max") is beyond it; nan is EarlyStopping's nonfinite to judge.
    Source: `divergence_threshold` of Lightning's EarlyStopping.

    >>> from goodfit import EarlyStopping
    >>> stopping = EarlyStopping(Divergence(10)).watch(nn.Linear(1, 1))
    >>> [stopping(loss) for loss in (1.0, 10.0, 11.0)]
    [False, False, True]
    """

    kind: ClassVar[Reason] = Reason.DIVERGENCE

    score: float = hyper(0.0, valid="(-inf, inf)", low=0.0, high=0.0, unit="score", fixed=True, required=True)

    def init(self) -> State:
        return {"last": torch.zeros((), dtype=torch.float64)}

    def check(self, report: Report, state: State) -> tuple[Tensor, State]:
        return report.score > self.score, {"last": report.score}

    def mirrored(self) -> Criterion:
        return lifted(self, score=-self.score)

    def reason(self, state: State, sign: float = 1.0, unit: str = "checks") -> str:
        return f"the score {sign * float(state['last']):.6g} is beyond {sign * self.score:g}"


@dataclass(frozen=True, repr=False)
class Budget(Criterion):
    """Stop before the wall clock passes so many seconds.

    Formula: at a check after t seconds, the one before after t': t + (t − t') > seconds, so at the first check from which
        another interval as long as the last would exceed them.
    Needs: the seconds of training, which Run and Watch measure; time before a resume counts.
    Numbers: seconds, > 0.
    Errors: seconds outside their range.
    Source: `max_time` of Lightning's Timer, which stops behind the bound.

    >>> from goodfit.phases import Report
    >>> times = [torch.tensor(t) for t in (20.0, 40.0, 59.0, 78.0)]
    >>> budget, state, told = Budget(60), Budget(60).init(), []
    >>> for t in times:
    ...     stop, state = budget.check(Report(torch.tensor(0.5), seconds=t), state)
    ...     told.append(bool(stop))
    >>> told
    [False, False, True, True]
    """

    kind: ClassVar[Reason] = Reason.BUDGET
    scored: ClassVar[bool] = False

    seconds: float = hyper(3600.0, valid="(0, inf)", low=0.0, high=0.0, unit="seconds", fixed=True, required=True)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("seconds",)

    def init(self) -> State:
        return {name: torch.zeros((), dtype=torch.float64) for name in ("now", "interval")}

    def check(self, report: Report, state: State) -> tuple[Tensor, State]:
        assert report.seconds is not None
        now = report.seconds.to(state["now"])
        interval = now - state["now"]
        return now + interval > self.seconds, {"now": now, "interval": interval}

    def reason(self, state: State, sign: float = 1.0, unit: str = "checks") -> str:
        now, interval = float(state["now"]), float(state["interval"])
        return f"another {interval:.3g} s after {now:.3g} s would exceed the budget of {self.seconds:g} s"


@dataclass(frozen=True, repr=False)
class Evidence(Criterion):
    """Stop when the gradients of the training data are no more than noise; no validation is needed.

    Formula: 1 − (1/D) · Σ_k g_k² / Var(g_k) > 0, with the mean gradient g over the training data and the variance of that
        mean, as `gf.stop.evidence(model, loss, batches)` computes it.
    Needs: the evidence. Without a validation tell the training loss as the score, and say restore=False to keep the last
        weights, those that the criterion stopped at.
    Numbers: none.
    Errors: missing evidence. Evidence of nan decides nothing.
    Source: Mahsereci, Balles, Lassner and Hennig 2017, Early stopping without a validation set, arXiv 1703.09580.

    >>> from goodfit import EarlyStopping
    >>> stopping = EarlyStopping(Evidence(), restore=False).watch(nn.Linear(1, 1))
    >>> [stopping(loss, evidence=e) for loss, e in ((1.0, -30.0), (0.9, -1.5), (0.8, 0.1))]
    [False, False, True]
    """

    kind: ClassVar[Reason] = Reason.EVIDENCE
    scored: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("evidence",)

    def init(self) -> State:
        return {"last": torch.zeros((), dtype=torch.float64)}

    def check(self, report: Report, state: State) -> tuple[Tensor, State]:
        assert report.evidence is not None
        return report.evidence > 0, {"last": report.evidence.to(state["last"])}

    def reason(self, state: State, sign: float = 1.0, unit: str = "checks") -> str:
        return f"the training gradients are noise, with an evidence of {float(state['last']):.4g} > 0"
