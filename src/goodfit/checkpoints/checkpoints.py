"""Checkpoints of a training, in anybody's loop."""

from __future__ import annotations

import os
import re
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from goodfit.checkpoints.folder import Damaged, read, write
from goodfit.checkpoints.lock import Lock
from goodfit.checkpoints.parts import check, give, refuse, take
from goodfit.checkpoints.plain import packed, unpacked
from goodfit.checkpoints.processes import OfEach, on_first
from goodfit.checkpoints.randomness import Randomness
from goodfit.durable import discard, made_folder, removed
from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.processes import rank, world

__all__ = ["Checkpoints", "Saving"]

SHARE = 0.015  # of the time for saving, so that with saves that take longer than the last one it is 2 % at most
PACE = 100e6  # bytes per second: what is foreseen of the first
_NAME = re.compile(r"step-([0-9]{9}|[1-9][0-9]{9,})")


@dataclass(frozen=True)
class Checkpoints:
    """Save a training so that, killed at any moment, it goes on with the same bits.

    Each checkpoint is a folder of safetensors and JSON with the SHA-256 of every file: written beside, forced to the disk,
    then renamed. What is damaged is found, named, and passed over for the one before it. Nothing in it is ever executed.

    Numbers: folder, made where it is not there; every, optimizer steps from one to the next, an integer >= 1, or None: as
        often as saving takes at most 2 % of the time; last, how many are left, an integer >= 1.
    Errors: numbers outside their range; a folder that cannot be made, or that another process writes into.

    `saving = Checkpoints("overnight").watch(model=model, optimizer=optimizer, run=run)`, `step = saving.restore()`, and
    `saving(step)` behind each step. `fit(..., checkpoints="overnight")` does it all.

    >>> import tempfile
    >>> folder, model = tempfile.mkdtemp(), nn.Linear(1, 1)
    >>> Checkpoints(folder).watch(model=model).save(7)
    >>> Checkpoints(folder).watch(model=nn.Linear(1, 1)).restore()
    7
    """

    folder: str | Path
    every: int | None = None
    last: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | Path):
            raise GoodfitError(f"Checkpoints.folder must be a path, got a {type(self.folder).__name__}.")
        for name in ("every", "last"):
            number = getattr(self, name)
            if (type(number) is not int or number < 1) and not (name == "every" and number is None):
                raise GoodfitError(f"Checkpoints.{name} must be an integer >= 1, got {name}={number!r}.")

    def watch(self, **parts: Any) -> Saving:
        """Save these parts: models, optimizers, schedulers, a `Run`, whatever has a state; the generators come along."""
        return Saving(self, parts)


