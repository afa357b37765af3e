"""Fit: train a model with a cocktail until enough is enough, and give back the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, AdamW, Optimizer

from goodfit.batchnorms.present import by_batch
from goodfit.cocktail import Cocktail, as_cocktail
from goodfit.data import batches_of, peek, to_device
from goodfit.errors import GoodfitError
from goodfit.hooks import lacking
from goodfit.hyper import hypers
from goodfit.loop import LossFunction, Prepare, evaluate, train_epochs
from goodfit.losses import loss_of, task_of
from goodfit.phases import Batch, Regularizer
from goodfit.progress import Progress
from goodfit.regularizers.batchnorm import BatchNorm
from goodfit.regularizers.early_stopping import EarlyStopping
from goodfit.run import Run
from goodfit.schedules import Schedule
from goodfit.small_batches import merged_for_norms, refuse_single_values
from goodfit.surgery.running import call_model, evaluating, training as training_mode

__all__ = ["Fit", "MakeOptimizer", "as_reals", "averaged", "fit", "optimizer_for"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Fit:
    """What a training gave.

    model: the very model that went in, with the weights to keep. history: a dict per epoch. stopped: why it ended before
    the last epoch, "" where it did not. score: the validation loss of this model, measured after restoring. best_epoch:
    the epoch with the lowest validation loss.
    """

    model: nn.Module = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    stopped: str
    score: float
    best_epoch: int


def fit(
    model: nn.Module,
    train: Any,
    valid: Any,
    cocktail: Cocktail | Regularizer | str,
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
    home = _home(model, device)
    with torch.random.fork_rng(devices=[home] if home.type == "cuda" else []):
        torch.manual_seed(seed)
        x, y = to_device(peek(training), home)
        kind = task if task is not None else "" if loss is not None else task_of(y)
        measure = averaged(loss or loss_of(kind))
        mix = as_cocktail(cocktail)
        with training_mode(model):
            if by_batch(model) or any(mix.of(BatchNorm)):
                training = merged_for_norms(training, "train")
        mix = _in_steps(mix, training)
        _refuse_maximizing(mix)
        run = Run(mix, model, loss=measure, example=x, seed=seed)
        prepare = as_reals(mix, kind, model, x, y)
        chosen = optimizer_for(optimizer, model)
        with training_mode(model), Progress(epochs, "fit", progress) as bar:
            if len(y) == 1:
                refuse_single_values(model, x)
            history, why = train_epochs(run, chosen, training, validation, measure, prepare, epochs, bar)
        run.finish(training)
        score = evaluate(model, validation, measure)
    if not math.isfinite(score):
        raise GoodfitError(
            f"The validation loss must be finite, got {score} ({why or 'at the last epoch'}); lower the learning rate, "
            "or look for nan in the data."
        )
    best = min(history, key=lambda row: row["valid_loss"] if math.isfinite(row["valid_loss"]) else math.inf)
    return Fit(model, history, why, score, best["epoch"])


def _home(model: Any, device: torch.device | str | None) -> torch.device:
    """Where the model trains; it goes there."""
    if not isinstance(model, nn.Module):
        raise GoodfitError(f"fit takes a torch.nn.Module first, got {model!r:.60}; give an instance.")
    try:
        home = next((p.device for p in model.parameters()), torch.device("cpu")) if device is None else torch.device(device)
        model.to(home)
    except (RuntimeError, AssertionError) as wrong:
        why = (str(wrong).splitlines() or [""])[0]
        raise GoodfitError(f"device must be one that torch has here, got {device!r} ({why}); leave it out.") from None
    return home


def optimizer_for(given: Optimizer | MakeOptimizer | None, model: nn.Module) -> Optimizer:
    """The optimizer that was given, made or meant; refuses one that cannot train the whole model."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise GoodfitError(f"{type(model).__name__} has no trainable parameter; unfreeze some.")
    if given is None:
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
        return AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=fused)
    made = given if isinstance(given, Optimizer) else given(parameters) if callable(given) else given
    if not isinstance(made, Optimizer) or isinstance(made, LBFGS):
        raise GoodfitError(
            f"optimizer must be one that steps without a closure, or a function from parameters to one, got {made!r}."
        )
    name = lacking(model, [made])
    if name is not None:
        raise GoodfitError(
            f"The optimizer lacks the trainable parameter {name}; give fit a function that makes it from the parameters, "
            "as in optimizer=lambda parameters: SGD(parameters, lr=0.1), or freeze the parameter."
        )
    return made


def _in_steps(cocktail: Cocktail, training: Any) -> Cocktail:
    """The cocktail with all schedules in steps: a fit knows how many an epoch has."""
    try:
        steps = len(training)
    except TypeError:  # an iterable dataset has no length
        steps = None

    def resolved(one: Regularizer) -> Regularizer:
        moving = {name: getattr(one, name) for name, _ in hypers(one) if isinstance(getattr(one, name), Schedule)}
        return replace(one, **{name: schedule.in_steps(steps) for name, schedule in moving.items()})

    return Cocktail(*(resolved(one) if one.scheduled else one for one in cocktail))


def _refuse_maximizing(cocktail: Cocktail) -> None:
    for one in cocktail.of(EarlyStopping):
        if one.mode == "max":
            raise GoodfitError(f"fit scores by the validation loss, where lower is better, got {one}; leave mode out.")


def as_reals(cocktail: Cocktail, kind: str, model: nn.Module, x: Any, y: Tensor) -> Prepare | None:
    """What makes whole targets mixable for a Batch regularizer: reals, or probabilities over the classes of the model."""
    if y.is_floating_point() or not any(cocktail.of(Batch)):
        return None
    if kind == "numbers":
        return lambda y: y.to(torch.get_default_dtype())
    with torch.no_grad(), evaluating(model):
        outputs = call_model(model, x)
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        raise GoodfitError("A cocktail that mixes class targets needs a model that returns scores (rows, classes).")

    def one_hot(y: Tensor) -> Tensor:
        y = y.squeeze(1) if y.ndim == 2 and y.shape[1] == 1 else y
        return nn.functional.one_hot(y.to(torch.int64), outputs.shape[1]).movedim(-1, 1).to(outputs.dtype)

    return one_hot


def averaged(measure: LossFunction) -> LossFunction:
    """The loss function, refusing what is not one number."""

    def checked(outputs: Any, y: Tensor) -> Tensor:
        value = measure(outputs, y)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise GoodfitError(f"loss(outputs, y) must return a tensor of one number, the mean over the rows, got {shown}.")
        return value

    return checked
