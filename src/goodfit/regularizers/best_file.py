"""The best weights of one early stopping, in a file in place of its state."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from goodfit.errors import GoodfitError
from goodfit.kept import is_kept, read, write
from goodfit.phases import State, Weights
from goodfit.processes import rank

__all__ = ["BestFile", "named", "refuse_other_model"]


class _Signed(Protocol):
    @property
    def sign(self) -> float: ...


class BestFile:
    """A file that holds the best weights so far. In several processes each has its own, with its rank in the name."""

    def __init__(self, path: Any, stopping: _Signed) -> None:
        if not isinstance(path, str | Path):
            raise GoodfitError(f"keep must be the path of a file for the best weights, got a {type(path).__name__}.")
        self.path, self.stopping, self.mark = Path(path), stopping, secrets.token_hex(8)
        if rank():
            self.path = self.path.with_name(f"{self.path.stem}.rank{rank()}{self.path.suffix}")
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise GoodfitError(f"keep must be the path of a file in a folder that is there, got {str(path)!r}.")
        if self.path.exists() and (not self.path.is_file() or not is_kept(self.path)):
            raise GoodfitError(f"keep must not be the path of something else, got {str(path)!r}; give a path that is free.")

    def write(self, weights: Weights, buffers: Weights, state: State) -> None:
        """Keep a model, the best of a state."""
        write(self.path, {**named(weights, buffers), **self._told(state)}, self.mark)

    def read(self, weights: Weights, buffers: Weights, state: State) -> dict[str, Tensor]:
        """What was kept of a model of these shapes, under the names that a state has for it; nothing before the first."""
        if not int(state["best_check"]):
            return named(weights, buffers)
        found, mark = read(self.path)
        if mark != self.mark:
            raise GoodfitError(f"{str(self.path)!r} holds the best of another run, which wrote over it; give each its own.")
        expected = {**named(weights, buffers), **self._told(state)}
        odd = sorted(found.keys() ^ expected.keys()) or [n for n, t in expected.items() if found[n].shape != t.shape]
        if odd:
            raise GoodfitError(f"{str(self.path)!r} holds the weights of another model: {odd[0]!r} does not match.")
        told = self._told(state)
        if any(float(found[name]) != float(t) for name, t in told.items()):
            there, here = (f"check {int(one['check'])} with {float(one['score']):.6g}" for one in (found, told))
            raise GoodfitError(
                f"{str(self.path)!r} holds the best of another state of this run: {there}, not {here}; load the state that was "
                "saved behind it."
            )
        return {name: found[name] for name in named(weights, buffers)}

    def take(self, mark: str, weights: Weights, buffers: Weights, state: State) -> None:
        """Go on with the file of another process, after it was looked into."""
        before, self.mark = self.mark, mark
        try:
            self.read(weights, buffers, state)
        except GoodfitError:
            self.mark = before
            raise

    def _told(self, state: State) -> dict[str, Tensor]:
        """Which check the file is of."""
        return {"check": state["best_check"], "score": state["best"] * self.stopping.sign}


def refuse_other_model(now: Weights, state: State) -> None:
    """Refuse a model that is not the one of a state: a copy would be spread over other shapes."""
    kept = {name: t for name, t in state.items() if name.startswith(("weights.", "buffers."))}
    odd = next((n for n in (*now, *kept) if n not in now or n not in kept or now[n].shape != kept[n].shape), None)
    if odd is not None:
        there, here = (f"{tuple(one[odd].shape)}" if odd in one else "not there" for one in (kept, now))
        raise GoodfitError(
            f"The model must be the one of the checks before, and {odd!r} was {there} and is {here}; add, remove or reshape "
            "layers before the first check."
        )


def named(weights: Weights, buffers: Weights) -> dict[str, Tensor]:
    """All tensors of a model under the names that a state has for them."""
    return {**{f"weights.{n}": w for n, w in weights.items()}, **{f"buffers.{n}": b for n, b in buffers.items()}}
