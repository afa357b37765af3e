"""Fit: train a model with a cocktail until enough is enough, and give back the best."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from goodfit.checkpoints.checkpoints import Checkpoints
from goodfit.cocktail import Cocktail, as_cocktail
from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.fitting.compute import Compute, as_compute
from goodfit.fitting.data import batches_of
from goodfit.fitting.guard import refuse_policy
from goodfit.fitting.learning_rates import MakeScheduler, refuse_scheduler
from goodfit.fitting.loop import LossFunction
from goodfit.fitting.preparation import MakeOptimizer, home_of, refuse_file, refuse_numbers
from goodfit.fitting.recipe import Recipe
from goodfit.fitting.refitting import beginning, joined_data, refuse_refit, steps_for, train_for, without_stopping
from goodfit.fitting.rescored import otherwise
from goodfit.fitting.resuming import as_checkpoints, of_refit, resume
from goodfit.fitting.training import Training
from goodfit.logs import Logger
from goodfit.phases import Regularizer
from goodfit.processes import alike, rank, refuse_apart, together, world
from goodfit.progress import Progress
from goodfit.schedules.schedule import Schedule
from goodfit.stop.criterion import Reason
from goodfit.surgery.running import training as training_mode
from goodfit.tensors import put

__all__ = ["Fit", "fit"]


@dataclass(frozen=True)
class Fit:
    """What a training gave.

    model: the very model that went in, with the weights to keep. history: a dict per check. stopped: why it ended before
    the last epoch, "" where it did not. score: the validation loss of this model, measured after restoring; in the `result`
    of an error that of its check, nan without one. best_epoch: the epoch with the lowest validation loss. kept: the row of
    the check whose weights these are, None where no check has seen them. reason: why it ended, in one word, None at the last
    epoch. refit: how the model was trained anew on train and valid, "" where it was not; validated: the model before that,
    which score, kept and best_epoch are of. resumed: the step from which a saved training went on, 0 where it began.
    """

    model: nn.Module = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    stopped: str
    score: float
    best_epoch: int
    kept: dict[str, Any] | None = field(default=None, repr=False)
    reason: Reason | None = None
    refit: str = ""
    validated: nn.Module | None = field(default=None, repr=False)
    resumed: int = 0


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
    check_every: int | None = None,
    keep: str | Path | None = None,
    refit: str | None = None,
    scheduler: LRScheduler | MakeScheduler | Schedule | None = None,
    scheduler_unit: str = "epochs",
    checkpoints: str | Path | Checkpoints | None = None,
    compute: Compute | None = None,
    nonfinite: str = "stop",
    logs: Logger | Sequence[Logger] | None = None,
) -> Fit:
    """Train `model` on `train` with a cocktail, validated on `valid` after every epoch.

    train, valid: a DataLoader or Dataset of (x, y), a `gf.Parquet`, or a pair (x, y) of tensors or arrays (batched by index, in
    batches of `batch_size`, a last batch of one row joining the one before it). loss: f(outputs, y) → mean over the rows;
    without one the task's ("classes": cross-entropy, "numbers": squared error), without a task the one that y speaks of.
    optimizer: an optimizer, or a function from parameters to one; AdamW with lr 1e-3 and no decay of its own if not given.
    seed: of the order, the masks and torch's generator within the call, which leaves that generator as it was. device:
    where the model goes, else where it is. progress: None shows a bar on a terminal. check_every: so many optimizer steps
    from one validation to the next, and one behind the last, in place of an epoch. keep: a file for the best weights, in
    place of memory. refit: "steps" or "epochs": train the model anew on train and valid, for as many as the weights took that
    are kept. scheduler: of the learning rate, of gf.schedules or a function from the optimizer to one of torch, which steps
    behind each of its scheduler_unit, "epochs" or "steps"; ReduceLROnPlateau at each check. checkpoints: a folder in which the
    training is saved, or `gf.Checkpoints(folder, ...)`; what is saved there already goes on, to the same bits. compute:
    `gf.Compute`, the precision, batches in a step, and the like. nonfinite: what a step does whose loss, gradients or batch
    statistics are not finite: it is not taken, its first such number is named, and it ends the training ("stop", as a stop
    behind the first check, or "raise"), or is left out ("skip"), or the model goes back to the best so far ("rollback").
    logs: of `gf.logs`, or any with a method log(row): they get the row of each check.

    Ctrl-C ends the training behind its step as a stop does, without a refit; a second one at once. Any other error passes
    through, behind the first check with what there is so far in its `result`. However it ends, an EarlyStopping that restores
    puts the best so far into the model; without one, the weights of the last step stay.
    """
    refuse_numbers(epochs, check_every, seed)
    refuse_file(keep)
    refuse_refit(refit)
    refuse_policy(nonfinite)
    refuse_scheduler(scheduler, scheduler_unit, refit)
    refuse_apart()
    saves = as_checkpoints(checkpoints, keep)
    training = batches_of(train, "train", batch_size, shuffle=True, seed=seed)
    validation = batches_of(valid, "valid", batch_size, shuffle=False, seed=seed)
    both = None if refit is None else joined_data(training, validation, batch_size, seed)
    mix, home = as_cocktail(cocktail), home_of(model, device)
    alike([*model.parameters(), *model.buffers()])
    recipe = Recipe(
        cocktail=mix,
        loss=loss,
        task=task,
        optimizer=optimizer,
        scheduler=scheduler,
        scheduler_unit=scheduler_unit,
        seed=seed,
        home=home,
        compute=as_compute(compute),
        nonfinite=nonfinite,
        check_every=check_every,
        keep=keep,
        checkpoints=saves,
        progress=progress if rank() == 0 else False,
        logs=logs,
    )
    start, own = (None, None) if refit is None else beginning(model, optimizer)
    # Ctrl-C within torch.no_grad() may leave gradients off.
    apart = torch.random.fork_rng(devices=[home] if home.type == "cuda" else [])
    with together(), torch.enable_grad(), apart, recipe.compute.held():
        work = recipe.begin(model, training, validation)
        found = _train(recipe, work, epochs, start)
        if start is None or refit is None or work.reason is Reason.INTERRUPTED:
            return found
        try:
            return _again(replace(recipe, optimizer=own), found, work, start, both, refit)
        except BaseException as wrong:
            _hang(found, wrong, "the model is the validated one, as before the refit")
            raise


def _train(recipe: Recipe, work: Training, epochs: int, start: nn.Module | None) -> Fit:
    """Train, put the weights to keep back, and score them."""
    recipe.refuse_different(work, epochs)
    resumed = 0 if recipe.checkpoints is None else resume(work, recipe.checkpoints, start)
    try:
        with training_mode(work.run.model), Progress(epochs, "fit", recipe.progress) as bar, recipe.interrupts(bar) as asked:
            work.go(epochs, bar, asked)
        return replace(_finished(work), resumed=resumed)
    except BaseException as wrong:
        _hand_over(work, wrong)
        raise


def _again(recipe: Recipe, found: Fit, work: Training, start: nn.Module, both: Any, how: str) -> Fit:
    """The same training from the same start, on all rows, for the number that validation has found."""
    saves = of_refit(recipe.checkpoints)
    recipe = replace(recipe, cocktail=without_stopping(recipe.cocktail), keep=None, checkpoints=saves)
    anew = recipe.begin(start, both, work.valid, work.train if how == "steps" else None)
    enough = work.step if found.kept is None else found.kept["step"]
    steps, told = steps_for(how, enough, work.train, anew.train)
    if saves is not None:
        resume(anew, saves, None)
    with training_mode(start), Progress(steps, "refit", recipe.progress) as bar, recipe.interrupts(bar) as asked:
        failed = train_for(anew, steps, bar, asked)
    if failed:
        warnings.warn(f"The refit {failed}: the model is the validated one.", GoodfitWarning, stacklevel=3)
        return found
    alike(start.buffers())
    anew.finish()
    _swap(found.model, start)
    return replace(found, refit=told, validated=start)


def _finished(work: Training) -> Fit:
    """The weights to keep put back, and scored."""
    alike(work.run.model.buffers())
    work.finish()
    kept = work.kept()
    try:
        score = work.score()
    except KeyboardInterrupt:
        if kept is None:
            raise
        work.interrupt("interrupted when its model was scored once more")
        score = float(kept["valid_loss"])
    if not math.isfinite(score):
        raise GoodfitError(
            f"The validation loss must be finite, got {score} ({work.stopped or 'at the last epoch'}); lower the learning "
            "rate, or look for nan in the data."
        )
    odd = "" if kept is None else otherwise(work.run.model, score, kept)
    if odd:
        warnings.warn(odd, GoodfitWarning, stacklevel=3)
    return _fit_of(work, score, kept)


def _fit_of(work: Training, score: float, kept: dict[str, Any] | None) -> Fit:
    best = min(work.history, key=lambda row: row["valid_loss"] if math.isfinite(row["valid_loss"]) else math.inf)
    return Fit(work.run.model, work.history, work.stopped, score, best["epoch"], kept, work.reason)


def _swap(one: nn.Module, other: nn.Module) -> None:
    """Two models of one build exchange all numbers: whoever holds the one has those of the other."""
    mine, theirs = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (one, other))
    for name, tensor in mine.items():
        before = tensor.detach().clone()
        put(tensor, theirs[name].detach())
        put(theirs[name], before)


def _hand_over(work: Training, wrong: BaseException) -> None:
    """Put the best back, and hang what there is so far on what ended the training."""
    if not work.history:
        return
    if not work.put_back and (world() == 1 or not work.averages()):  # in which all processes would have to join
        with suppress(Exception, KeyboardInterrupt):  # what ended the training is what is told
            work.finish()
    kept = work.kept()  # nothing is scored anew: what failed would fail again
    weights = "its best weights so far" if work.restored() is not None else "the weights of its last step, maybe not its best"
    found = _fit_of(work, math.nan if kept is None else float(kept["valid_loss"]), kept)
    _hang(found, wrong, f"the model has {weights} ({len(work.history)} checks)")


def _hang(found: Fit, wrong: BaseException, model: str) -> None:
    """What there is, on what passes through."""
    with suppress(Exception):  # an exception may refuse attributes
        wrong.result = found  # type: ignore[attr-defined]
        wrong.add_note(f"gf.fit: {model}; what there is of the training is in the `result` of this exception.")
