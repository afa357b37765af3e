"""The course of a path: one walk over λ with one validation set; or one on all rows that sets the λ, and one per fold."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor, nn

from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.fitting.data import batches_of
from goodfit.fitting.loop import evaluate
from goodfit.paths.features import features_of, readers
from goodfit.paths.folds import Pair, held_out, rows_of, whole
from goodfit.paths.grid import below, climbing, known_range
from goodfit.paths.linear import Descent
from goodfit.paths.network import Ascent
from goodfit.paths.problem import Problem
from goodfit.paths.result import Path, Point
from goodfit.paths.scores import over_folds, spread
from goodfit.progress import Progress

__all__ = ["Course"]

Weights = dict[str, Tensor]
Stage = tuple[float, Weights, float]  # λ, the state at it, seconds


class Course:
    """Walks of one problem. wanted: the λ that the user gave. dense: of a network, the state of each walk's start."""

    def __init__(self, problem: Problem, wanted: list[float] | None, count: int, bar: Progress, linear: bool) -> None:
        self.problem, self.wanted, self.count, self.bar, self.linear = problem, wanted, count, bar, linear
        model = problem.run(problem.known.low).model
        self.names, self.readers = problem.penalised(model), readers(model, problem.example)
        self.learned = tuple(n for n, _ in model.named_parameters())
        self.lam_max: float | None = None
        self.dense: list[Weights] = []
        self.done = 0

    def on_rows(self, train: Any, valid: Any) -> Path:
        """One walk, scored on one validation set."""
        points, why = [], ""
        held = self._batches(valid, "valid")
        try:
            for lam, state, seconds in self._walk(train, valid, self.wanted):
                score, model = self._score(state, held)
                points.append(self._point(lam, state, seconds, score, spread(model, held, self.problem.measure)))
        except KeyboardInterrupt:
            if not points:
                raise
            why = f"interrupted after {len(points)} of the λ"
        dense = None
        if self.dense:
            score, model = self._score(self.dense[0], held)
            dense = self._point(0.0, self.dense[0], 0.0, score, spread(model, held, self.problem.measure))
        return self._path(points, dense, [], why)

    def on_folds(self, train: Pair, folds: list[tuple[Tensor, Tensor]]) -> Path:
        """A walk on all rows, for λ and weights; then one per fold, for the scores."""
        stages = list(self._walk(*self._apart(train), self.wanted))
        lams = sorted(lam for lam, _, _ in stages)
        scores: list[list[float]] = []
        dense: list[float] = []
        why = ""
        try:
            for rows, others in folds:
                held = self._batches(rows_of(train, others), "valid")
                walk = self._walk(*self._apart(rows_of(train, rows)), lams)
                found = {lam: self._score(state, held)[0] for lam, state, _ in walk}
                scores.append([found[lam] for lam in lams])
                dense += [self._score(self.dense[-1], held)[0]] if self.dense else []
        except KeyboardInterrupt:
            if len(scores) < 2:
                raise
            why = f"interrupted after {len(scores)} of {len(folds)} folds"
        told = dict(zip(lams, zip(*over_folds(scores), strict=True), strict=True))
        points = [self._point(lam, state, seconds, *told[lam]) for lam, state, seconds in stages]
        start = None
        if dense:
            (mean,), (error,) = over_folds([[d] for d in dense])
            start = self._point(0.0, self.dense[0], 0.0, mean, error)
        return self._path(points, start, scores, why)

    def _walk(self, train: Any, held: Any, lams: list[float] | None) -> Iterator[Stage]:
        """Every λ with its state, in the direction that suits the model."""
        walk = self._downward(train, lams) if self.linear else self._upward(train, held, lams)
        started = time.perf_counter()
        for lam, state in walk:
            self.done += 1
            self.bar.show(self.done, f"λ {lam:.3g}  zeros {self._zeros(state):.1%}")
            yield lam, state, time.perf_counter() - started
            started = time.perf_counter()

    def _downward(self, train: Any, lams: list[float] | None) -> Iterator[tuple[float, Weights]]:
        descent = Descent(self.problem, *whole(train, self.problem.batch_size, self.problem.home))
        first = not self.done
        top = descent.lam_max() if first and self.problem.selects else None
        if first:
            self.lam_max = top
        if lams is None and self.problem.selects and top is None:
            raise GoodfitError(
                "No λ follows from this model: the loss has no slope at zero weights, or zero is never its optimum; give lams=."
            )
        lams = lams or (below(top, self.count) if top else known_range(self.problem, self.count))
        yield from zip(sorted(lams, reverse=True), descent.downward(lams), strict=True)

    def _upward(self, train: Any, held: Any, lams: list[float] | None) -> Iterator[tuple[float, Weights]]:
        first = not self.done
        training = batches_of(train, "train", self.problem.batch_size, shuffle=True, seed=self.problem.seed)
        ascent = Ascent(self.problem, training, self._batches(held, "valid"))
        self.dense.append(ascent.dense)
        most = len(lams) if lams else self.count + 20
        grid = lams or (
            climbing(*ascent.range(), self.count) if self.problem.selects else known_range(self.problem, self.count)
        )
        for lam, state in ascent.upward(islice(grid, most), len(self.wanted or ()) or self.count):
            yield lam, state
            if self.problem.selects and self._zeros(state) == 1:
                if first and self.lam_max is None:
                    self.lam_max = lam
                if not lams:
                    return
        if not lams and self.problem.selects:
            left = f"{1 - self._zeros(state):.2%} of the weights"
            warnings.warn(f"The path ended at λ = {lam:.3g} with {left} left; give lams= or more epochs.", GoodfitWarning, 2)

    def _apart(self, train: Pair) -> tuple[Pair, Pair]:
        """Rows to train on, and rows to stop by; a linear model needs none of these."""
        return (train, train) if self.linear else held_out(train, self.problem.seed)

    def _batches(self, data: Any, name: str) -> Any:
        return batches_of(data, name, self.problem.batch_size, shuffle=False, seed=self.problem.seed)

    def _score(self, state: Weights, held: Any) -> tuple[float, nn.Module]:
        model = self.problem.run(None).model
        model.load_state_dict(state)
        return evaluate(model, held, self.problem.measure), model

    def _zeros(self, state: Weights) -> float:
        zeros, total = (sum(f(state[n]) for n in self.names) for f in (lambda w: int((w == 0).sum()), Tensor.numel))
        return zeros / total

    def _point(self, lam: float, state: Weights, seconds: float, score: float, stderr: float) -> Point:
        nonzero = sum(int(state[n].count_nonzero()) for n in self.names)
        features = features_of(state, self.readers)
        return Point(lam, score, stderr, self._zeros(state), nonzero, features, state, seconds)

    def _path(self, points: list[Point], dense: Point | None, scores: list[list[float]], why: str) -> Path:
        if not any(math.isfinite(p.score) for p in points):
            raise GoodfitError(
                f"No λ has a finite validation loss, got {points[0].score} at λ = {points[0].lam:.3g}; look for nan in it."
            )
        problem, ordered = self.problem, tuple(sorted(points, key=lambda p: p.lam))
        made = lambda lam: problem.run(None if lam == 0 else lam).model  # noqa: E731
        folds = tuple(tuple(one) for one in scores)
        return Path(ordered, problem.over, dense, self.lam_max, folds, why, made, self.learned)
