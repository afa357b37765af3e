"""The best weights of one early stopping, in a file in place of its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from goodfit.errors import GoodfitError
from goodfit.kept import read, write
from goodfit.phases import State, Weights
from goodfit.processes import rank

__all__ = ["BestFile", "named"]


class _Signed(Protocol):
    @property
    def sign(self) -> float: ...


class BestFile:
    """A file that holds the best weights so far. In several processes each has its own, with its rank in the name."""

    def __init__(self, path: Any, stopping: _Signed) -> None:
        if not isinstance(path, str | Path):
            raise GoodfitError(f"keep must be the path of a file for the best weights, got a {type(path).__name__}.")
        self.path, self.stopping = Path(path), stopping
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise GoodfitError(f"keep must be the path of a file in a folder that is there, got {str(path)!r}.")
        if rank():
            self.path = self.path.with_name(f"{self.path.stem}.rank{rank()}{self.path.suffix}")

    def write(self, weights: Weights, buffers: Weights, state: State) -> None:
        """Keep a model, the best of a state."""
        write(self.path, {**named(weights, buffers), **self._mark(state)})

    def read(self, weights: Weights, buffers: Weights, state: State) -> dict[str, Tensor]:
        """What was kept of a model of these shapes, under the names that a state has for it; nothing before the first."""
        if not int(state["best_check"]):
            return named(weights, buffers)
        found = read(self.path)
        expected = {**named(weights, buffers), **self._mark(state)}
        odd = sorted(found.keys() ^ expected.keys()) or [n for n, t in expected.items() if found[n].shape != t.shape]
        if odd:
            raise GoodfitError(f"{str(self.path)!r} holds the weights of another model: {odd[0]!r} does not match.")
        mark = self._mark(state)
        if any(float(found[name]) != float(t) for name, t in mark.items()):
            there, here = (f"check {int(one['check'])} with {float(one['score']):.6g}" for one in (found, mark))
            raise GoodfitError(
                f"{str(self.path)!r} holds the best of another run: {there}, not {here}; give each its own file."
            )
        return {name: found[name] for name in named(weights, buffers)}

    def _mark(self, state: State) -> dict[str, Tensor]:
        """What tells the file of one run from that of another."""
        return {"check": state["best_check"], "score": state["best"] * self.stopping.sign}


def named(weights: Weights, buffers: Weights) -> dict[str, Tensor]:
    """All tensors of a model under the names that a state has for them."""
    return {**{f"weights.{n}": w for n, w in weights.items()}, **{f"buffers.{n}": b for n, b in buffers.items()}}
