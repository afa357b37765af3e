"""One early stopping beside a model, in anybody's loop."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from goodfit.errors import GoodfitError
from goodfit.kept import read, write
from goodfit.losses import score_of
from goodfit.phases import Report, State, Weights
from goodfit.processes import rank
from goodfit.stop.agreement import reduced
from goodfit.stop.criterion import Reason
from goodfit.tensors import load_tensors, tensors_of

__all__ = ["Watch", "named"]


class _Stopping(Protocol):
    """What a watch asks of the regularizer."""

    @property
    def sign(self) -> float: ...
    @property
    def restore(self) -> bool: ...
    def init(self, weights: Weights, buffers: Weights) -> State: ...
    def epoch(self, report: Report, weights: Weights, buffers: Weights, state: State) -> tuple[Tensor, State]: ...
    def kept(self, weights: Weights, buffers: Weights, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...
    def finish(self, weights: Weights, buffers: Weights, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...
    def rolls_back(self, report: Report) -> bool: ...
    def refuse(self, report: Report, call: str) -> None: ...
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
        self.stopping, self.model = stopping, model
        self.file = None if keep is None else _file(keep)
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
        others = (train_loss, stderr, evidence, step, time.monotonic() - self._began)
        report = Report(score_of(score), *(None if n is None else score_of(n) for n in others))
        self.stopping.refuse(report, "stopping")
        self._in_order(report)
        report = reduced(report)
        before = int(self.state["best_check"])
        go_on, self.state = self.stopping.epoch(report, *self._tensors(), self.state)
        self.history.append(float(report.score))
        if self.file is not None and int(self.state["best_check"]) != before:
            write(self.file, {**named(*tensors_of(self.model)), **self._mark()})
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
        """Put the best weights and buffers back into the model."""
        if self.file is None:
            load_tensors(self.model, *self.stopping.finish(*tensors_of(self.model), self.state))
        elif self.stopping.restore:
            self._put_back()
        return self.model

    def state_dict(self) -> dict[str, Tensor]:
        """All that it must remember, as flat tensors, without settings; weights that are kept in a file stay there."""
        own = {
            "step": torch.tensor(self._step, dtype=torch.float64),
            "seconds": torch.tensor(time.monotonic() - self._began, dtype=torch.float64),
            "history": torch.tensor(self.history, dtype=torch.float64),
            "stopped": _bytes(self.stopped),
            "reason": _bytes(self.reason.name if self.reason else ""),
        }
        return {name: t.clone() for name, t in self.state.items()} | {f"watch.{name}": t for name, t in own.items()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken, beside a model of the same weights."""
        expected = self.state_dict()
        odd = sorted(saved.keys() ^ expected.keys())
        if odd:
            raise GoodfitError(f"The state of another criterion or model: {odd[0]!r} does not match; make the same ones first.")
        for name, t in self.state.items():
            if saved[name].shape != t.shape:
                shapes = f"{tuple(t.shape)}, got {tuple(saved[name].shape)}"
                raise GoodfitError(f"The state of another model: {name!r} must have shape {shapes}; make the same model first.")
        self.state = {name: torch.empty_like(t).copy_(saved[name]) for name, t in self.state.items()}
        self.history = saved["watch.history"].tolist()
        self.stopped, why = _text(saved["watch.stopped"]), _text(saved["watch.reason"])
        self.reason = Reason[why] if why else None
        self._step, self._began = float(saved["watch.step"]), time.monotonic() - float(saved["watch.seconds"])

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
        if self.file is None:
            load_tensors(self.model, *self.stopping.kept(weights, buffers, self.state))
        elif self.best_check:
            load_tensors(self.model, *self._from_file(weights, buffers))

    def _from_file(self, weights: Weights, buffers: Weights) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert self.file is not None
        found = read(self.file)
        expected = {**named(weights, buffers), **self._mark()}
        odd = sorted(found.keys() ^ expected.keys()) or [n for n, t in expected.items() if found[n].shape != t.shape]
        if odd:
            raise GoodfitError(f"{str(self.file)!r} holds the weights of another model: {odd[0]!r} does not match.")
        if any(not torch.equal(found[name], t) for name, t in self._mark().items()):
            raise GoodfitError(
                f"{str(self.file)!r} holds the best of another run: check {int(found['check'])} with "
                f"{float(found['score']):.6g}, not check {self.best_check} with {self.best:.6g}; give each its own file."
            )
        return {n: found[f"weights.{n}"] for n in weights}, {n: found[f"buffers.{n}"] for n in buffers}

    def _mark(self) -> dict[str, Tensor]:
        """What tells the file of one run from that of another."""
        return {"check": self.state["best_check"], "score": self.state["best"] * self.stopping.sign}


def named(weights: Weights, buffers: Weights) -> dict[str, Tensor]:
    """All tensors of a model under the names that the state has for them."""
    return {**{f"weights.{n}": w for n, w in weights.items()}, **{f"buffers.{n}": b for n, b in buffers.items()}}


def _file(keep: Any) -> Path:
    if not isinstance(keep, str | Path):
        raise GoodfitError(f"keep must be the path of a file for the best weights, got a {type(keep).__name__}.")
    path = Path(keep)
    if path.is_dir() or not path.parent.is_dir():
        raise GoodfitError(f"keep must be the path of a file in a folder that is there, got {str(keep)!r}.")
    return path.with_name(f"{path.stem}.rank{rank()}{path.suffix}") if rank() else path


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _text(numbers: Tensor) -> str:
    return bytes(numbers.tolist()).decode()
