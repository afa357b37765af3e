"""What a fit is made ready with: where the model is, its optimizer, its loss, its targets, its schedules in steps."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, AdamW, Optimizer

from goodfit.cocktail import Cocktail
from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.fitting.loop import LossFunction, Prepare
from goodfit.hooks import lacking
from goodfit.phases import Batch, Gradient
from goodfit.regularizers.early_stopping import EarlyStopping
from goodfit.surgery.running import call_model, evaluating

__all__ = [
    "MakeOptimizer",
    "as_reals",
    "averaged",
    "home_of",
    "optimizer_for",
    "refuse_beside",
    "refuse_file",
    "refuse_maximizing",
    "refuse_numbers",
    "steps_of",
]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


def refuse_numbers(epochs: Any, check_every: Any, seed: Any) -> None:
    """Refuse counts and seeds that are none."""
    counts = {"epochs": epochs} if check_every is None else {"epochs": epochs, "check_every": check_every}
    for name, number in counts.items():
        if not _whole(number) or number < 1:
            raise GoodfitError(f"{name} must be an integer >= 1, got {name}={number!r}.")
    if not _whole(seed) or not 0 <= seed < 2**63:
        raise GoodfitError(f"seed must be an integer >= 0 and below 2**63, got seed={seed!r}.")


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def refuse_file(keep: Any) -> None:
    """Refuse a path that no file can have."""
    if not isinstance(keep, str | Path):
        return
    try:
        os.stat(keep)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as wrong:
        why = wrong.strerror if isinstance(wrong, OSError) else wrong
        raise GoodfitError(f"keep must be the path of a file, got {str(keep)!r:.80} ({why}); give another.") from None


def home_of(model: Any, device: torch.device | str | None) -> torch.device:
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


def steps_of(training: Any, accumulate: int) -> int | None:
    """How many steps an epoch has, None where its batches have no length, as those of an iterable dataset."""
    try:
        return math.ceil(len(training) / accumulate)
    except TypeError:
        return None


def refuse_maximizing(cocktail: Cocktail) -> None:
    """Refuse scores that would be higher for better: those of fit are losses."""
    for one in cocktail.of(EarlyStopping):
        if one.mode == "max":
            raise GoodfitError(f"fit scores by the validation loss, where lower is better, got {one}; leave mode out.")


def as_reals(cocktail: Cocktail, kind: str, model: nn.Module, x: Any, y: Tensor) -> Prepare | None:
    """What makes whole targets mixable for a Batch regularizer: reals, or probabilities over the classes of the model."""
    mixer = next((one for one in cocktail.of(Batch) if one.mixes), None)
    if y.is_floating_point() or mixer is None:
        return None
    if kind == "numbers":
        return lambda y: y.to(torch.get_default_dtype())
    with torch.no_grad(), evaluating(model):
        outputs = call_model(model, x)
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        raise GoodfitError(f"{type(mixer).__name__} on classes needs a model that returns scores (rows, classes).")
    name, classes = type(mixer).__name__, outputs.shape[1]

    def one_hot(y: Tensor) -> Tensor:
        y = y.squeeze(1) if y.ndim == 2 and y.shape[1] == 1 else y
        if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise GoodfitError(
                f"{name} makes probabilities of classes, which must lie in 0 to {classes - 1}, the scores of the model, got "
                f"{int(y.min())} to {int(y.max())}; leave such rows out, or {name}."
            )
        return nn.functional.one_hot(y.to(torch.int64), classes).movedim(-1, 1).to(outputs.dtype)

    return one_hot


def refuse_beside(cocktail: Cocktail, loss: Any, accumulate: int) -> None:
    """Refuse a second gradient of several batches; warn of class weights, which divide otherwise for probabilities."""
    twice = next((one for one in cocktail.of(Gradient) if one.twice), None)
    if twice is not None and accumulate > 1:
        raise GoodfitError(f"{twice} takes the gradient of one batch twice, got accumulate={accumulate}; leave it at 1.")
    mixer = next((one for one in cocktail.of(Batch) if one.mixes), None)
    weighted = getattr(loss, "weight", None) is not None or "weight" in getattr(loss, "keywords", {})
    if mixer is not None and weighted:
        warnings.warn(
            f"{type(mixer).__name__} makes probabilities of classes, for which torch divides a loss with class weights by the "
            "rows and not by the weights: training and validation losses are of two scales.",
            GoodfitWarning,
            stacklevel=5,
        )


def averaged(measure: LossFunction) -> LossFunction:
    """The loss function, refusing what is not one number."""

    def checked(outputs: Any, y: Tensor) -> Tensor:
        value = measure(outputs, y)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise GoodfitError(f"loss(outputs, y) must return a tensor of one number, the mean over the rows, got {shown}.")
        return value

    return checked
