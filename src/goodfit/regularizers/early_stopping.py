"""Early stopping: enough is enough, and the best is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from goodfit.errors import GoodfitError
from goodfit.hyper import hyper, lifted
from goodfit.phases import Epoch, Finish, Report, State, Weights
from goodfit.regularizers.best_file import named, refuse_other_model
from goodfit.regularizers.watch import Watch
from goodfit.stop.criterion import Criterion, Reason, refuse_missing
from goodfit.stop.patience import Patience
from goodfit.stop.resumed import refuse_other
from goodfit.tensors import below, truth, under

__all__ = ["EarlyStopping", "Watch"]

CHOICES = {
    "mode": ("min", "max"),
    "unit": ("checks", "steps"),
    "nonfinite": ("bad", "stop", "raise", "ignore", "rollback"),
}
SETTLED = ("mode", "unit")


@dataclass(frozen=True)
class EarlyStopping(Epoch, Finish):
    """Stop when validation no longer improves, and give back the best weights and buffers.

    Formula: score v improves on the anchor a iff a − v > max(min_delta, rel_delta · |a|); then a ← v. Stop at the
        patience-th consecutive check without improvement. Kept are weights and buffers of the strictly lowest score.
        In place of a patience a criterion of `gf.stop`, or several: EarlyStopping(Patience(10, stderrs=1) | GL(5)).
    Phase: Epoch, then Finish; all weights and buffers, in their shapes.
    Numbers: patience, in the unit, an integer >= 1, off at inf (neither stops nor restores), or a criterion; min_delta, in
        units of the score, >= 0; rel_delta, share of |a|, >= 0; warmup, in the unit, >= 0; mode, "min" where lower scores
        are better, else "max"; unit, "checks" or optimizer "steps", counted from the last improvement and asked at checks;
        nonfinite, what a score that is nan or infinite does; restore, whether the best comes back.
    Errors: numbers outside their range; another choice; min_delta or rel_delta beside a criterion; a report that lacks what
        the criterion needs.
    Source: Prechelt 1998, Early stopping, but when?; Goodfellow et al. 2016, algorithm 7.1.

    The rules:
    1. An improvement is larger than max(min_delta, rel_delta · |a|); "max" is "min" of the negated score, in every number.
    2. The anchor (last accepted best) drives patience, the strictly best score what is kept: slow drift below min_delta
       stops, and loses nothing. A tie is no improvement and keeps the first.
    3. Patience p stops at the p-th check in a row without an improvement; p >= 1.
    4. A score that is nan or infinite is never an improvement and never a reference. nonfinite: "bad" counts it as a check
       without improvement; "stop" stops; "raise" raises; "ignore" is as if there had been no check; "rollback" is "bad", and
       the best so far goes back into the model (the optimizer's moments are the loop's to reset).
    5. A warm-up is tracked, and cannot stop, whatever the criterion: only checks behind it do.
    6. Numbers and names without a meaning are refused.
    7. Resumed with the same settings, it stops at the same check; with another patience, margin, threshold or warm-up, that
       one counts, also behind a stop. Another mode, unit, kind of criterion, k, median, restore or keep is refused.
    8. Processes that train together decide on one reduced score, and so all at the same check.
    9. Kept is what was scored, weights and buffers, and it comes back however the training ended.
    10. It says why it stopped, with numbers, and as a `gf.stop.Reason`.

    >>> stopping = EarlyStopping(patience=2).watch(nn.Linear(1, 1))
    >>> [stopping(loss) for loss in (1.0, 0.9, 0.95, 0.92)]
    [False, False, False, True]
    """

    patience: float | Criterion = hyper(  # noqa: RUF009 (a field, as all numbers)
        30, valid="[1, inf]", off=math.inf, low=5, high=100, log=True, unit="checks", fixed=True, instead=Criterion
    )
    min_delta: float = hyper(0.0, valid="[0, inf)", low=0.0, high=1e-2, unit="score", fixed=True)
    rel_delta: float = hyper(0.0, valid="[0, inf)", low=0.0, high=1e-2, fixed=True)
    warmup: float = hyper(0, valid="[0, inf)", low=0, high=50, unit="checks", fixed=True)
    mode: Literal["min", "max"] = "min"
    unit: Literal["checks", "steps"] = "checks"
    nonfinite: Literal["bad", "stop", "raise", "ignore", "rollback"] = "bad"
    restore: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
                raise GoodfitError(f"EarlyStopping.{name} must be {known}, got {name}={getattr(self, name)!r}.")
        if isinstance(self.patience, Criterion):
            for name in ("min_delta", "rel_delta"):
                if number := getattr(self, name):
                    raise GoodfitError(f"EarlyStopping.{name} belongs into a criterion here: Patience(20, {name}={number!r}).")

    @property
    def criterion(self) -> Criterion:
        """What says when to stop, of scores that are lower for better."""
        one = self.patience
        if not isinstance(one, Criterion):
            one = lifted(Patience(), patience=one, min_delta=self.min_delta, rel_delta=self.rel_delta)
        return one.mirrored() if self.mode == "max" else one

    @property
    def sign(self) -> float:
        """−1 where the user's scores are higher for better."""
        return 1.0 if self.mode == "min" else -1.0

    @property
    def keeps(self) -> bool:
        """Whether it needs a copy of the best weights."""
        return self.restore or self.nonfinite == "rollback"

    def init(self, weights: Weights, buffers: Weights) -> State:
        start = torch.tensor(math.inf, dtype=torch.float64)
        state = {"best": start, "last": start.clone()}
        state |= {name: torch.tensor(0) for name in ("checks", "best_check", "best_step")}
        state |= {name: torch.tensor(CHOICES[name].index(getattr(self, name))) for name in SETTLED}
        state |= under("criterion.", self.criterion.init())
        return state | ({name: t.detach().clone() for name, t in named(weights, buffers).items()} if self.keeps else {})

    def refuse_state(self, saved: State) -> None:
        for name in SETTLED:
            if name in saved and (there := CHOICES[name][int(saved[name])]) != getattr(self, name):
                told = f"The state was saved with {name}={there!r}, and here it is {getattr(self, name)!r}"
                raise GoodfitError(f"{told}, under which its numbers mean something else; say {name}={there!r}.")
        if not self.keeps and any(name.startswith("weights.") for name in saved):
            raise GoodfitError("The state was saved with the best weights in it, for which restore=False has no use.")
        refuse_other(self.criterion, below("criterion.", saved))

    def epoch(self, report: Report, weights: Weights, buffers: Weights, state: State) -> tuple[Tensor, State]:
        self.refuse(report, "run.epoch")
        v = self.sign * report.score
        finite = v.isfinite()
        if self.nonfinite == "raise" and not finite:
            raise GoodfitError(
                f"EarlyStopping(nonfinite='raise') heard a score of {float(report.score)} at check {int(state['checks']) + 1}; "
                "lower the learning rate, or look for nan in the data."
            )
        counts = finite | torch.tensor(self.nonfinite != "ignore")
        checks = state["checks"] + counts
        time = checks if self.unit == "checks" else report.step
        assert time is not None
        told = replace(report, score=v, step=time)
        stop, inner = self.criterion.hear(told, below("criterion.", state), counts)
        if self.nonfinite == "stop":
            stop = stop | ~finite
        best = finite & (v < state["best"])
        step = state["best_step"] if report.step is None else report.step.to(torch.int64)
        new = {
            "best": torch.where(best, v, state["best"]),
            "last": torch.where(counts, v, state["last"]),
            "checks": checks,
            "best_check": torch.where(best, checks, state["best_check"]),
            "best_step": torch.where(best, step, state["best_step"]),
            **{name: state[name] for name in SETTLED},
            **under("criterion.", inner),
            **(self._copies(best, named(weights, buffers), state) if self.keeps else {}),
        }
        warm = (time > self.warmup) | (torch.as_tensor(self.warmup) == 0)  # time 0: a check before the first step
        return ~(stop & warm), new

    def _copies(self, best: Tensor, now: Weights, state: State) -> State:
        """What is kept: the model of now where it is the best, else what was; copied only where it must be."""
        refuse_other_model(now, state)
        known = truth(best)
        if known is None:
            return {name: torch.where(best.to(t.device), t.detach(), state[name].to(t.device)) for name, t in now.items()}
        return {name: t.detach().clone() if known else state[name] for name, t in now.items()}

    def kept(self, weights: Weights, buffers: Weights, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The best weights and buffers so far, and those of now before there is a best."""
        return self._back(state["best_check"] > 0, weights, buffers, state)

    def finish(self, weights: Weights, buffers: Weights, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not self.restore:
            return dict(weights), dict(buffers)
        found = state["best_check"] > 0
        if not isinstance(self.patience, Criterion):
            found = found & (torch.as_tensor(self.patience) < math.inf)
        return self._back(found, weights, buffers, state)

    def _back(
        self, found: Tensor, weights: Weights, buffers: Weights, state: State
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        refuse_other_model(named(weights, buffers), state)

        def best(kind: str, now: Weights) -> dict[str, Tensor]:
            return {name: torch.where(found.to(t.device), state[f"{kind}.{name}"].to(t.device), t) for name, t in now.items()}

        return best("weights", weights), best("buffers", buffers)

    def restores(self, state: State) -> bool:
        off = not isinstance(self.patience, Criterion) and bool(torch.as_tensor(self.patience) == math.inf)
        return self.restore and not off and int(state["best_check"]) > 0

    def rolls_back(self, report: Report) -> bool:
        """Whether the best weights go back into the model after this report: load what `kept` gives."""
        return self.nonfinite == "rollback" and not math.isfinite(report.score)

    def refuse(self, report: Report, call: str) -> None:
        """Refuse a report that lacks what the criterion or the unit needs, and say how the `call` tells it."""
        refuse_missing(self.criterion, report, call)
        if self.unit == "steps" and report.step is None:
            raise GoodfitError(f"EarlyStopping(unit='steps') needs the optimizer step; say {call}(score, step=...).")

    def reason(self, state: State) -> str:
        last, at, checks = self.sign * float(state["last"]), int(state["best_check"]), int(state["checks"])
        text = self.criterion.reason(below("criterion.", state), self.sign, self.unit)
        if self.why(state) is Reason.NONFINITE:
            text = f"a score of {last:g}, which is not finite"
        best = f"best {self.sign * float(state['best']):.6g} at check {at}, " if at else ""
        return f"{text}: {best}{last:.6g} at check {checks}"

    def why(self, state: State) -> Reason:
        """The same in one word."""
        if self.nonfinite == "stop" and not math.isfinite(state["last"]):
            return Reason.NONFINITE
        return self.criterion.why(below("criterion.", state))

    def patience_left(self, state: State) -> float | None:
        """How much longer it goes on without an improvement, in the unit; None where no patience is in the criterion."""
        return self.criterion.patience_left(below("criterion.", state))

    def watch(self, model: nn.Module, keep: str | Path | None = None) -> Watch:
        """Use it alone, in any loop; keep: a file for the best weights, which then need no second copy in memory.

        `stopping = EarlyStopping(5).watch(model)`; `if stopping(valid_loss): break`; `stopping.restore()`.
        """
        return Watch(self, model, keep)
