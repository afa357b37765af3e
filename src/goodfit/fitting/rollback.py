"""A model that goes back to the best that was scored, in the middle of a training."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from goodfit.cocktail import Cocktail
from goodfit.errors import GoodfitError
from goodfit.regularizers.early_stopping import EarlyStopping
from goodfit.run import Run
from goodfit.tensors import load_tensors, tensors_of

__all__ = ["back_to_best", "refuse_rollback"]


def back_to_best(run: Run, optimizer: Optimizer) -> bool:
    """The best weights and buffers so far, with the moments of a fresh optimizer; whether there are any yet."""
    went = False
    for one, state in run.states(EarlyStopping):
        if one.keeps and int(state["best_check"]):
            load_tensors(run.model, *one.kept(*tensors_of(run.model), state))
            optimizer.state.clear()
            run.begin_watching()
            went = True
    return went


def refuse_rollback(policy: str, cocktail: Cocktail, keep: Any) -> None:
    """Refuse to go back where nothing is kept in memory to go back to."""
    if policy == "rollback" and (keep is not None or not any(one.keeps for one in cocktail.of(EarlyStopping))):
        raise GoodfitError(
            "nonfinite='rollback' goes back to the best weights, which an EarlyStopping that restores keeps in memory; put one "
            "into the cocktail, and leave keep out."
        )
