"""A progress bar: of a training with epoch, train loss, valid loss, best, patience left. Quiet where there is no terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A bar on standard error; `shown=None` means: where that is a terminal."""

    def __init__(self, epochs: int, title: str, shown: bool | None = None) -> None:
        self.bar: Any = None
        self.title, self.epochs, self.shown = title, epochs, shown

    def __enter__(self) -> Progress:
        import sys

        if self.shown if self.shown is not None else sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress as Bar, TextColumn, TimeElapsedColumn

            text = TextColumn("{task.fields[told]}", style="cyan")
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), text, TimeElapsedColumn())
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.epochs, told="")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def tell(self, row: dict[str, Any]) -> None:
        """Show the history row of an epoch."""
        told = f"epoch {row['epoch']}  train {row['train_loss']:.4g}  valid {row['valid_loss']:.4g}  best {row['best']:.4g}"
        left = row["patience_left"]
        self.show(row["epoch"], told + (f"  patience {left:g}" if left is not None else ""))

    def show(self, completed: int, told: str) -> None:
        """Show how far it is, and a few words."""
        if self.bar is not None:
            self.bar.update(self.task, completed=completed, told=told)

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.console.print(line)
