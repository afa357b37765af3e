"""Early stopping: enough is enough, and the best is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from goodfit.errors import GoodfitError
from goodfit.hyper import hyper
from goodfit.phases import Epoch, Finish, Report, State, Weights
from goodfit.tensors import load_tensors, tensors_of

__all__ = ["EarlyStopping", "Watch"]


@dataclass(frozen=True)
class EarlyStopping(Epoch, Finish):
    """Stop when validation no longer improves, and give back the best weights and buffers.

    Formula: score v improves on the anchor a iff a − v > max(min_delta, rel_delta · |a|); then a ← v. Stop at the
        patience-th consecutive check without improvement. Kept are weights and buffers of the strictly lowest score.
    Phase: Epoch, then Finish; all weights and buffers, in their shapes.
    Numbers: patience, checks, an integer >= 1, off at inf (neither stops nor restores); min_delta, in units of the score,
        >= 0; rel_delta, share of |a|, >= 0 (symmetric for negative scores); warmup, checks that are tracked but cannot
        stop, >= 0; mode, "min" where lower scores are better, else "max".
    Errors: numbers outside their range; another mode. A score that is nan or infinite is never an improvement; it counts
        as a check without one.
    Source: Prechelt 1998, Early stopping, but when?; Goodfellow et al. 2016, algorithm 7.1. The anchor (last accepted
        best) and the kept best (strictly best) are apart, so slow drift below min_delta stops, and loses nothing.

    >>> stopping = EarlyStopping(patience=2).watch(nn.Linear(1, 1))
    >>> [stopping(loss) for loss in (1.0, 0.9, 0.95, 0.92)]
    [False, False, False, True]
    """

    patience: float = hyper(20, valid="[1, inf]", off=math.inf, low=5, high=100, log=True, unit="checks")
    min_delta: float = hyper(0.0, valid="[0, inf)", low=0.0, high=1e-2, unit="score")
    rel_delta: float = hyper(0.0, valid="[0, inf)", low=0.0, high=1e-2)
    warmup: float = hyper(0, valid="[0, inf)", low=0, high=50, unit="checks")
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("min", "max"):
            raise GoodfitError(f"EarlyStopping.mode must be 'min' or 'max', got mode={self.mode!r}.")

    def init(self, weights: Weights, buffers: Weights) -> State:
        start = torch.tensor(math.inf, dtype=torch.float64)
        state = {"best": start, "anchor": start.clone(), "last": start.clone()}
        state |= {name: torch.tensor(0) for name in ("checks", "bad", "best_check")}
        state |= {f"weights.{name}": w.detach().clone() for name, w in weights.items()}
        return state | {f"buffers.{name}": b.detach().clone() for name, b in buffers.items()}

    def epoch(self, report: Report, weights: Weights, buffers: Weights, state: State) -> tuple[Tensor, State]:
        v = report.score if self.mode == "min" else -report.score
        anchor, seen = state["anchor"], state["anchor"].isfinite()
        reference = torch.where(seen, anchor, 0.0)
        margin = torch.maximum(_as(self.min_delta, v), self.rel_delta * reference.abs())
        improved = v.isfinite() & (~seen | (reference - v > margin))
        best = v.isfinite() & (v < state["best"])
        checks = state["checks"] + 1
        bad = torch.where(improved, 0, state["bad"] + 1)
        new = {
            "best": torch.where(best, v, state["best"]),
            "anchor": torch.where(improved, v, anchor),
            "last": v,
            "checks": checks,
            "bad": bad,
            "best_check": torch.where(best, checks, state["best_check"]),
        }
        for name, tensor in _kept(weights, buffers):
            new[name] = torch.where(best.to(tensor.device), tensor.detach(), state[name].to(tensor.device))
        return ~((bad >= self.patience) & (checks > self.warmup)), new

    def finish(self, weights: Weights, buffers: Weights, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found = (state["best_check"] > 0) & (_as(self.patience, state["best"]) < math.inf)

        def kept(kind: str, now: Weights) -> dict[str, Tensor]:
            return {name: torch.where(found.to(t.device), state[f"{kind}.{name}"].to(t.device), t) for name, t in now.items()}

        return kept("weights", weights), kept("buffers", buffers)

    def reason(self, state: State) -> str:
        sign = 1 if self.mode == "min" else -1
        best, last, at = sign * float(state["best"]), sign * float(state["last"]), int(state["best_check"])
        if at == 0:
            return f"no finite score in {_checks(state['checks'])}: {last:.6g} at the last"
        share = f"{self.rel_delta:g} of itself" if self.rel_delta else ""
        margins = " and ".join(filter(None, (f"{self.min_delta:g}" if self.min_delta else "", share)))
        margin = f" by more than {margins}" if margins else ""
        return (
            f"no improvement{margin} in {_checks(state['bad'])}: best {best:.6g} at check {at}, "
            f"{last:.6g} at check {int(state['checks'])}"
        )

    def patience_left(self, state: State) -> float:
        """How many more checks without improvement it takes to stop."""
        return max(self.patience - int(state["bad"]), 0)

    def watch(self, model: nn.Module) -> Watch:
        """Use it alone, in any loop.

        `stopping = EarlyStopping(5).watch(model)`; `if stopping(valid_loss): break`; `stopping.restore()`.
        """
        return Watch(self, model)


class Watch:
    """One EarlyStopping beside a model: call it with each validation score, True means stop."""

    def __init__(self, stopping: EarlyStopping, model: nn.Module) -> None:
        self.stopping, self.model = stopping, model
        self.state = stopping.init(*tensors_of(model))
        self.stopped = ""

    def __call__(self, score: float | Tensor) -> bool:
        """Hear one score; whether to stop."""
        report = Report(torch.as_tensor(score, dtype=torch.float64, device="cpu").detach())
        go_on, self.state = self.stopping.epoch(report, *tensors_of(self.model), self.state)
        if not go_on and not self.stopped:
            self.stopped = self.stopping.reason(self.state)
        return bool(self.stopped)

    @property
    def best(self) -> float:
        """The best score so far, inf (or -inf for mode="max") before the first."""
        return float(self.state["best"]) * (1 if self.stopping.mode == "min" else -1)

    def restore(self) -> nn.Module:
        """Put the best weights and buffers back into the model."""
        load_tensors(self.model, *self.stopping.finish(*tensors_of(self.model), self.state))
        return self.model


def _checks(count: Tensor) -> str:
    return f"{int(count)} check{'s' if int(count) > 1 else ''}"


def _kept(weights: Weights, buffers: Weights) -> list[tuple[str, Tensor]]:
    return [(f"weights.{n}", w) for n, w in weights.items()] + [(f"buffers.{n}", b) for n, b in buffers.items()]


def _as(number: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(number, dtype=like.dtype, device=like.device)
