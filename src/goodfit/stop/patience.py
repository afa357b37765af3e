"""Patience: so long without an improvement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from goodfit.hyper import hyper
from goodfit.phases import Report, State
from goodfit.stop.criterion import Criterion, Reason

__all__ = ["Patience"]


@dataclass(frozen=True, repr=False)
class Patience(Criterion):
    """Stop after so many checks in a row without an improvement.

    Formula: score v improves on the anchor a iff a − v > max(min_delta, rel_delta · |a|, stderrs · stderr); then a ← v, the
        best check b ← now. Stop at a check at which now − b >= patience + grow · b. The first finite score is an improvement.
    Needs: the standard error of the score, where stderrs > 0.
    Numbers: patience, checks (or optimizer steps, as EarlyStopping's unit says), an integer >= 1, never stops at inf;
        min_delta, in units of the score, >= 0; rel_delta, share of |a|, >= 0 (symmetric for negative scores); stderrs,
        standard errors of a score that count as noise, >= 0; grow, how much longer per check before the best, >= 0.
    Errors: numbers outside their range; a missing standard error. A score that is nan or infinite is never an improvement,
        and a standard error of nan lets none count.
    Source: Goodfellow et al. 2016, algorithm 7.1; Patience(10, grow=0.3) is the rule of AutoGluon (Erickson et al. 2020,
        arXiv 2003.06505), which waits longer the later the best came.

    >>> from goodfit import EarlyStopping
    >>> stopping = EarlyStopping(Patience(2, min_delta=0.1)).watch(nn.Linear(1, 1))
    >>> [stopping(loss) for loss in (1.0, 0.95, 0.91)]
    [False, False, True]
    """

    kind: ClassVar[Reason] = Reason.PATIENCE

    patience: float = hyper(30, valid="[1, inf]", low=5, high=100, log=True, unit="checks", fixed=True)
    min_delta: float = hyper(0.0, valid="[0, inf)", low=0.0, high=1e-2, unit="score", fixed=True)
    rel_delta: float = hyper(0.0, valid="[0, inf)", low=0.0, high=1e-2, fixed=True)
    stderrs: float = hyper(0.0, valid="[0, inf)", low=0.0, high=2.0, unit="standard errors", fixed=True)
    grow: float = hyper(0.0, valid="[0, inf)", low=0.0, high=1.0, fixed=True)

    @property
    def needs(self) -> tuple[str, ...]:
        return () if isinstance(self.stderrs, int | float) and self.stderrs == 0 else ("stderr",)

    def init(self) -> State:
        zero = torch.zeros((), dtype=torch.float64)
        return {"anchor": zero + math.inf, "best_at": zero, "now": zero.clone()}

    def check(self, report: Report, state: State) -> tuple[Tensor, State]:
        v, anchor = report.score, state["anchor"]
        now = state["now"] + 1 if report.step is None else report.step.to(state["now"])
        seen = anchor.isfinite()
        reference = torch.where(seen, anchor, 0.0)
        margin = (self.rel_delta * reference.abs()).clamp(min=self.min_delta)
        if report.stderr is not None:
            margin = torch.maximum(margin, self.stderrs * report.stderr)
        improved = v.isfinite() & (~seen | (reference - v > margin))
        new = {
            "anchor": torch.where(improved, v, anchor),
            "best_at": torch.where(improved, now, state["best_at"]),
            "now": now,
        }
        return ~improved & (now - new["best_at"] >= self._tolerated(new)), new

    def patience_left(self, state: State) -> float:
        return max(float(self._tolerated(state) - (state["now"] - state["best_at"])), 0.0)

    def reason(self, state: State, sign: float = 1.0, unit: str = "checks") -> str:
        waited = float(state["now"] - state["best_at"])
        length = f"{waited:g} {unit if waited != 1 else unit.removesuffix('s')}"
        if not state["anchor"].isfinite():
            return f"no finite score in {length}"
        errors = f" standard error{'s' if self.stderrs != 1 else ''}"
        margins = ((self.min_delta, ""), (self.rel_delta, " of itself"), (self.stderrs, errors))
        shown = " and ".join(f"{number:g}{what}" for number, what in margins if number)
        anchor = f" on {sign * float(state['anchor']):.6g}"
        return f"no improvement{f'{anchor} by more than {shown}' if shown else ''} in {length}"

    def _tolerated(self, state: State) -> Tensor:
        return self.patience + self.grow * state["best_at"]
