"""Networks: dense first, then upward in λ with warm starts, until training reaches all zero.

With all kernels zero every gradient but the last layer's is zero, so a start from above would stay dead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from goodfit.batchnorms.present import by_batch
from goodfit.errors import GoodfitError
from goodfit.fitting.loop import evaluate
from goodfit.fitting.preparation import as_reals, optimizer_for
from goodfit.fitting.small_batches import merged_for_norms
from goodfit.fitting.stepping import Stepping
from goodfit.paths.problem import Problem, tensors
from goodfit.regularizers.early_stopping import EarlyStopping
from goodfit.run import Run
from goodfit.surgery.running import training as training_mode

__all__ = ["Ascent"]

Weights = dict[str, Tensor]
LONGER = 20  # times the epochs, at most, behind the expected end
NEGLIGIBLE = 1e-2  # the share of the dense validation loss that the penalty has at the first λ


class Ascent:
    """The reference loop from the dense model upward; `held` are rows that say when enough is enough at each λ."""

    def __init__(self, problem: Problem, batches: Any, held: Any) -> None:
        self.problem, self.batches, self.held = problem, batches, held
        self.dense = self._dense()

    def range(self) -> tuple[float, float]:
        """A λ whose penalty is nothing beside the loss, and a guess of the λ at which all is zero."""
        run = self.problem.run(self.problem.known.high)
        run.model.load_state_dict(self.dense)
        loss = abs(evaluate(run.model, self.held, self.problem.measure))
        size = (run.penalty() - self._alone()) / self.problem.known.high
        with torch.no_grad():
            for name in self.problem.penalised(run.model):
                run.model.get_parameter(name).zero_()
        null = abs(evaluate(run.model, self.held, self.problem.measure))
        scale = max(loss, null * NEGLIGIBLE) or 1.0
        if not math.isfinite(size) or size <= 0:
            raise GoodfitError(f"{self.problem.over} weighs nothing on the dense model, so no λ follows from it; give lams=.")
        low = NEGLIGIBLE * scale / size
        return low, max(300 * null / size, 100 * low)

    def upward(self, lams: Iterable[float], count: int) -> Iterator[tuple[float, Weights]]:
        """The state at each λ, each trained from the one before; what is all zero stays so.

        Behind the first `count` a stage goes on for as long as its objective falls: an optimizer of bounded steps, such as
        Adam, gets to zero by their number, not by a larger λ.
        """
        state, dead = self.dense, False
        for turn, lam in enumerate(lams, 1):
            if not dead:
                epochs = self.problem.epochs
                run = self.problem.run(lam, EarlyStopping(epochs + 1), turn=turn)
                run.model.load_state_dict(state)
                self._train(run, epochs if turn <= count else LONGER * epochs, penalised=True)
                state = tensors(run.model)
                names = self.problem.penalised(run.model)
                dead = self.problem.selects and not any(state[n].any() for n in names)
            yield lam, state

    def _alone(self) -> float:
        """What the cocktail alone adds to the objective of the dense model."""
        run = self.problem.run(None)
        run.model.load_state_dict(self.dense)
        return run.penalty()

    def _dense(self) -> Weights:
        """The state without the regularizer, at its best on the held rows."""
        stopping = self.problem.stopping
        run = self.problem.run(None, stopping)
        self._train(run, max(10 * self.problem.epochs, 100), penalised=False)
        score = evaluate(run.model, self.held, self.problem.measure)
        if not math.isfinite(score):
            raise GoodfitError(
                f"The dense model must reach a finite validation loss, got {score}; lower the learning rate, or look for nan."
            )
        return tensors(run.model)

    def _train(self, run: Run, epochs: int, penalised: bool) -> None:
        """Kept is what has the lowest objective on the held rows, the start among it."""
        problem = self.problem
        optimizer = optimizer_for(problem.optimizer, run.model)
        prepare = as_reals(run.cocktail, problem.kind, run.model, problem.example, problem.targets)
        with training_mode(run.model):
            batches = merged_for_norms(self.batches, "train") if by_batch(run.model) else self.batches
            run.epoch(self._objective(run, penalised))
            stepping = Stepping(run, optimizer, prepare)
            for _ in range(epochs):
                stepping.epoch(batches)
                if not run.epoch(self._objective(run, penalised)):
                    break
        run.finish(self.batches)

    def _objective(self, run: Run, penalised: bool) -> float:
        score = evaluate(run.model, self.held, self.problem.measure)
        return score + (run.penalty() if penalised else 0.0)
