"""What hosts share: their package, which may be missing, the model in it, a metric by its name, and what is refused."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from goodfit.cocktail import Cocktail, as_cocktail
from goodfit.errors import GoodfitError, GoodfitWarning, nearest
from goodfit.phases import Build, Epoch, Finish, Gradient, Regularizer, phases_of
from goodfit.run import Run

__all__ = [
    "Hosted",
    "beside_training",
    "imported",
    "monitored",
    "refuse_clipping",
    "refuse_second",
    "refuse_sharded",
    "submodule",
]


class Hosted:
    """What the callbacks of Trainers share: settings that wait for the model, which the host has, and the run on it."""

    _made: ClassVar[str]  # where the host has it made

    def __init__(
        self,
        cocktail: Cocktail | Regularizer | str,
        *,
        monitor: str | None = None,
        model: str | None = None,
        example: Any = None,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        task: str | None = None,
        seed: int = 0,
    ) -> None:
        self.cocktail, self.monitor, self.model, self.example = as_cocktail(cocktail), monitor, model, example
        self.seed = seed
        deaf = next(self.cocktail.of(Epoch), None)
        if deaf is not None and monitor is None:
            raise GoodfitError(f'{deaf} needs the name of the metric that it hears: Regularization(..., monitor="valid_loss").')
        self._settings: dict[str, Any] = {"loss": loss, "task": task}
        self._run: Run | None = None
        self._attached = False
        self._saved, self._told = -1, False

    @property
    def run(self) -> Run:
        """The run on the model."""
        if self._run is None:
            raise GoodfitError(f"Regularization has no run yet: {self._made}.")
        return self._run

    @property
    def stopped(self) -> str:
        """Why the cocktail ended the training, "" where it did not."""
        return "" if self._run is None else self._run.stopped

    def _make(self, part: nn.Module, example: Any) -> None:
        self._run = Run(self.cocktail, part, example=example, seed=self.seed, **self._settings)

    def _tell_saved(self, step: int) -> None:
        """Once, where a check is heard behind the checkpoint of its step."""
        if step == self._saved and not self._told:
            self._told = True
            warnings.warn(
                f"The checkpoint of step {step} was saved before the validation, so what resumes from it has heard one check "
                "less; save behind the validation.",
                GoodfitWarning,
                stacklevel=2,
            )

    def _join(self, beside: list[Any]) -> None:
        if self is not beside[0]:
            refuse_second(beside[0].cocktail, self.cocktail)
            self.seed = beside[0].seed  # inserted layers draw by the seed of the run that was made last

    def _refuse_unfed(self, example: Any) -> None:
        builder = next(self.cocktail.of(Build), None)
        if builder is not None and example is None:
            raise GoodfitError(
                f"{builder} acts before the optimizer is made, and needs an input batch: Regularization(..., example=batch)."
            )


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


def monitored(metrics: Mapping[str, Any], monitor: str, host: str) -> Any:
    """One metric by its name."""
    if monitor not in metrics:
        names = ", ".join(sorted(metrics)) or "none"
        raise GoodfitError(
            f"monitor={monitor!r} must name a metric of the validation; {host} has: {names}; {nearest(monitor, metrics)}"
        )
    return metrics[monitor]


def refuse_second(first: Cocktail, second: Cocktail) -> None:
    """Beside another cocktail on the same model one may only stop: a model is built once, and after it no state changes."""
    averager = next((one for one in first.of(Finish) if one.averages), None)
    if averager is not None:
        told = "averages weights, of which a second Regularization knows nothing; put both into one"
        raise GoodfitError(f"{averager} {told}.")
    for one in second:
        if not one.off and not set(phases_of(type(one))) <= {"Epoch", "Finish"}:
            raise GoodfitError(f"A second Regularization may only stop the training, got {one}; put it in the first cocktail.")


def refuse_clipping(cocktail: Cocktail, setting: str, cure: str) -> None:
    """A host that clips does so before Gradient regularizers act, on gradients that are not theirs yet."""
    clipped = next(cocktail.of(Gradient), None)
    if clipped is not None:
        raise GoodfitError(f"{setting} clips the gradient before {clipped} acts on it; {cure}, and clip in the cocktail.")


def refuse_sharded(model: nn.Module, kind: str | None = None) -> None:
    """A regularizer needs the whole of a weight: its norm, its groups, what is kept of it. kind: of what shards, if any."""
    if kind is not None:
        raise GoodfitError(f"{kind} shards the weights, of which a regularizer needs the whole; train with DDP.")
    name = next((name for name, p in model.named_parameters() if isinstance(p.data, DTensor)), None)
    if name is not None:
        raise GoodfitError(f"{name} is sharded over processes, and a regularizer needs the whole of it; train with DDP.")


def beside_training(batches: Any) -> Any:
    """Training data to read while the training does so too; None for a stream, and for workers that one reader resets."""
    return None if isinstance(batches, Iterator) or getattr(batches, "persistent_workers", False) else batches
