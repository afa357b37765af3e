"""`gf.logs`: where the rows of a history go while a training runs.

    fit(model, train, valid, cocktail, logs=[CSV("log.csv"), TensorBoard("runs/one")])

A logger is whatever has the one method `log(row)`; it gets the row of each check, a dict of plain numbers by name. Where a
saved training goes on, it gets the rows that come then, of which those behind the checkpoint may have been told before.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from goodfit.durable import whole_file
from goodfit.errors import GoodfitError, GoodfitWarning

__all__ = ["CSV", "Logger", "TensorBoard", "Told", "logger_at"]

Row = Mapping[str, Any]


@runtime_checkable
class Logger(Protocol):
    """What takes the rows: MLflow, Weights & Biases and others fit in one line each."""

    def log(self, row: Row) -> None:
        """Write one row down."""


class CSV:
    """Rows in a text file, whose header is their names. A row that is there already is not written twice.

    Errors: no folder there, or no file; a file of another training. A disk that does not take a row is a warning.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir() or (self.path.exists() and not self.path.is_file()):
            raise GoodfitError(f"A log cannot be written into {str(path)!r}: give a file in a folder that exists.")
        self._there: dict[str, dict[str, str]] | None = None

    def log(self, row: Row) -> None:
        """Append one row."""
        text = {name: "" if value is None else str(value) for name, value in row.items()}
        there = self._begin(list(text)) if self._there is None else self._there
        old = there.get(text["step"])
        if old is None and not any(int(step) > row["step"] for step in there):
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, list(text)).writerow(text)
        elif old is None or any(old.get(name) != text[name] for name in ("epoch", "train_loss", "valid_loss")):
            raise GoodfitError(f"{str(self.path)!r} has the rows of another training, at step {row['step']}; give a free path.")

    def _begin(self, names: list[str]) -> dict[str, dict[str, str]]:
        """The rows that are there; a line that was cut goes, and a new file begins with its header."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        if lines and lines[0] != ",".join(names):
            raise GoodfitError(f"{str(self.path)!r} is not a log of these rows; give a free path.")
        if not lines or not text.endswith("\n"):
            with whole_file(self.path) as draft:
                draft.write_text("\n".join(lines or [",".join(names)]) + "\n", encoding="utf-8")
        self._there = {row["step"]: row for row in csv.DictReader(lines)}
        return self._there


class TensorBoard:
    """Rows as scalars of TensorBoard, by step; needs the extra goodfit[tensorboard].

    Errors: the package is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise GoodfitError('gf.logs.TensorBoard needs tensorboard; pip install "goodfit[tensorboard]".') from None
        self.folder, self._make = Path(folder), SummaryWriter
        self._writer: Any = None

    def log(self, row: Row) -> None:
        """Write the numbers of one row; what a training that was killed wrote behind it is taken out of the picture."""
        if self._writer is None:
            self._writer = self._make(str(self.folder), purge_step=row["step"])
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()


def logger_at(path: str | Path) -> Logger:
    """The logger that a path asks for: a file for .csv, else a folder of TensorBoard."""
    return CSV(path) if Path(path).suffix.lower() == ".csv" else TensorBoard(path)


class Told:
    """Loggers behind one `log`. One that fails is left out from there on, since a training is worth more than its log."""

    def __init__(self, given: Any) -> None:
        loggers = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
        for one in loggers:
            if isinstance(one, type) or not isinstance(one, Logger):
                raise GoodfitError(
                    f"logs must be loggers, with a method log(row), such as gf.logs.CSV('log.csv'), got {one!r:.60}."
                )
        self.loggers: list[Logger] = loggers

    def log(self, row: Row) -> None:
        """Tell all of them, in plain numbers."""
        plain = {name: value if value is None or isinstance(value, int) else float(value) for name, value in row.items()}
        for one in list(self.loggers):
            try:
                one.log(dict(plain))
            except GoodfitError:
                raise
            except Exception as wrong:
                self.loggers.remove(one)
                line = (str(wrong).strip().splitlines() or [type(wrong).__name__])[0]
                warnings.warn(
                    f"{type(one).__name__}.log failed at step {row['step']} ({line:.200}), and gets no row from there on.",
                    GoodfitWarning,
                    stacklevel=2,
                )
