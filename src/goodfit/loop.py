"""The reference loop on data: epochs of training, each followed by a validation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from goodfit.data import to_device
from goodfit.errors import GoodfitError
from goodfit.progress import Progress
from goodfit.regularizers.early_stopping import EarlyStopping
from goodfit.run import Run
from goodfit.surgery.running import call_model, evaluating

__all__ = ["LossFunction", "Prepare", "evaluate", "train_epoch", "train_epochs"]

LossFunction = Callable[[Any, Tensor], Tensor]
Prepare = Callable[[Tensor], Tensor]


def train_epochs(
    run: Run,
    optimizer: Optimizer,
    training: Any,
    validation: Any,
    measure: LossFunction,
    prepare: Prepare | None,
    epochs: int,
    bar: Progress,
) -> tuple[list[dict[str, Any]], str]:
    """Train until the run does not want to go on: the history, a dict per epoch, and why it ended before the last one."""
    history: list[dict[str, Any]] = []
    best = math.inf
    try:
        for epoch in range(1, epochs + 1):
            started = time.perf_counter()
            train_loss = train_epoch(run, optimizer, training, prepare)
            score = evaluate(run.model, validation, measure)
            go_on = run.epoch(score, train_loss=train_loss)
            best = min(best, score) if math.isfinite(score) else best
            left = [n for one, state in run.states(EarlyStopping) if (n := one.patience_left(state)) is not None]
            row = {"epoch": epoch, "train_loss": train_loss, "valid_loss": score, "penalty": run.penalty(), "best": best}
            history.append(row | {"patience_left": min(left, default=None), "seconds": time.perf_counter() - started})
            bar.tell(history[-1])
            if not go_on:
                return history, run.stopped
            if not math.isfinite(train_loss):
                return history, f"the training loss became {train_loss} in epoch {epoch}"
    except KeyboardInterrupt:
        if not history:
            raise
        return history, f"interrupted in epoch {len(history) + 1}"
    return history, ""


def train_epoch(run: Run, optimizer: Optimizer, training: Any, prepare: Prepare | None) -> float:
    """One epoch; the mean loss over its rows, as it was during the epoch."""
    home = next(run.model.parameters()).device
    total, rows = torch.zeros((), dtype=torch.float64, device=home), 0
    for batch in training:
        x, y = to_device(batch, home)
        if prepare is not None:
            y = prepare(y)
        optimizer.zero_grad()
        x, y = run.batch(x, y)
        loss = run.loss(x, y)
        torch.autograd.backward(loss)
        run.gradient(optimizer)
        optimizer.step()
        run.step(optimizer)
        total += loss.detach() * len(y)
        rows += len(y)
    return float(total / rows)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Any, measure: LossFunction) -> float:
    """The mean of `measure` over the rows, in eval mode; every submodule gets its own mode back."""
    home = next(model.parameters()).device
    total, rows = torch.zeros((), dtype=torch.float64, device=home), 0
    with evaluating(model):
        for batch in batches:
            x, y = to_device(batch, home)
            total += measure(call_model(model, x), y).double() * len(y)
            rows += len(y)
    if not rows:
        raise GoodfitError("valid has no rows; give at least one batch.")
    return float(total / rows)
