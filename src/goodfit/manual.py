"""What `goodfit list` says: every regularizer, read off its class."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from textwrap import wrap

from goodfit.hyper import Hyper, hypers
from goodfit.phases import Regularizer, phases_of
from goodfit.regularizers import catalogue
from goodfit.stop import CRITERIA, Criterion

__all__ = ["lines"]


def lines(width: int = 100) -> Iterator[str]:
    """The manual of all regularizers, then of the criteria of early stopping, a few lines each, none longer than `width`."""
    for line in _lines():
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        yield from wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) or [""]


def _lines() -> Iterator[str]:
    for kind in catalogue().values():
        yield from _entry(kind, ", ".join(phases_of(kind)))
    for criterion in CRITERIA:
        yield from _entry(criterion, "criterion of EarlyStopping")


def _entry(kind: type[Regularizer] | type[Criterion], role: str) -> Iterator[str]:
    text = inspect.getdoc(kind) or ""
    yield f"{kind.__name__}  [{role}]  {text.splitlines()[0] if text else ''}"
    for number, known in hypers(kind):
        yield f"    {number}{'' if known.required else f' = {known.default:g}'}   {_range(known)}"
    numbers = {number for number, _ in hypers(kind)}
    for other in fields(kind):
        if other.name not in numbers:
            yield f"    {other.name}{'' if other.default is MISSING else f' = {other.default!r}'}"
    yield f"    source: {_source(text)}"
    yield ""


def _range(known: Hyper) -> str:
    scale = "log" if known.log else "linear"
    off = "" if known.off is None else f", off at {known.off:g}"
    unit = f" {known.unit}" if known.unit else ""
    searched = "" if known.required else f"; searched {known.low:g} to {known.high:g}, {scale}"
    return f"{known.rule}{unit}{off}{searched}"


def _source(text: str) -> str:
    found = re.search(r"Source:\s*(.+?)(?:\n\s*\n|\Z)", text, re.DOTALL)
    return " ".join(found.group(1).split()) if found else "none given"
