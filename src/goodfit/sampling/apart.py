"""Whether rows can stand side by side in one pass: none acts on another, and every mask is drawn for each row."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from goodfit.sampling.observe import Pass, as_it_was, observe
from goodfit.sampling.rows import answer_of, between, call_with, other, repeated, rows_of
from goodfit.sampling.survey import Survey
from goodfit.surgery.proof import largest_error

__all__ = ["rows_apart"]

_BEFORE, _AFTER = 1, 3  # odd and unequal, so that neither rows in pairs nor mirrored rows stay together
_LEAST = 4  # rows between them, since a mask may drop a whole row


def rows_apart(model: nn.Module, found: Survey) -> bool:
    """Whether they can; proved once for what a survey found."""
    if found.apart is None:
        found.apart = _proved(model, found)
    return found.apart


def _proved(model: nn.Module, found: Survey) -> bool:
    """Prove it by trials in which the rows stand between rows of other numbers.

    There they must give what they give alone: with each mask at its mean or, where not all draws are such masks, in eval mode.
    With equal draws they must give the same between rows of yet other numbers. And what is drawn, and what comes from draws
    alone, must grow as the rows do: a mask that rows share stays as large as it was.
    """
    rows, settled = rows_of(found.inputs), found.moving if found.means else found.still
    alone = answer_of(settled.output)
    if found.still.draws.draws or _decides(found.moving) or alone.ndim == 0 or len(alone) != rows:
        return False
    times = max(1, _LEAST // rows)
    middle = repeated(found.inputs, times)
    first, second = (between(other(middle, _BEFORE, more), middle, other(middle, _AFTER, more)) for more in (False, True))
    drawn = observe(model, partial(call_with, model, first), found.on, means=found.means)
    sizes = [size * rows_of(first) for size in found.moving.draws.sizes]
    if drawn.problem or _decides(drawn) or [size * rows for size in drawn.draws.sizes] != sizes:
        return False
    try:
        among = _inner(drawn.output) if found.means else _answer(model, first, ())
        seeds = range(1 if found.means else 4)
        pairs = [[_answer(model, trial, found.on, seed) for trial in (first, second)] for seed in seeds]
    except Exception:  # a model may refuse such numbers
        return False
    return all(largest_error([a], [b])[0] <= 1 for a, b in [(repeated(alone, times), among), *pairs])


def _answer(model: nn.Module, inputs: Any, on: Iterable[str], seed: int = 0) -> Tensor:
    with as_it_was(model, on, seed):
        return _inner(call_with(model, inputs))


def _inner(output: Any) -> Tensor:
    return answer_of(output)[_BEFORE:-_AFTER]


def _decides(seen: Pass) -> bool:
    return any(d.kind == "decides" for d in seen.dropping)
