"""A training with checks: what came of it can be had at any moment, however it ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from goodfit.checkpoints.checkpoints import Saving
from goodfit.errors import GoodfitError
from goodfit.fitting.data import uncounted
from goodfit.fitting.feed import Feed, persistent
from goodfit.fitting.guard import Nonfinite
from goodfit.fitting.learning_rates import Scheduling
from goodfit.fitting.loop import LossFunction, evaluate, mean_and_stderr
from goodfit.fitting.stepping import Stepping
from goodfit.interrupts import Interrupts
from goodfit.logs import Told
from goodfit.phases import Finish
from goodfit.processes import alike, most
from goodfit.progress import Progress
from goodfit.regularizers.early_stopping import EarlyStopping
from goodfit.stop.criterion import Reason
from goodfit.stop.gradients import evidence
from goodfit.tally import Tally

__all__ = ["Training"]


@dataclass
class Training:
    """Epochs of the reference loop on `train`, checked on `valid` after each, or after every so many steps and the last.

    measure: f(outputs, y) → mean over the rows; rowwise: the loss of each row, where it is known. history: a dict per check.
    stopped: why it ended before the last epoch, "" where it did not; reason: the same in one word. put_back: whether the
    weights to keep are in the model. saving: its checkpoints. asked: for what, as text.
    """

    stepping: Stepping
    train: Any
    valid: Any
    measure: LossFunction
    rowwise: LossFunction | None
    check_every: int | None = None
    nonfinite: str = "stop"
    log: Told = field(default_factory=lambda: Told(None))
    schedule: Scheduling = field(default_factory=Scheduling)
    saving: Saving | None = None
    asked: dict[str, str] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""
    reason: Reason | None = None
    put_back: bool = False
    tally: Tally = field(default_factory=Tally)
    _told: dict[str, Any] = field(default_factory=dict)
    _interrupts: Interrupts = field(default_factory=Interrupts)

    def __post_init__(self) -> None:
        self.run, self.feed = self.stepping.run, Feed(self.train)
        looks = self._asked("evidence") or self.averages()
        if self.check_every and looks and persistent(self.train):
            raise GoodfitError(
                "check_every looks at the training data in the middle of an epoch here, for averages or evidence, and workers "
                "that persist would begin the epoch anew; make the loader with persistent_workers=False."
            )

    def go(self, epochs: int, bar: Progress, interrupts: Interrupts) -> None:
        """Train until the run does not want to go on, the epochs are over, or Ctrl-C behind the first check."""
        self._interrupts = interrupts
        if self.epoch > epochs:
            raise GoodfitError(
                f"The training was saved in epoch {self.epoch}, beyond epochs={epochs}; ask for as many, or save in another "
                "folder."
            )
        try:
            self.stopped, self.reason = self.run.stopped, self.run.reason  # of a training that was saved at its end
            self._epochs(range(self.epoch + self.feed.over, epochs + 1), bar)
            if self.saving is not None and self.reason is not Reason.NONFINITE:
                self.saving.save(self.step)
        except KeyboardInterrupt:
            self._complete()
            if not self.history:
                raise KeyboardInterrupt("interrupted before the first check") from None
            self._end(f"interrupted in epoch {self.epoch}", Reason.INTERRUPTED)
        except Nonfinite as wrong:
            self._end(str(wrong).removesuffix("."), Reason.NONFINITE)
            if not self.history or self.nonfinite == "raise":
                raise
        except BaseException as wrong:
            self._end(f"ended by {type(wrong).__name__} in epoch {self.epoch}", Reason.FAILED)
            raise

    def steps(self, enough: int, interrupts: Interrupts) -> Iterator[int]:
        """So many steps, and no check."""
        self._interrupts = interrupts
        while self.step < enough:
            for _ in islice(self.stepping.over(self.feed), enough - self.step):
                self.step += 1
                self.schedule.behind("steps")
                yield self.step
                self._between()
            if self.step < enough:
                self._end_epoch()
        if self.saving is not None:
            self.saving.save(self.step)

    def restored(self) -> int | None:
        """The step of the check whose weights an early stopping has put back, None where none has."""
        best = [int(state["best_step"]) for one, state in self.run.states(EarlyStopping) if one.restores(state)]
        return best[-1] if best and self.put_back else None

    def kept(self) -> dict[str, Any] | None:
        """The row of the check whose weights the model has after `finish`, None where no check has seen them."""
        step = self.restored()
        if step is None:
            within = self.reason in (Reason.INTERRUPTED, Reason.FAILED)  # in the middle of a step, maybe
            if within or (self.averages() and not self.put_back):
                return None
            step = self.step
        return next((row for row in self.history if row["step"] == step), None)

    def averages(self) -> bool:
        """Whether what is kept is made of the weights of several steps."""
        return any(one.averages for one, _ in self.run.states(Finish))

    def finish(self) -> None:
        """The weights to keep, into the model."""
        self.run.finish(uncounted(self.train))
        self.put_back = True

    def interrupt(self, told: str) -> None:
        """Say that Ctrl-C came, behind what ended the training."""
        self._end("; ".join(filter(None, (self.stopped, told))), Reason.INTERRUPTED)

    def score(self) -> float:
        """What the model scores as it is."""
        with self.stepping.autocast():
            return evaluate(self.run.model, self.valid, self.measure)

    def _epochs(self, epochs: range, bar: Progress) -> None:
        if self.stopped:
            return
        for self.epoch in epochs:
            if not self._go_on(bar):
                return
        if self.tally.rows:  # steps behind the last of every so many
            self._check(bar)

    def _go_on(self, bar: Progress) -> bool:
        """One epoch with its checks; whether another may follow."""
        for loss, rows in self.stepping.over(self.feed):
            self.tally.add(loss, rows)
            self.step += 1
            self.schedule.behind("steps")
            if self.check_every and self.step % self.check_every == 0 and not self._check(bar):
                return False
            if not self._between():
                return False
        if not self.feed.done:
            text = f"train gave no batch in epoch {self.epoch}, as a stream that can be read once"
            if not self.history:
                raise GoodfitError(f"{text}; give a DataLoader, or a smaller check_every.")
            self._end(text, Reason.FAILED)
            return False
        self._end_epoch()
        return (bool(self.check_every) or self._check(bar)) and self._between()

    def _end_epoch(self) -> None:
        self.feed.over = True
        self.schedule.behind("epochs")

    def _between(self) -> bool:
        """Between two steps: save where it is time to, and hear a signal, of any process; whether to go on."""
        if asked := most(self._interrupts.asked):
            self._interrupts.asked = asked
            if self.saving is not None:
                self.saving.save(self.step)
            self._interrupts.pass_on()
            if not self.history:
                raise KeyboardInterrupt
            self._end(f"interrupted in epoch {self.epoch}", Reason.INTERRUPTED)
            return False
        if self.saving is not None:
            self.saving(self.step)
        return True

    def _check(self, bar: Progress) -> bool:
        """Score what would be kept, and tell the run; whether to go on."""
        train_loss = self.tally.mean
        alike(self.run.model.buffers())
        with self.run.view(uncounted(self.train)):
            with self.stepping.autocast():
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
            self.schedule.behind("checks", score)
        self._write()
        self.tally = Tally()
        bar.tell(self.history[-1])
        if not go_on:
            self._end(self.run.stopped, self.run.reason)
        return go_on

    def _write(self) -> None:
        """The row of a check that the run has heard."""
        left = [n for one, state in self.run.states(EarlyStopping) if (n := one.patience_left(state)) is not None]
        scores = [row["valid_loss"] for row in [*self.history, self._told]]
        row = self._told | {"penalty": self.run.penalty(), "best": min(filter(math.isfinite, scores), default=math.inf)}
        row |= {"lr": float(self.stepping.optimizer.param_groups[0]["lr"]), "patience_left": min(left, default=None)}
        self.history.append(row | {"seconds": self.tally.seconds})
        self.log.log(self.history[-1])

    def _complete(self) -> None:
        """Ctrl-C may come between the hearing of a check and its row: what is kept must be in the history."""
        step = self._told.get("step")
        kept = [int(state["best_step"]) for _, state in self.run.states(EarlyStopping)]
        if step in kept and all(row["step"] != step for row in self.history):
            self._write()

    def _asked(self, name: str) -> bool:
        """Whether a criterion asks for it."""
        return any(name in one.criterion.needs for one, _ in self.run.states(EarlyStopping))

    def _refuse_unknown(self, stderr: float | None) -> None:
        if stderr is None and self._asked("stderr"):
            raise GoodfitError(
                "The standard error of the validation loss is not known for one row, nor for one batch of a loss that does "
                "not tell its rows apart; give valid in more batches, or a criterion without stderrs."
            )

    def _end(self, stopped: str, reason: Reason | None) -> None:
        self.stopped, self.reason = stopped, reason
