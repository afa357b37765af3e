"""How the command speaks: lines, folders that are free, files that are whole, and errors."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import typer

from goodfit.launch import once, speaks

__all__ = ["command", "explain", "fail", "free_folder", "printable", "tell", "write_csv"]


def tell(line: str) -> None:
    """A line on standard error, of the one process that tells how it goes."""
    if speaks():
        typer.echo(printable(line), err=True)


def printable(line: str) -> str:
    """One line, without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else "�" for c in line)


def command() -> str:
    """What the user typed."""
    import shlex

    return shlex.join(["goodfit", *(a for a in sys.argv[1:] if a != "--debug")])


def free_folder(data: Path, kind: str = "run") -> Path:
    """DATA-run in this folder, or the first of DATA-run-2, -3, ... that is free; or DATA-path."""
    stem = data.name.split(".")[0] or "table"
    names = (f"{stem}-{kind}{end}" for end in ("", *(f"-{i}" for i in range(2, 10_000))))
    return next(Path(name) for name in names if not Path(name).exists())


def write_csv(table: Any, output: Path) -> None:
    """A table as a CSV file, whole or not at all."""
    from pyarrow import csv

    from goodfit.durable import whole_file
    from goodfit.errors import GoodfitError

    device = output.exists() and not output.is_file()  # such as /dev/stdout, which cannot be replaced
    try:
        with nullcontext(output) if device else whole_file(output) as draft:
            csv.write_csv(table, draft)
    except OSError as wrong:
        raise GoodfitError(f"{str(output)!r} cannot be written: {wrong.strerror or wrong}; give another -o.") from None


def fail(line: str, code: int) -> NoReturn:
    """Say why, and end."""
    if once(line):
        typer.echo(printable(f"goodfit: {line}"), err=True)
    sys.exit(code)


def explain(wrong: Exception) -> NoReturn:
    """One line for what went wrong: input that must be mended, or a fault of ours."""
    from typer import Abort

    from goodfit.errors import GoodfitError

    if isinstance(wrong, Abort):
        fail("interrupted", 130)
    if isinstance(wrong, GoodfitError):
        fail(str(wrong), 2)
    if hasattr(wrong, "format_message"):
        fail(f"{' '.join(wrong.format_message().split()).rstrip('.')}. See goodfit --help.", 2)
    fail(f"{type(wrong).__name__}: {str(wrong).splitlines()[0] if str(wrong) else ''} (--debug shows where)", 1)
