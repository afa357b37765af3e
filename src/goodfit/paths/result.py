"""What a path gave: a point per λ, the choices among them, and the model of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.errors import GoodfitError
from goodfit.hyper import hypers
from goodfit.paths.scores import best_of, one_se_of
from goodfit.report.charts import number, percent

__all__ = ["Path", "Point", "over_text", "table_of"]


@dataclass(frozen=True)
class Point:
    """One λ. score: the validation loss, the mean over the folds where there are folds. stderr: of that mean.

    zeros: the share of exact zeros among the weights that the regularizer acts on, nonzero their number. features: the
    inputs that still have a weight that is not zero, None where no layer reads the input alone. weights: the state dict.
    """

    lam: float
    score: float
    stderr: float
    zeros: float
    nonzero: int
    features: tuple[int, ...] | None
    weights: dict[str, Tensor] = field(repr=False, compare=False)
    seconds: float = field(compare=False)

    def row(self) -> dict[str, Any]:
        """All but the weights, in JSON's types."""
        names = ("lam", "score", "stderr", "zeros", "nonzero", "seconds")
        return {name: getattr(self, name) for name in names} | {"features": None if self.features is None else [*self.features]}


@dataclass(frozen=True)
class Path:
    """A path over λ, from the smallest λ to the largest.

    points: one per λ. dense: the point without the regularizer that a network started from, None for a linear model.
    lam_max: the λ from which on all is zero, None where that was not reached. fold_scores: a list per fold. stopped: why
    it ended before the last λ. switch: the number that the path is over.
    """

    points: tuple[Point, ...] = field(repr=False)
    over: Any
    dense: Point | None = field(repr=False)
    lam_max: float | None
    fold_scores: tuple[tuple[float, ...], ...] = field(repr=False)
    stopped: str
    make: Callable[[float], nn.Module] = field(repr=False, compare=False)
    learned: tuple[str, ...] = field(repr=False)

    @property
    def lams(self) -> list[float]:
        """λ, increasing."""
        return [p.lam for p in self.points]

    @property
    def scores(self) -> list[float]:
        """The validation loss of each λ."""
        return [p.score for p in self.points]

    @property
    def stderrs(self) -> list[float]:
        """Its standard error: over the folds, or over the rows of one validation set."""
        return [p.stderr for p in self.points]

    @property
    def zeros(self) -> list[float]:
        """The share of exact zeros of each λ."""
        return [p.zeros for p in self.points]

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """Every parameter along the path: name → a tensor of shape (λ, *its own)."""
        return {name: torch.stack([p.weights[name] for p in self.points]) for name in self.learned}

    @property
    def best(self) -> Point:
        """The point with the lowest score."""
        return self.points[best_of(self.scores)]

    @property
    def one_se(self) -> Point:
        """The strongest λ whose score is within one standard error of the best: the simplest model that is as good.

        The strongest is the largest, or the smallest for a bound such as MaxNorm's, which is off at inf.
        """
        turn = -1 if dict(hypers(self.over))[self.over.switch()].off == math.inf else 1
        return self.points[::turn][one_se_of(self.scores[::turn], self.stderrs[::turn])]

    def model(self, point: Point | None = None) -> nn.Module:
        """A fresh model with the weights of a point (`one_se` if none is given), in eval mode."""
        chosen = self.one_se if point is None else point
        if not isinstance(chosen, Point):
            raise GoodfitError(f"model takes a point of the path such as path.best, got {chosen!r:.60}.")
        model = self.make(chosen.lam)
        model.load_state_dict(chosen.weights)
        return model.eval()

    def selected(self, point: Point | None = None) -> list[int]:
        """Which input features a point (`one_se` if none is given) still reads, by their index."""
        chosen = self.one_se if point is None else point
        if chosen.features is None:
            raise GoodfitError("No linear or convolution layer reads the input by itself, so no feature can be told left out.")
        return list(chosen.features)

    def rows(self) -> list[dict[str, Any]]:
        """The table of the points, in JSON's types."""
        best, one_se = self.best, self.one_se
        return [p.row() | {"best": p is best, "one_se": p is one_se} for p in self.points]

    def plot(self, ax: Any = None) -> Any:
        """Draw score ± standard error against λ, with the best and the 1-SE λ marked and the sparsity behind; the axes."""
        from goodfit.paths.plot import plot

        return plot(self, ax)

    def __str__(self) -> str:
        return "\n".join([f"path over {over_text(self.over)}", *table_of(self.rows())])


def over_text(over: Any) -> str:
    """The regularizer with λ in the place of its number, which goes through many."""
    switch = over.switch()
    return str(over) if switch is None else str(over).replace(f"({getattr(over, switch)!r}", "(λ", 1)


def table_of(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of a table of `Path.rows()`."""
    head = f"{'λ':>10}  {'score':>10}  {'± se':>9}  {'zeros':>8}  {'weights':>8}  {'inputs':>6}"
    return [head, *map(_line, rows)]


def _line(row: dict[str, Any]) -> str:
    marks = "  ".join(text for key, text in (("best", "best"), ("one_se", "1-SE")) if row[key])
    inputs = "–" if row["features"] is None else str(len(row["features"]))
    cells = f"{row['lam']:>10.4g}  {number(row['score']):>10}  {number(row['stderr']):>9}  {percent(row['zeros']):>8}"
    return f"{cells}  {row['nonzero']:>8}  {inputs:>6}  {marks}".rstrip()
