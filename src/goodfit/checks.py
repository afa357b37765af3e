"""The checks of a run: what its Epoch phases hear of a validation, and why they stop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from goodfit.errors import GoodfitError
from goodfit.phases import Epoch, Gradient, Penalty, Report, Step
from goodfit.plan import Plan
from goodfit.stop.agreement import reduced
from goodfit.stop.criterion import Reason
from goodfit.stop.telling import told
from goodfit.tensors import from_text, tensors_of, to_text
from goodfit.views import Views

__all__ = ["Checks"]


class Checks:
    """What a run hears. stopped: why it does not go on, "" while it does. reason: the same in one word."""

    def __init__(self, plan: Plan, views: Views) -> None:
        self.plan, self.views = plan, views
        _refuse_opposite([one for _, one in plan.of(Epoch)])
        self.heard = False
        self.stopped = ""
        self.reason: Reason | None = None
        self._began = time.monotonic()

    def hear(self, score: Any, others: Mapping[str, Any], optimizers: Iterable[Optimizer]) -> bool:
        """Tell all Epoch phases of one check; whether to go on."""
        if self.heard:
            self._refuse_standstill()
        phases = self.plan.of(Epoch)
        if phases and not self.views.inside:
            raise GoodfitError(
                "The cocktail averages weights, and what is scored must be what is kept; validate and call run.epoch within: "
                "with run.view(train_loader):"
            )
        report = reduced(self.refuse_report(score, **others))
        self.heard = True
        for key, one in phases:
            if not self._tell(key, one, report, optimizers) and not self.stopped:
                self.stopped, self.reason = one.reason(self.plan.states[key]), one.why(self.plan.states[key])
        return not self.stopped

    def refuse_report(self, score: Any, call: str = "run.epoch", **others: Any) -> Report:
        """What a check tells; refuses one that lacks something."""
        own = told(score, step=self.plan.clock.step, seconds=time.monotonic() - self._began, **others)
        for _, one in self.plan.of(Epoch):
            one.refuse(own, call)
        return own

    def refuse_end(self) -> None:
        """Refuse to end where a regularizer has waited in vain, for scores or for steps."""
        deaf = next((one for _, one in self.plan.of(Epoch)), None)
        if deaf is not None and not self.heard:
            raise GoodfitError(f"{type(deaf).__name__} has heard no score; call run.epoch(score) after each validation.")
        self._refuse_standstill()

    def state_dict(self) -> dict[str, Tensor]:
        """What must be remembered between two checks."""
        return {
            "heard": torch.tensor(self.heard),
            "seconds": torch.tensor(time.monotonic() - self._began, dtype=torch.float64),
            "stopped": from_text(self.stopped),
            "reason": from_text(self.reason.name if self.reason else ""),
            "cocktail": from_text(self._cocktail()),
            "kept": from_text("".join(file.mark for file in self.views.files.values())),
        }

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken; what another cocktail had stopped, as of less patience, is asked anew."""
        self.views.take(to_text(saved["kept"]))
        self.heard = bool(saved["heard"])
        self._began = time.monotonic() - float(saved["seconds"])
        same = to_text(saved["cocktail"]) == self._cocktail()
        self.stopped, reason = (to_text(saved[name]) if same else "" for name in ("stopped", "reason"))
        self.reason = Reason[reason] if reason else None

    def _cocktail(self) -> str:
        return ", ".join(map(repr, self.plan.active.values()))

    def _refuse_standstill(self) -> None:
        waiting = [r for kind in (Penalty, Gradient, Step) for _, r in self.plan.of(kind)]
        waiting += [r for _, r in self.plan.of(Epoch) if getattr(r, "unit", "") == "steps"]
        if waiting and self.plan.clock.step == 0:
            raise GoodfitError(
                f"{waiting[0]} has not acted: no optimizer step has reached this run; call run.attach(optimizer) with the very "
                "optimizer that steps (a copied one has lost its hooks)."
            )

    def _tell(self, key: str, one: Any, report: Report, optimizers: Iterable[Optimizer]) -> bool:
        weights, buffers = tensors_of(self.plan.model)
        file, before = self.views.files.get(key), self.plan.states[key]
        go_on, state = one.epoch(report, *(({}, {}) if file else (weights, buffers)), before)
        if file is not None and int(state["best_check"]) != int(before["best_check"]):
            file.write(weights, buffers, state)
        self.plan.states[key] = state
        if one.rolls_back(report):
            self.views.roll_back(*one.kept(weights, buffers, self.views.whole(key)))
            _forget_nonfinite(optimizers)
        return bool(go_on)


def _refuse_opposite(stopping: list[Any]) -> None:
    """Refuse two that hear the one score as lower and as higher for better."""
    modes = {getattr(one, "mode", ""): one for one in stopping}
    if len(modes) > 1:
        one, other = list(modes.values())[:2]
        raise GoodfitError(f"{one} and {other} hear the same score, and it is lower or higher for better; give both one mode.")


def _forget_nonfinite(optimizers: Iterable[Optimizer]) -> None:
    """A moment that is nan would spoil the weights again at the next step."""
    for optimizer in optimizers:
        for weight, state in list(optimizer.state.items()):
            if not all(t.isfinite().all() for t in state.values() if isinstance(t, Tensor) and t.is_floating_point()):
                del optimizer.state[weight]