class Saving:
    """Checkpoints of these parts. step: that of the newest, 0 before the first."""

    def __init__(self, how: Checkpoints, parts: dict[str, Any]) -> None:
        self.how, self.folder = how, Path(how.folder)
        for name, part in parts.items():
            refuse(name, part)
        self.parts = parts if "randomness" in parts else {**parts, "randomness": OfEach(Randomness())}
        self.step, self._damaged = 0, set[Path]()
        self._known = not on_first(self._open)
        self._cost = _foreseen(parts)
        self._since = time.monotonic()

    def __call__(self, step: int) -> bool:
        """Save where it is time to; whether it was. A disk that does not take it is told, and tried again the next time.

        In processes that train together all must call it, and `save` and `restore`; the first one writes, and decides.
        """
        if not (self._due(step) if self.how.every else on_first(lambda: self._due(step))):
            return False
        try:
            self.save(step)
        except GoodfitError as wrong:
            warnings.warn(f"{wrong} The training goes on without this checkpoint.", GoodfitWarning, stacklevel=2)
            self._since = time.monotonic()
            return False
        return True

    def save(self, step: int) -> None:
        """Save now, behind so many steps; then the oldest go."""
        if not self._known:
            raise GoodfitError(f"{str(self.folder)!r} has checkpoints; call restore() first, or give another folder.")
        began = time.monotonic()
        each = [part for part in self.parts.values() if isinstance(part, OfEach)]
        for part in each:
            part.collect()
        try:
            on_first(lambda: self._write(step))
        finally:
            for part in each:
                part.forget()
        self.step = step
        self._since = time.monotonic()
        self._cost = self._since - began

    def restore(self) -> int:
        """Go on where the newest checkpoint was taken that is whole; its step, 0 where there is none."""
        newest = on_first(self._newest)
        if newest is not None:
            path, states, about = newest
            self._take(path, states)
            self.step = int(about["step"])
            _compare(about)
        self._known = True
        return self.step

    def close(self) -> None:
        """Let another process write there."""
        if rank() == 0:
            self._lock.release()

    def _open(self) -> bool:
        """Make the folder; whether it has checkpoints."""
        try:
            made_folder(self.folder)
            self._lock = Lock(self.folder)
        except (OSError, ValueError) as wrong:
            raise _refused(self.folder, wrong) from None
        return bool(self._found())

    def _write(self, step: int) -> None:
        path = self.folder / f"step-{step:09d}"
        try:
            for left in self.folder.glob(".step-*.draft"):
                discard(left)
            if step != self.step or not path.exists():
                write(path, {name: give(part) for name, part in self.parts.items()}, {"step": step, **_versions()})
                self._damaged.discard(path)
        except OSError as wrong:
            raise _refused(self.folder, wrong) from None
        self._rotate(step)

    def _rotate(self, step: int) -> None:
        """Leave this one and those before it, but none that was found damaged, or is of steps that were taken back."""
        found = self._found()
        good = [one for one in found if _number(one) <= step and one not in self._damaged]
        left = ""
        for old in [one for one in found if one not in good[: self.how.last]]:
            try:
                removed(old)
            except OSError as wrong:  # the new one is whole, and the others may still go
                left = f"{old} is no longer needed and cannot be removed: {wrong.strerror or wrong}; remove it by hand."
        if left:
            warnings.warn(left, GoodfitWarning, stacklevel=5)

    def _newest(self) -> tuple[str, dict[str, Any], dict[str, Any]] | None:
        """The newest checkpoint that is whole: its path, its states, and what was said about it."""
        found = self._found()
        self._damaged.clear()
        for path in found:
            try:
                states, about = read(path)
                if type(about.get("step")) is not int or about["step"] != _number(path):
                    raise Damaged(f"{path} is of another step, {about.get('step')!r:.20}")
                return str(path), states, about
            except Damaged as wrong:
                self._damaged.add(path)
                warnings.warn(f"{wrong}; the checkpoint before it is tried.", GoodfitWarning, stacklevel=3)
        if found:
            raise GoodfitError(f"No checkpoint in {str(self.folder)!r} is whole; begin anew in another folder.")
        return None

    def _take(self, path: str, states: dict[str, dict[str, Any]]) -> None:
        """All parts, or none."""
        if states.keys() != self.parts.keys():
            there, here = (", ".join(sorted(one)) for one in (states, self.parts))
            raise GoodfitError(f"{path} was saved of {there:.200}, and is restored into {here}; name the same parts.")
        for name, part in self.parts.items():
            check(name, part, states[name])
        before = {name: unpacked(*packed(give(part), name)) for name, part in self.parts.items()}
        try:
            for name, part in self.parts.items():
                take(part, states[name])
        except Exception as wrong:
            for other, part in self.parts.items():
                take(part, before[other])
            if isinstance(wrong, GoodfitError):
                raise
            line = (str(wrong).strip().splitlines() or [type(wrong).__name__])[0]
            raise GoodfitError(f"{path} is of another training: {name} does not take its state ({line:.200}).") from None

    def _due(self, step: int) -> bool:
        if self.how.every is not None:
            return step - self.step >= self.how.every
        return (time.monotonic() - self._since) * SHARE >= self._cost

    def _found(self) -> list[Path]:
        """All checkpoints, the newest first."""
        try:
            names = [name for name in os.listdir(self.folder) if _NAME.fullmatch(name)]
        except OSError as wrong:
            raise _refused(self.folder, wrong, "sought in") from None
        return sorted((self.folder / name for name in names), key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name[5:])


def _foreseen(parts: dict[str, Any]) -> float:
    """Seconds that the first checkpoint may take: an optimizer can have two numbers for every weight."""
    models = [part for part in parts.values() if isinstance(part, nn.Module)]
    return 0.05 + 3 * sum(p.nbytes for model in models for p in model.parameters()) / PACE


def _versions() -> dict[str, Any]:
    """What the bits of a training depend on, beside its state."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "processes": world(),
    }


def _compare(about: dict[str, Any]) -> None:
    for name, now in _versions().items():
        if about.get(name) != now:
            warnings.warn(
                f"The checkpoint was saved with {name} {about.get(name)!r:.40}, and goes on with {now}: bits may differ.",
                GoodfitWarning,
                stacklevel=3,
            )


def _refused(folder: Path, wrong: Exception, how: str = "written into") -> GoodfitError:
    if isinstance(wrong, GoodfitError):
        return wrong
    why = getattr(wrong, "strerror", None) or wrong
    return GoodfitError(f"The checkpoint cannot be {how} {str(folder)!r}: {why}; those that are there are as they were.")
