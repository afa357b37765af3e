"""A table made ready for training: read, typed, split and encoded, and everything told that the user should know."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from goodfit.tabular.answers import Answers
from goodfit.tabular.columns import Column, describe, target_of
from goodfit.tabular.encode import Encoder
from goodfit.tabular.read import read
from goodfit.tabular.split import Split, count_duplicates, split

__all__ = ["Data", "prepare"]


@dataclass(frozen=True)
class Data:
    """A table ready for training. rows: the numbers that its rows had in the file, from 1."""

    columns: list[Column]
    rows: Any
    parts: Split
    encoder: Encoder
    answers: Answers
    x: Any
    y: Any
    duplicates: dict[str, int]
    notes: list[str]

    def part(self, name: str) -> tuple[Any, Any]:
        """Inputs and targets of one part."""
        rows = getattr(self.parts, name)
        return self.x[rows], self.y[rows]


def prepare(path: Path, target: str, task: str | None, seed: int, reading: dict[str, Any], tell: Callable[[str], None]) -> Data:
    """Read, type, split and encode; only the training part is learned from."""
    table, notes = read(path, **reading)
    total = table.num_rows
    present = np.arange(1, total + 1)
    if target in table.column_names:
        present = present[table[target].is_valid().to_numpy()]
    table, goal, more = target_of(table, target, task)
    columns = describe(table, target)
    tell(f"{path.name}: {total} rows, {len(columns)} input columns; {target} is to be predicted, as {goal.task}")
    for kind, names in _grouped((c.kind, c.name) for c in columns if c.used):
        tell(f"{kind}: {names}")
    classes = None if goal.classes is None else Answers(goal).encode(table)
    parts = split(table.num_rows, classes, seed)
    duplicates = count_duplicates(table, parts)
    train = table.take(parts.train)
    encoder, answers = Encoder.fit(train, columns), Answers.fit(goal, train)
    notes += [*more, *(f"{note}: {names}" for note, names in _grouped((c.note, c.name) for c in columns if c.note))]
    notes += [f"{n} rows of the {part} part stand in an earlier part too" for part, n in duplicates.items() if n]
    for note in notes:
        tell(note)
    sizes = ", ".join(f"{part} {n}" for part, n in parts.sizes.items())
    x, y = encoder.transform(table), answers.encode(table)
    tell(f"split: {sizes} rows; {x.shape[1]} inputs after encoding")
    return Data(columns, present, parts, encoder, answers, x, y, duplicates, notes)


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """What is said of columns, each with the names of those it is said of, the first eight written out."""
    groups: dict[str, list[str]] = {}
    for what, name in pairs:
        groups.setdefault(what, []).append(name)
    more = {what: f" and {len(names) - 8} more" if len(names) > 8 else "" for what, names in groups.items()}
    return [(what, ", ".join(names[:8]) + more[what]) for what, names in groups.items()]
