"""What a host is asked: its package, which may be missing, the model in it, a metric by its name, and whether it clips."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from goodfit.cocktail import Cocktail
from goodfit.errors import GoodfitError, nearest
from goodfit.phases import Epoch, Finish, Gradient, phases_of

__all__ = [
    "beside_training",
    "imported",
    "monitored",
    "refuse_clipping",
    "refuse_deaf",
    "refuse_second",
    "refuse_sharded",
    "submodule",
]


def imported(extra: str, *names: str) -> Any:
    """The module of a host: of several names the one that is in use already, else the first that is installed."""
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return import_module(name)
        except ModuleNotFoundError as missing:
            if missing.name is None or not f"{name}.".startswith(f"{missing.name}."):
                raise  # the host is there, and lacks something itself
    host = names[-1]
    raise GoodfitError(
        f'goodfit.adapters.{extra} needs {host}, which is not installed; pip install "goodfit[{extra}]".'
    ) from None


def submodule(model: nn.Module, name: str) -> nn.Module:
    """A part of the host's model by its name."""
    parts = dict(model.named_modules())
    if name not in parts:
        raise GoodfitError(f"{type(model).__name__} has no submodule {name!r}; {nearest(name, filter(None, parts))}")
    return parts[name]


def refuse_deaf(cocktail: Cocktail, monitor: str | None) -> None:
    """Refuse a cocktail that waits for a score where no metric is named."""
    deaf = next(cocktail.of(Epoch), None)
    if deaf is not None and monitor is None:
        raise GoodfitError(f'{deaf} needs the name of the metric that it hears: Regularization(..., monitor="valid_loss").')


def monitored(metrics: Mapping[str, Any], monitor: str, host: str) -> Any:
    """One metric by its name."""
    if monitor not in metrics:
        names = ", ".join(sorted(metrics)) or "none"
        raise GoodfitError(
            f"monitor={monitor!r} must name a metric of the validation; {host} has: {names}; {nearest(monitor, metrics)}"
        )
    return metrics[monitor]


def refuse_clipping(cocktail: Cocktail, setting: str, cure: str) -> None:
    """A host that clips does so before Gradient regularizers act, on gradients that are not theirs yet."""
    clipped = next(cocktail.of(Gradient), None)
    if clipped is not None:
        raise GoodfitError(f"{setting} clips the gradient before {clipped} acts on it; {cure}, and clip in the cocktail.")


def refuse_sharded(model: nn.Module) -> None:
    """A regularizer needs the whole of a weight: its norm, its groups, what is kept of it."""
    name = next((name for name, p in model.named_parameters() if isinstance(p.data, DTensor)), None)
    if name is not None:
        raise GoodfitError(f"{name} is sharded over processes, and a regularizer needs the whole of it; train with DDP.")


def beside_training(batches: Any) -> Any:
    """Training data to read while the training does so too; None for a stream, and for workers that one reader resets."""
    return None if isinstance(batches, Iterator) or getattr(batches, "persistent_workers", False) else batches


def refuse_second(cocktail: Cocktail, first: Cocktail) -> None:
    """Beside another cocktail on the same model one may only stop: a model is built once, and after it no state changes."""
    averager = next((one for one in first.of(Finish) if one.averages), None)
    if averager is not None:
        raise GoodfitError(f"{averager} averages weights, of which a second Regularization knows nothing; put both into one.")
    for one in cocktail:
        if not one.off and not set(phases_of(type(one))) <= {"Epoch", "Finish"}:
            raise GoodfitError(f"A second Regularization may only stop the training, got {one}; put it in the first cocktail.")
