"""One file per technique, in the field's own words. Adding a regularizer is one class in one file here.

A class is found by itself: every file of this folder is read, and so is every entry point of the group
"goodfit.regularizers" of other packages. There is no list to keep.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points

from goodfit.errors import GoodfitWarning
from goodfit.phases import Regularizer

__all__ = ["catalogue"]


@cache
def catalogue() -> dict[str, type[Regularizer]]:
    """Every regularizer class by its name: those of this folder and those of installed entry points."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found = {kind.__name__: kind for kind in _subclasses(Regularizer) if kind.__module__.startswith(f"{__name__}.")}
    for point in entry_points(group=__name__):
        try:
            kind = point.load()
        except Exception as broken:  # somebody else's package must not break ours
            warnings.warn(f"The entry point {point.name} is left out: {broken!r}.", GoodfitWarning, stacklevel=2)
        else:
            found.setdefault(kind.__name__, kind)
    return dict(sorted(found.items()))


def _subclasses(kind: type[Regularizer]) -> Iterator[type[Regularizer]]:
    for child in kind.__subclasses__():
        yield from _subclasses(child)
        if not inspect.isabstract(child):
            yield child
