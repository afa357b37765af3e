"""Fit: train a model with a cocktail until enough is enough, and give back the best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from goodfit.cocktail import Cocktail
from goodfit.data import batches_of, peek, to_device
from goodfit.errors import GoodfitError
from goodfit.hyper import hypers
from goodfit.losses import loss_of, task_of
from goodfit.phases import Batch, Regularizer
from goodfit.progress import Progress
from goodfit.regularizers.early_stopping import EarlyStopping
from goodfit.run import Run
from goodfit.schedules import Schedule
from goodfit.surgery.trace import call_model, evaluating

__all__ = ["Fit", "evaluate", "fit"]

LossFunction = Callable[[Any, Tensor], Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Fit:
    """What a training gave.

    model: the very model that went in, with the weights to keep. history: a dict per epoch. stopped: why it ended before
    the last epoch, "" where it did not. score: the validation loss of this model, measured after restoring. best_epoch:
    the epoch with the lowest validation loss.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    stopped: str
    score: float
    best_epoch: int


def fit(
    model: nn.Module,
    train: Any,
    valid: Any,
    cocktail: Cocktail | Regularizer,
    *,
    loss: LossFunction | None = None,
    task: str | None = None,
    optimizer: Optimizer | MakeOptimizer | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Fit:
    """Train `model` on `train` with a cocktail, validated on `valid` after every epoch.

    train, valid: a DataLoader or Dataset of (x, y), or a pair (x, y) of tensors or arrays (then batched by index in
    batches of `batch_size`, a last batch of one row joining the one before it). loss: f(outputs, y) → mean over the rows;
    without one the task's ("classes": cross-entropy, "numbers": squared error), without a task the one that y speaks of.
    optimizer: an optimizer, or a function from parameters to one; AdamW with lr 1e-3 and no decay of its own if not given.
    seed: of the order, the masks and torch's generator within the call, which leaves that generator as it was. device:
    where the model goes, else where it is. progress: None shows a bar on a terminal.

    Ctrl-C ends the training as a stop does. A loss that is not finite ends it too, and the best so far is kept.
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise GoodfitError(f"epochs must be an integer >= 1, got epochs={epochs!r}.")
    training = batches_of(train, "train", batch_size, shuffle=True, seed=seed)
    validation = batches_of(valid, "valid", batch_size, shuffle=False, seed=seed)
    home = torch.device(device) if device is not None else next((p.device for p in model.parameters()), torch.device("cpu"))
    model.to(home)
    with torch.random.fork_rng(devices=[home] if home.type == "cuda" else []):
        torch.manual_seed(seed)
        x, y = to_device(peek(training), home)
        measure = loss or loss_of(task or task_of(y))
        mix = _in_steps(Cocktail(cocktail) if isinstance(cocktail, Regularizer) else cocktail, training)
        _refuse_maximizing(mix)
        run = Run(mix, model, loss=measure, example=x, seed=seed)
        classes = _classes(model, x, y) if any(isinstance(one, Batch) and not one.off for one in mix) else None
        chosen = _optimizer(optimizer, model)
        run.attach(chosen)
        if not model.training:
            model.train()
        with Progress(epochs, "fit", progress) as bar:
            history, why = _epochs(run, chosen, training, validation, measure, classes, epochs, bar)
        run.finish()
        score = evaluate(model, validation, measure)
    if not math.isfinite(score):
        raise GoodfitError(
            f"The validation loss must be finite, got {score} ({why or 'at the last epoch'}); lower the learning rate."
        )
    best = min(history, key=lambda row: row["valid_loss"] if math.isfinite(row["valid_loss"]) else math.inf)
    return Fit(model, history, why, score, best["epoch"])


def _epochs(
    run: Run,
    optimizer: Optimizer,
    training: Any,
    validation: Any,
    measure: LossFunction,
    classes: int | None,
    epochs: int,
    bar: Progress,
) -> tuple[list[dict[str, Any]], str]:
    history: list[dict[str, Any]] = []
    best = math.inf
    try:
        for epoch in range(1, epochs + 1):
            started = time.perf_counter()
            train_loss = _train(run, optimizer, training, classes)
            score = evaluate(run.model, validation, measure)
            go_on = run.epoch(score, train_loss=train_loss)
            best = min(best, score) if math.isfinite(score) else best
            left = [one.patience_left(state) for one, state in run.states(EarlyStopping)]
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


def _train(run: Run, optimizer: Optimizer, training: Any, classes: int | None) -> float:
    """One epoch; the mean loss over its rows, as it was during the epoch."""
    home = next(run.model.parameters()).device
    total, rows = torch.zeros((), dtype=torch.float64, device=home), 0
    for batch in training:
        x, y = to_device(batch, home)
        if classes is not None and not y.is_floating_point():
            y = nn.functional.one_hot(y, classes).to(torch.get_default_dtype())
        optimizer.zero_grad()
        x, y = run.batch(x, y)
        loss = run.loss(x, y)
        torch.autograd.backward(loss)
        optimizer.step()
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
    return float(total / rows)


def _optimizer(given: Optimizer | MakeOptimizer | None, model: nn.Module) -> Optimizer:
    if isinstance(given, Optimizer):
        return given
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise GoodfitError(f"{type(model).__name__} has no trainable parameter; unfreeze some.")
    return given(parameters) if given is not None else AdamW(parameters, lr=1e-3, weight_decay=0.0)


def _in_steps(cocktail: Cocktail, training: Any) -> Cocktail:
    """The cocktail with all schedules in steps: a fit knows how many an epoch has."""
    steps = len(training) if hasattr(training, "__len__") else None

    def resolved(one: Regularizer) -> Regularizer:
        moving = {name: getattr(one, name) for name, _ in hypers(one) if isinstance(getattr(one, name), Schedule)}
        return replace(one, **{name: schedule.in_steps(steps) for name, schedule in moving.items()})

    return Cocktail(*(resolved(one) if one.scheduled else one for one in cocktail))


def _refuse_maximizing(cocktail: Cocktail) -> None:
    for one in cocktail.of(EarlyStopping):
        if one.mode == "max":
            raise GoodfitError(f"fit scores by the validation loss, where lower is better, got {one}; leave mode out.")


def _classes(model: nn.Module, x: Any, y: Tensor) -> int | None:
    """How many classes the model tells apart, for targets that a Batch regularizer must mix."""
    if y.is_floating_point():
        return None
    with torch.no_grad(), evaluating(model):
        return int(call_model(model, x).shape[1])
