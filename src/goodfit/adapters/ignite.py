"""Ignite: a handler that regularizes a trainer's steps, hears an evaluator, and ends the training with the best weights.

regularization = Regularization("L2(1e-4), Dropout(0.3), EarlyStopping(5)", model, monitor="loss", example=x)
optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)      # made after it
regularization.attach(trainer, evaluator, optimizer)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from goodfit.adapters.host import beside_training, imported, monitored, refuse_sharded
from goodfit.cocktail import Cocktail
from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.phases import Epoch, Regularizer
from goodfit.run import Run

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["Regularization"]

_ignite = imported("ignite", "ignite")
_Events = _ignite.engine.Events


class Regularization:
    """One cocktail on the model of an Ignite trainer.

    monitor: the metric of the evaluator that is the score, or a function of the evaluator that gives it; it is lower that is
    better unless EarlyStopping says mode="max". The rest is for `gf.Run`, which is at `run`. It has `state_dict` and
    `load_state_dict`, for `Checkpoint(to_save={..., "goodfit": regularization})`.
    """

    def __init__(
        self,
        cocktail: Cocktail | Regularizer | str,
        model: nn.Module,
        *,
        monitor: str | Callable[[Engine], float | Tensor] = "loss",
        example: Any = None,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        task: str | None = None,
        seed: int = 0,
    ) -> None:
        refuse_sharded(model)
        self.run = Run(cocktail, model, example=example, loss=loss, task=task, seed=seed)
        self.monitor = monitor
        self.trainer: Engine = _ignite.engine.Engine(lambda engine, batch: None)
        self._heard: tuple[int, Any] = (-1, None)
        self._view = ExitStack()
        self._saved, self._resumed = -1, False

    @property
    def stopped(self) -> str:
        """Why the training was stopped, "" where it was not."""
        return self.run.stopped

    def attach(self, trainer: Engine, evaluator: Engine | None, *optimizers: Optimizer) -> Regularization:
        """Act in the steps of `optimizers`, hear each end of `evaluator` within `trainer`, and stop the latter."""
        hears = next(self.run.cocktail.of(Epoch), None)
        if hears is not None and evaluator is None:
            raise GoodfitError(f"{hears} needs the evaluator that validates, got None.")
        self.run.attach(*optimizers)
        self.trainer = trainer
        if evaluator is not None:
            evaluator.add_event_handler(_Events.STARTED, self._enter)
            evaluator.add_event_handler(_Events.COMPLETED, self._hear if hears is not None else self._leave)
        trainer.add_event_handler(_Events.STARTED, self._start)
        trainer.add_event_handler(_Events.ITERATION_STARTED, self._leave)  # whatever ended the evaluator
        for event in (_Events.TERMINATE, _Events.COMPLETED, _Events.EXCEPTION_RAISED):
            trainer.add_event_handler(event, self._end)
        return self

    def _start(self, trainer: Engine) -> None:
        """A training that was stopped is asked anew where it is run again, and not where it comes from a checkpoint."""
        if not self._resumed:
            self.run.go_on()
        elif self.stopped:
            trainer.terminate()
        self._resumed, self._heard = False, (-1, None)

    def _enter(self, evaluator: Engine) -> None:
        if self._training():
            self._view.enter_context(self.run.view(beside_training(self.trainer.state.dataloader)))

    def _leave(self, engine: Engine) -> None:
        self._view.close()

    def _training(self) -> bool:
        ended = (None, _Events.COMPLETED, _Events.TERMINATE, _Events.EXCEPTION_RAISED)
        return self.trainer.last_event_name not in ended

    def _hear(self, evaluator: Engine) -> None:
        with self._view:
            self._check(evaluator)

    def _check(self, evaluator: Engine) -> None:
        """One check; data that is evaluated when no training is on, or again for the same weights, is none."""
        now, data = self.trainer.state.iteration, evaluator.state.dataloader
        if not self._training():
            return
        if now == self._heard[0]:
            if data is not self._heard[1]:
                raise GoodfitError(
                    f"The evaluator ran on two sets of data at iteration {now}, and one score decides; attach goodfit to an "
                    "evaluator that sees the validation data alone."
                )
            return
        if now == self._saved:
            warnings.warn(
                f"The checkpoint of iteration {now} was saved before the validation, so what resumes from it has heard one "
                "check less; save behind the validation.",
                GoodfitWarning,
                stacklevel=2,
            )
        self._heard = (now, data)
        if not self.run.epoch(self._score(evaluator)):
            self.trainer.terminate()

    def _score(self, evaluator: Engine) -> float | Tensor:
        if callable(self.monitor):
            return self.monitor(evaluator)
        return monitored(evaluator.state.metrics, self.monitor, "the evaluator")

    def _end(self, trainer: Engine, *errors: BaseException) -> None:
        """Give back the best, whatever ended the training; what ended it early may have come before there was one."""
        self._view.close()
        try:
            self.run.finish(trainer.state.dataloader)
        except GoodfitError:
            if not (errors or trainer.should_terminate):
                raise
        if errors and len(trainer._event_handlers[_Events.EXCEPTION_RAISED]) == 1:
            raise errors[0]  # Ignite takes an error that has a handler for handled

    def state_dict(self) -> dict[str, Tensor]:
        """All that the run must remember, for Ignite's `Checkpoint`."""
        self._saved = self.trainer.state.iteration
        return self.run.state_dict()

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken; the numbers of the cocktail are those of now."""
        self.run.load_state_dict(saved)
        self._resumed = True
