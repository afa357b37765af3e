"""What a user tells of a check, as a report."""

from __future__ import annotations

import math
from typing import Any

from goodfit.errors import GoodfitError
from goodfit.losses import score_of
from goodfit.phases import Report

__all__ = ["told"]


def told(score: Any, **others: Any) -> Report:
    """A report of one check; what is None was not told.

    Raises: GoodfitError for what is no number, for a negative standard error, and for a step that is no count.
    """
    numbers = {name: score_of(value, name) for name, value in others.items() if value is not None}
    stderr, step = (float(numbers.get(name, 0)) for name in ("stderr", "step"))
    if stderr < 0:
        raise GoodfitError(f"stderr must be >= 0, the standard error of the score, got stderr={stderr:g}.")
    if not (step >= 0 and math.isfinite(step) and step.is_integer()):
        raise GoodfitError(f"step must be the number of optimizer steps so far, an integer >= 0, got step={step:g}.")
    return Report(score_of(score), **numbers)
