"""A training with checks: what came of it can be had at any moment, however it ends."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from goodfit.data import uncounted
from goodfit.errors import GoodfitError, listed
from goodfit.loop import LossFunction, Prepare, evaluate, mean_and_stderr, train_steps
from goodfit.phases import Finish
from goodfit.progress import Progress
from goodfit.regularizers.early_stopping import EarlyStopping
from goodfit.run import Run
from goodfit.stop.criterion import Reason
from goodfit.stop.gradients import evidence
from goodfit.tensors import tensors_of

__all__ = ["Training"]


@dataclass
class Training:
    """Epochs of the reference loop on `train`, checked on `valid` after each, or after every so many steps and the last.

    measure: f(outputs, y) → mean over the rows; rowwise: the loss of each row, where it is known. history: a dict per check.
    stopped: why it ended before the last epoch, "" where it did not; reason: the same in one word. put_back: whether the
    weights to keep are in the model.
    """

    run: Run
    optimizer: Optimizer
    train: Any
    valid: Any
    measure: LossFunction
    rowwise: LossFunction | None
    prepare: Prepare | None
    check_every: int | None = None
    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""
    reason: Reason | None = None
    put_back: bool = False
    _total: float | Tensor = 0.0
    _rows: int = 0
    _told: dict[str, Any] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        looks = self._asked("evidence") or self._averages()
        if self.check_every and looks and getattr(getattr(self.train, "loader", self.train), "persistent_workers", False):
            raise GoodfitError(
                "check_every looks at the training data in the middle of an epoch here, for averages or evidence, and workers "
                "that persist would begin the epoch anew; make the loader with persistent_workers=False."
            )

    def go(self, epochs: int, bar: Progress) -> None:
        """Train until the run does not want to go on, the epochs are over, or Ctrl-C behind the first check."""
        try:
            for self.epoch in range(1, epochs + 1):
                if not self._go_on(bar):
                    return
            if self._rows:  # steps behind the last of every so many
                self._check(bar)
        except KeyboardInterrupt:
            self._complete()
            if not self.history:
                raise KeyboardInterrupt("interrupted before the first check") from None
            self._end(f"interrupted in epoch {self.epoch}", Reason.INTERRUPTED)
        except BaseException as wrong:
            self._end(f"ended by {type(wrong).__name__} in epoch {self.epoch}", Reason.FAILED)
            raise

    def restored(self) -> int | None:
        """The step of the check whose weights an early stopping has put back, None where none has."""
        best = [int(state["best_step"]) for one, state in self.run.states(EarlyStopping) if one.restores(state)]
        return best[-1] if best and self.put_back else None

    def kept(self) -> dict[str, Any] | None:
        """The row of the check whose weights the model has after `finish`, None where no check has seen them."""
        step = self.restored()
        if step is None:
            within = self.reason in (Reason.INTERRUPTED, Reason.FAILED)  # in the middle of a step, maybe
            if within or (self._averages() and not self.put_back):
                return None
            step = self.step
        return next((row for row in self.history if row["step"] == step), None)

    def finish(self) -> None:
        """The weights to keep, into the model."""
        self.run.finish(uncounted(self.train))
        self.put_back = True

    def interrupt(self, told: str) -> None:
        """Say that Ctrl-C came, behind what ended the training."""
        self._end("; ".join(filter(None, (self.stopped, told))), Reason.INTERRUPTED)

    def score(self) -> float:
        """What the model scores as it is."""
        return evaluate(self.run.model, self.valid, self.measure)

    def otherwise(self, score: float, row: dict[str, Any]) -> str:
        """How a score of the model differs from that of its check by more than rounding, and what may be why; "" if not."""
        types = [p.dtype for p in self.run.model.parameters() if p.is_floating_point()]
        rounding = max((torch.finfo(kind).eps ** 0.5 for kind in types), default=0.0)
        said = row["valid_loss"]
        if not math.isfinite(said) or math.isclose(score, said, rel_tol=rounding, abs_tol=1e-12):
            return ""
        known = tensors_of(self.run.model)[1]
        passing = [name for name, _ in self.run.model.named_buffers() if name not in known]
        told = f"; not restored, since not persistent: buffer {listed(passing)}" if passing else ""
        return (
            f"The model that comes back scores {score:.6g}, and its check in epoch {row['epoch']} said {said:.6g}: validation "
            "is not the same twice; give data and a model that are (F.dropout and F.scaled_dot_product_attention drop in eval "
            f"mode too, where a rate is passed{told})."
        )

    def _go_on(self, bar: Progress) -> bool:
        """One epoch with its checks; whether another may follow."""
        empty = True
        for loss, rows in train_steps(self.run, self.optimizer, self.train, self.prepare):
            self._total, self._rows = self._total + loss.double() * rows, self._rows + rows
            self.step += 1
            empty = False
            if self.check_every and self.step % self.check_every == 0 and not self._check(bar):
                return False
        if empty:
            text = f"train gave no batch in epoch {self.epoch}, as a stream that can be read once"
            if not self.history:
                raise GoodfitError(f"{text}; give a DataLoader, or a smaller check_every.")
            self._end(text, Reason.FAILED)
            return False
        return bool(self.check_every) or self._check(bar)

    def _check(self, bar: Progress) -> bool:
        """Score what would be kept, and tell the run; whether to go on."""
        train_loss = float(self._total / self._rows)
        with self.run.view(uncounted(self.train)):
            score, stderr = mean_and_stderr(self.run.model, self.valid, self.measure, self.rowwise)
            self._refuse_unknown(stderr)
            noise = evidence(self.run.model, self.measure, uncounted(self.train)) if self._asked("evidence") else None
            self._told = {
                "epoch": self.epoch,
                "step": self.step,
                "train_loss": train_loss,
                "valid_loss": score,
                "stderr": stderr,
            }
            go_on = self.run.epoch(score, train_loss=train_loss, stderr=stderr, evidence=noise)
        self._write()
        self._total, self._rows, self._began = 0.0, 0, time.perf_counter()
        bar.tell(self.history[-1])
        if not go_on:
            self._end(self.run.stopped, self.run.reason)
        elif not math.isfinite(train_loss) and not self._rolls_back():
            self._end(f"the training loss became {train_loss} in epoch {self.epoch}", Reason.NONFINITE)
        return not self.stopped

    def _write(self) -> None:
        """The row of a check that the run has heard."""
        left = [n for one, state in self.run.states(EarlyStopping) if (n := one.patience_left(state)) is not None]
        scores = [row["valid_loss"] for row in [*self.history, self._told]]
        row = self._told | {"penalty": self.run.penalty(), "best": min(filter(math.isfinite, scores), default=math.inf)}
        self.history.append(row | {"patience_left": min(left, default=None), "seconds": time.perf_counter() - self._began})

    def _complete(self) -> None:
        """Ctrl-C may come between the hearing of a check and its row: what is kept must be in the history."""
        step = self._told.get("step")
        kept = [int(state["best_step"]) for _, state in self.run.states(EarlyStopping)]
        if step in kept and all(row["step"] != step for row in self.history):
            self._write()

    def _asked(self, name: str) -> bool:
        """Whether a criterion asks for it."""
        return any(name in one.criterion.needs for one, _ in self.run.states(EarlyStopping))

    def _averages(self) -> bool:
        return any(one.averages for one, _ in self.run.states(Finish))

    def _refuse_unknown(self, stderr: float | None) -> None:
        if stderr is None and self._asked("stderr"):
            raise GoodfitError(
                "The standard error of the validation loss is not known for one row, nor for one batch of a loss that does "
                "not tell its rows apart; give valid in more batches, or a criterion without stderrs."
            )

    def _rolls_back(self) -> bool:
        return any(one.nonfinite == "rollback" for one, _ in self.run.states(EarlyStopping))

    def _end(self, stopped: str, reason: Reason | None) -> None:
        self.stopped, self.reason = stopped, reason
