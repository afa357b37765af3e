"""What an aten operation is: its name, its tensors, its arguments by name, and whether it draws random numbers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["RATES", "READS", "op_of", "random_now", "tensors_of", "told"]

RATES = {"dropout", "dropout_p"}
READS = {"_local_scalar_dense", "is_nonzero", "nonzero"}
_RECURRENT = {"_cudnn_rnn", "miopen_rnn"}


@cache
def op_of(func: Any) -> str:
    """Its name, without the underscore of in-place ones."""
    name: str = func._schema.name.split("::")[-1]
    return name if name in READS else name.rstrip("_")


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """Those among arguments or results, or in a list of them: plain, for it runs at each operation."""
    found: list[Tensor] = []
    for one in values:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, list | tuple):
            found += tensors_of(one)
    return found


def random_now(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation draws: not one that is told a rate of 0, or not to train."""
    if not _may_draw(func):
        return False
    given = told(func, args, kwargs)
    if given.get("train", True) is False or given.get("training", True) is False:
        return False
    if op_of(func) == "bernoulli" and given.get("p") == 1:
        return False
    rates = [given[name] for name in ("p", *RATES) if isinstance(given.get(name), float | int)]
    return not rates or rates[0] > 0


def told(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name, with the defaults of those left out."""
    named = enumerate(func._schema.arguments)
    return {one.name: args[i] if i < len(args) else kwargs.get(one.name, one.default_value) for i, one in named}


@cache
def _may_draw(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags or op_of(func) in _RECURRENT
