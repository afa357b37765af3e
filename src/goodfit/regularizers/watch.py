"""One early stopping beside a model, in anybody's loop."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.phases import Report, State, Weights
from goodfit.regularizers.best_file import BestFile
from goodfit.stop.agreement import reduced
from goodfit.stop.criterion import Reason
from goodfit.stop.telling import told
from goodfit.surgery.refusals import refuse_lazy
from goodfit.tensors import below, from_text, load_tensors, matched, refuse_no_state, tensors_of, to_text

__all__ = ["Watch"]


class _Stopping(Protocol):
    """What a watch asks of the regularizer."""

    @property
    def sign(self) -> float: ...
    @property
    def restore(self) -> bool: ...
    @property
    def keeps(self) -> bool: ...
    def init(self, weights: Weights, buffers: Weights) -> State: ...
    def epoch(self, report: Report, weights: Weights, buffers: Weights, state: State) -> tuple[Tensor, State]: ...
    def kept(self, weights: Weights, buffers: Weights, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...
    def finish(self, weights: Weights, buffers: Weights, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...
    def rolls_back(self, report: Report) -> bool: ...
    def refuse(self, report: Report, call: str) -> None: ...
    def refuse_state(self, saved: State) -> None: ...
    def reason(self, state: State) -> str: ...
    def why(self, state: State) -> Reason: ...


class Watch:
    """One EarlyStopping beside a model: call it with each validation score, True means stop.

    stopped: why, as text, "" before. reason: the same as a `gf.stop.Reason`. history: the scores that it heard. keep: a
    file for the best weights in place of memory; in several processes each has its own, with its rank in the name.
    """

    def __init__(self, stopping: _Stopping, model: nn.Module, keep: str | Path | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise GoodfitError(f"watch takes a torch.nn.Module, got a {type(model).__name__}.")
        refuse_lazy(model, "watch")
        self.stopping, self.model = stopping, model
        self.file = None if keep is None else BestFile(keep, stopping)
        self.state = stopping.init(*self._tensors())
        self.stopped = ""
        self.reason: Reason | None = None
        self.history: list[float] = []
        self._step, self._began = -math.inf, time.monotonic()

    def __call__(
        self,
        score: float | Tensor,
        *,
        train_loss: float | Tensor | None = None,
        stderr: float | Tensor | None = None,
        evidence: float | Tensor | None = None,
        step: int | Tensor | None = None,
    ) -> bool:
        """Hear one score, and what else the criterion needs; whether to stop."""
        seconds = time.monotonic() - self._began
        report = told(score, train_loss=train_loss, stderr=stderr, evidence=evidence, step=step, seconds=seconds)
        self.stopping.refuse(report, "stopping")
        self._in_order(report)
        report = reduced(report)
        before = int(self.state["best_check"])
        go_on, self.state = self.stopping.epoch(report, *self._tensors(), self.state)
        self.history.append(float(report.score))
        if self.file is not None and int(self.state["best_check"]) != before:
            self.file.write(*tensors_of(self.model), self.state)
        if self.stopping.rolls_back(report):
            self._put_back()
        if not go_on and not self.stopped:
            self.stopped, self.reason = self.stopping.reason(self.state), self.stopping.why(self.state)
        return bool(self.stopped)

    @property
    def best(self) -> float:
        """The best score so far, inf (or -inf for mode="max") before the first."""
        return float(self.state["best"]) * self.stopping.sign

    @property
    def best_check(self) -> int:
        """The number of the check with the best score, from 1; 0 before the first."""
        return int(self.state["best_check"])

    def restore(self) -> nn.Module:
        """Put the best weights and buffers back into the model; before the first check there are none, which is told."""
        if not self.history:
            warnings.warn("restore() came before any check: the model stays as it is.", GoodfitWarning, stacklevel=2)
        weights, buffers = tensors_of(self.model)
        load_tensors(self.model, *self.stopping.finish(weights, buffers, self._whole(weights, buffers)))
        return self.model

    def state_dict(self) -> dict[str, Tensor]:
        """All that it must remember, as flat tensors; weights that are kept in a file stay there."""
        own = {
            "step": torch.tensor(self._step, dtype=torch.float64),
            "seconds": torch.tensor(time.monotonic() - self._began, dtype=torch.float64),
            "history": torch.tensor(self.history, dtype=torch.float64),
            "stopped": from_text(self.stopped),
            "reason": from_text(self.reason.name if self.reason else ""),
            "settings": from_text(repr(self.stopping)),
            "kept": from_text(self.file.mark if self.file else ""),
        }
        return {name: t.clone() for name, t in self.state.items()} | {f"watch.{name}": t for name, t in own.items()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken, beside a model of the same weights; other settings are asked anew."""
        refuse_no_state(saved)
        own = below("watch.", saved)
        mine = below("watch.", self.state_dict())
        if own.keys() != mine.keys():
            raise GoodfitError(
                f"The state of no watch: {min(own.keys() ^ mine.keys())!r} does not match; load what its state_dict gave."
            )
        state = {name: t for name, t in saved.items() if not name.startswith("watch.")}
        self.stopping.refuse_state(state)
        state = matched(self.state, state, "criterion or model")
        if self.file is not None:
            self.file.take(to_text(own["kept"]), *tensors_of(self.model), state)
        same = to_text(own["settings"]) == repr(self.stopping)
        self.state, self.history = state, own["history"].tolist()
        self.stopped, why = (to_text(own[name]) if same else "" for name in ("stopped", "reason"))
        self.reason = Reason[why] if why else None
        self._step, self._began = float(own["step"]), time.monotonic() - float(own["seconds"])

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the regularizer keeps in its state."""
        return tensors_of(self.model) if self.file is None else ({}, {})

    def _in_order(self, report: Report) -> None:
        if report.step is not None:
            if not float(report.step) >= self._step:
                raise GoodfitError(
                    f"step must be the number of optimizer steps so far, which never falls, got {float(report.step):g} after "
                    f"{self._step:g}; count over all epochs."
                )
            self._step = float(report.step)

    def _put_back(self) -> None:
        """The best into the model, where there is one."""
        weights, buffers = tensors_of(self.model)
        load_tensors(self.model, *self.stopping.kept(weights, buffers, self._whole(weights, buffers)))

    def _whole(self, weights: Weights, buffers: Weights) -> State:
        """The state with what is kept, also where a file has that."""
        if self.file is None or not self.stopping.keeps:
            return self.state
        return {**self.state, **self.file.read(weights, buffers, self.state)}
