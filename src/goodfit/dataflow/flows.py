"""What is noted of the tensors and operations of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["INPUT", "Call", "Flow", "Reader", "Rectangle", "tensors_in"]

INPUT = "the input"


@dataclass(eq=False)
class Flow:
    """What is known of one tensor, which is held so that its identity stays its own."""

    tensor: Tensor
    fed: bool = False  # computed from the model's input, whatever its values
    taint: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.bool))
    layers: list[Tensor] = field(default_factory=list)
    leaf: str = ""  # a view of this parameter or buffer, or of the model's input, and of nothing else
    averaging: bool = False  # each row along the last dimension is non-negative and sums to one
    stale: bool = False  # written through another view


@dataclass(eq=False)
class Reader:
    """One product with a weight: who reads which slices, with what, and what constants they bring."""

    name: str  # of the parameter that the weight is a view of, "" if it is computed
    rows: Tensor
    columns: Tensor
    weight: Tensor  # (rows, columns of a group, kernel...)
    groups: int
    constant: Tensor  # per column: the same, untouched by the input, everywhere
    value: Tensor
    padded: bool  # the border sees fewer columns: a constant cannot go into the bias
    raw: bool  # reads the model's input itself
    event: int
    live: bool = True

    def live_weights(self) -> Tensor:
        """Which weights are not exactly zero; NaN is not."""
        return (self.weight != 0).flatten(2).any(2).cpu() if self.weight.ndim > 2 else (self.weight != 0).cpu()

    def grouped(self, weights: Tensor) -> Tensor:
        """Weights (rows, columns of a group) as (groups, rows of a group, columns of a group)."""
        return weights.reshape(self.groups, -1, weights.shape[1])


@dataclass(eq=False)
class Rectangle:
    """Slices that a view laid out in several dimensions (`even`: in pieces of one length), and the module that did so."""

    ids: Tensor
    even: bool
    module: nn.Module | None


class Call:
    """One operation with its arguments by name."""

    def __init__(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.func, self.name = func, func.overloadpacket.__name__
        self.inplace = self.name.endswith("_") and not self.name.startswith("__")
        self.name = self.name.rstrip("_") if self.inplace else self.name
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        self.usual = {a.name: a.default_value for a in func._schema.arguments}
        self.args = self.usual | given
        self.inputs = list(tensors_in(self.args.values()))
        self.outputs = list(tensors_in(out))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested values, outputs of models that are dicts or data classes among them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(value.values())
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors_in(vars(value).values())
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes | range | Iterator):
        for one in value:
            yield from tensors_in(one)
