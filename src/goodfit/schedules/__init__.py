"""`gf.schedules`: change over time, a number of a regularizer, or a learning rate, that depends on the step.

A schedule is a frozen value with a parsable repr. Time is the number of completed optimizer steps, so there is nothing to save.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from goodfit.schedules.annealing import cosine, linear, step, warmup
from goodfit.schedules.dropout import curriculum, early, late
from goodfit.schedules.schedule import Schedule

BY_NAME: dict[str, Callable[..., Any]] = {f.__name__: f for f in (linear, cosine, step, warmup, curriculum, early, late)}

__all__ = ["BY_NAME", "Schedule", "cosine", "curriculum", "early", "late", "linear", "step", "warmup"]
