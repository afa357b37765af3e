"""Refit: what validation has found to be enough, done once more on train and valid together."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from goodfit.cocktail import Cocktail
from goodfit.errors import GoodfitError
from goodfit.fitting.data import Batches, batches_of, uncounted
from goodfit.fitting.guard import Nonfinite
from goodfit.fitting.training import Training
from goodfit.interrupts import Interrupts
from goodfit.order import Order
from goodfit.phases import Epoch
from goodfit.progress import Progress
from goodfit.regularizers.early_stopping import EarlyStopping
from goodfit.rows import joined

__all__ = ["beginning", "joined_data", "refuse_refit", "steps_for", "train_for", "without_stopping"]


def refuse_refit(how: Any) -> None:
    """Refuse a way to refit that is not known."""
    if how not in (None, "steps", "epochs"):
        raise GoodfitError(f"refit must be 'steps' or 'epochs', or left out, got refit={how!r}.")


def beginning(model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    """A copy of the model to begin from again, and what optimizes it: an instance is copied with it, as it is now."""
    own = optimizer if isinstance(optimizer, Optimizer) else None
    if own is not None:
        _refuse_bound(model, own)
    try:
        start, copied = copy.deepcopy((model, own))
    except Exception as wrong:
        why = (str(wrong).splitlines() or [type(wrong).__name__])[0]
        raise GoodfitError(f"refit begins from a copy, which cannot be made of this model ({why}); leave refit out.") from None
    return start, optimizer if copied is None else copied


def _refuse_bound(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer of which a copy would do less: one of other weights too, or with hooks, which are not copied."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if hooked or not held <= {id(p) for p in model.parameters()}:
        what = "has hooks" if hooked else "holds weights beside those of the model"
        raise GoodfitError(
            f"refit trains a fresh model, which needs an optimizer of its own, and this {type(optimizer).__name__} {what}; "
            "give a function that makes it from the parameters, as in optimizer=lambda parameters: SGD(parameters, lr=0.1)."
        )


def joined_data(train: Any, valid: Any, size: int, seed: int) -> Any:
    """Batches over the rows of both, in the order and size of those of train."""
    if isinstance(train, Batches) and isinstance(valid, Batches):
        x, y = joined([(train.x, train.y), (valid.x, valid.y)])
        return Batches(
            x, y, Order(len(y), train.order.size, shuffle=train.order.shuffle, seed=train.order.seed, share=train.order.share)
        )
    rows: Any = ConcatDataset([_dataset(train, "train"), _dataset(valid, "valid")])
    if not isinstance(train, DataLoader) or isinstance(train.batch_sampler, Order):
        return batches_of(rows, "train", size, shuffle=True, seed=seed)
    if isinstance(valid, DataLoader) and valid.collate_fn is not train.collate_fn:
        raise GoodfitError("refit joins train and valid, which must make batches of rows in one way; give both one collate_fn.")
    return DataLoader(
        rows,
        batch_size=train.batch_size,
        shuffle=isinstance(train.sampler, RandomSampler),
        num_workers=train.num_workers,
        collate_fn=train.collate_fn,
        pin_memory=train.pin_memory,
        drop_last=train.drop_last,
        generator=None if train.generator is None else torch.Generator().manual_seed(train.generator.initial_seed()),
        worker_init_fn=train.worker_init_fn,
    )


def _dataset(batches: Any, name: str) -> Dataset[Any]:
    """The rows behind batches, where those are all rows of a dataset, each once."""
    if isinstance(batches, Batches) and isinstance(batches.x, torch.Tensor):
        return TensorDataset(batches.x, batches.y)
    rows = getattr(batches, "dataset", None)
    sampler = getattr(batches, "sampler", None)
    drawn = type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(rows or ())
    whole = (drawn or type(sampler) is SequentialSampler) and getattr(sampler, "data_source", None) is rows
    known = isinstance(getattr(batches, "batch_sampler", None), Order) or (whole and batches.batch_size is not None)
    if rows is None or isinstance(rows, IterableDataset) or not known:
        raise GoodfitError(
            f"refit joins the rows of train and valid, which {name} does not tell; give tensors, a Dataset, or a DataLoader "
            "without a sampler of its own."
        )
    return rows


def without_stopping(cocktail: Cocktail) -> Cocktail:
    """The cocktail in which nothing hears scores; every other regularizer keeps its place, and so its random numbers."""
    return Cocktail(*(EarlyStopping(math.inf) if isinstance(one, Epoch) else one for one in cocktail))


def steps_for(how: str, step: int, before: Any, both: Any) -> tuple[int, str]:
    """How many optimizer steps a refit takes, and how to say it: as many, or as many passes over the data."""
    if how == "steps":
        return step, f"refit on train and valid for the {step} steps of the kept weights"
    passes = step / _length(before)
    steps = max(round(passes * _length(both)), 1)
    return steps, f"refit on train and valid for the {passes:g} epochs of the kept weights, which are {steps} steps"


def train_for(work: Training, steps: int, bar: Progress, interrupts: Interrupts) -> str:
    """So many steps and no check; why the weights are of no use, "" where they are."""
    try:
        for step in work.steps(steps, interrupts):
            bar.show(step, f"step {step} of {steps}")
    except Nonfinite as wrong:
        return f"diverged ({str(wrong).removesuffix('.')})"
    except KeyboardInterrupt:
        return f"was interrupted at step {work.step} of {steps}"
    return "" if all(bool(p.isfinite().all()) for p in work.run.model.parameters()) else "diverged"


def _length(batches: Any) -> int:
    """The steps of an epoch, counted where they are not told."""
    try:
        return len(batches)
    except TypeError:
        return sum(1 for _ in uncounted(batches))
