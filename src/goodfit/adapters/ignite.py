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

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from goodfit.adapters.host import beside_training, imported, monitored, refuse_second, refuse_sharded
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
        if not isinstance(model, nn.Module):
            raise GoodfitError(
                f"Regularization takes a cocktail and a torch.nn.Module, in this order, got a {type(model).__name__}."
            )
        refuse_sharded(model)
        self.run = Run(cocktail, model, example=example, loss=loss, task=task, seed=seed)
        self.monitor, self.seed = monitor, seed
        self.trainer: Engine = _ignite.engine.Engine(lambda engine, batch: None)
        self._heard: tuple[int, Any] = (-1, None)
        self._view = ExitStack()
        self._saved, self._told, self._resumed = -1, False, False

    @property
    def stopped(self) -> str:
        """Why the training was stopped, "" where it was not."""
        return self.run.stopped

    def attach(self, trainer: Engine, evaluator: Engine | None, *optimizers: Optimizer) -> Regularization:
        """Act in the steps of `optimizers`, hear each end of `evaluator` within `trainer`, and stop the latter."""
        if self.run.attached or not optimizers:
            got = "it is attached already" if self.run.attached else "it got none"
            raise GoodfitError(
                f"A Regularization is attached once, with all optimizers that step; {got}; attach(trainer, evaluator, a, b)."
            )
        hears = next(self.run.cocktail.of(Epoch), None)
        if hears is not None and evaluator is None:
            raise GoodfitError(f"{hears} needs the evaluator that validates, got None.")
        self._join([one for one in _attached(trainer) if one.run.model is self.run.model])
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

    def _join(self, beside: list[Regularization]) -> None:
        if not beside:
            return
        refuse_second(beside[0].run.cocktail, self.run.cocktail)
        if self.seed != beside[0].seed:
            raise GoodfitError(
                f"A second Regularization has the seed of the first, by which inserted layers draw: seed={beside[0].seed}, got "
                f"seed={self.seed}."
            )

    def _start(self, trainer: Engine) -> None:
        """A training that was stopped is asked anew where it is run again, and not where it comes from a checkpoint."""
        if not self._resumed:
            self.run.go_on()
            self._heard = (-1, None)
        elif self.stopped:
            trainer.terminate()
        self._resumed = False

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
            if self._heard[1] is not None and data is not self._heard[1]:
                raise GoodfitError(
                    f"The evaluator ran on two sets of data at iteration {now}, and one score decides; attach goodfit to an "
                    "evaluator that sees the validation data alone."
                )
            return
        if now == self._saved and not self._told:
            self._told = True
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
        """Give back the best where the training ends; what ended it early may have come before there was one."""
        self._view.close()
        if not errors or trainer._dataloader_iter is None:  # else a handler of the user's may let the training go on
            try:
                self.run.finish(trainer.state.dataloader)
            except GoodfitError:
                if not (errors or trainer.should_terminate):
                    raise
        attached = _attached(trainer)
        if errors and len(attached) == len(trainer._event_handlers[_Events.EXCEPTION_RAISED]) and self is attached[-1]:
            raise errors[0]  # Ignite takes an error that has a handler for handled

    def state_dict(self) -> dict[str, Tensor]:
        """All that the run must remember, for Ignite's `Checkpoint`."""
        self._saved = self.trainer.state.iteration
        return {**self.run.state_dict(), "iteration": torch.tensor(self._heard[0])}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken; the numbers of the cocktail are those of now."""
        self.run.load_state_dict({name: t for name, t in saved.items() if name != "iteration"})
        self._heard, self._resumed = (int(saved["iteration"]), None), True


def _attached(trainer: Engine) -> list[Regularization]:
    """The regularizations of a trainer, in the order in which they hear its errors."""
    owners = [getattr(handler, "__self__", None) for handler, *_ in trainer._event_handlers.get(_Events.EXCEPTION_RAISED, [])]
    return [one for one in owners if isinstance(one, Regularization)]
