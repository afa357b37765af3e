"""A fit that is saved, and goes on where it was."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from operator import length_hint
from pathlib import Path
from typing import Any

from torch import nn

from goodfit.checkpoints.checkpoints import Checkpoints
from goodfit.checkpoints.processes import OfEach
from goodfit.checkpoints.randomness import Randomness
from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.fitting.asked import compare, first_targets
from goodfit.fitting.feed import generators, persistent
from goodfit.fitting.training import Training

__all__ = ["as_checkpoints", "of_refit", "resume"]


class Place:
    """Where a training is between two steps, beside its run, model, optimizer and schedule.

    otherwise: what is to be told of a training that goes on with another cocktail.
    """

    def __init__(self, work: Training) -> None:
        self.work = work
        self.otherwise = ""
        self.asked = work.asked | {"valid": first_targets(work.valid)}

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain numbers."""
        numbers = {name: getattr(self.work, name) for name in ("epoch", "step", "history")}
        return {**numbers, "tally": self.work.tally.state_dict(), "batches": self._batches(), "asked": self.asked}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        if saved["batches"] != self._batches():
            raise GoodfitError(
                f"The checkpoint is of a training on {saved['batches']} batches of train and valid, and here are "
                f"{self._batches()}; give the same data, in batches of the same size."
            )
        self.otherwise = compare(saved["asked"], self.asked)
        for name in ("epoch", "step", "history"):
            setattr(self.work, name, saved[name])
        self.work.stepping.taken = saved["step"]
        self.work.tally.load_state_dict(saved["tally"])

    def _batches(self) -> list[int]:
        """How many there are in train and valid, -1 where they do not tell."""
        return [length_hint(one, -1) for one in (self.work.train, self.work.valid)]


def as_checkpoints(given: Any, keep: Any) -> Checkpoints | None:
    """How to save: a folder, or all that `Checkpoints` takes."""
    if given is None:
        return None
    if keep is not None:
        raise GoodfitError(
            "Checkpoints hold the best weights too, and a file of keep= would run ahead of them; leave keep out."
        )
    if not isinstance(given, Checkpoints | str | Path):
        raise GoodfitError(f"checkpoints must be a folder or gf.Checkpoints(folder, ...), got a {type(given).__name__}.")
    return given if isinstance(given, Checkpoints) else Checkpoints(given)


def of_refit(checkpoints: Checkpoints | None) -> Checkpoints | None:
    """Those of the refit, within the folder."""
    return None if checkpoints is None else replace(checkpoints, folder=Path(checkpoints.folder) / "refit")


def resume(work: Training, checkpoints: Checkpoints, start: nn.Module | None) -> int:
    """Save a training from here on, and go on where it is saved already; the step of that, 0 where it begins.

    start: the model from which a refit begins, which a new process would make with other numbers.
    """
    for name, batches in (("train", work.train), ("valid", work.valid)):
        if persistent(batches):
            raise GoodfitError(
                f"Workers of {name} that persist draw on from one epoch into the next, which cannot be found again; make the "
                "loader with persistent_workers=False, or leave checkpoints out."
            )
    stepping, scheduler = work.stepping, work.schedule.scheduler
    parts = {"model": work.run.model, "optimizer": stepping.optimizer, "run": work.run, "scheduler": scheduler}
    parts |= {"scaler": stepping.scaler, "start": start}
    given = {name: part for name, part in parts.items() if part is not None}
    randomness = OfEach(Randomness(*generators(work.train, work.valid)))
    place = Place(work)
    work.saving = checkpoints.watch(**given, training=place, feed=OfEach(work.feed), randomness=randomness)
    step = work.saving.restore()
    if place.otherwise:
        warnings.warn(place.otherwise, GoodfitWarning, stacklevel=4)
    if step and scheduler is not None:
        stepping.optimizer._opt_called = True  # type: ignore[attr-defined]  # in another process: the scheduler need not warn
    return step
