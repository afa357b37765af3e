"""What is noted of the tensors and operations of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["INPUT", "Call", "Flow", "Reader", "Rectangle", "leaves_in", "storage", "tensors_in"]

INPUT = "the input"

_WHOLE = (Tensor, nn.Module, str, bytes, range, int, float, complex, type, Enum)


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


def storage(tensor: Tensor) -> int:
    """The memory that a tensor lies in."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested values: containers, data classes and other objects with attributes."""
    return (leaf for leaf in leaves_in(value) if isinstance(leaf, Tensor))


def leaves_in(value: Any) -> Iterator[Any]:
    """What nested values consist of, in order, circles and long chains of objects among them."""
    seen: dict[int, Any] = {}  # held, so that an identity stays its own
    open_ones = [iter((value,))]
    while open_ones:
        for one in open_ones[-1]:
            inside = None if isinstance(one, _WHOLE) else _inside(one)
            if inside is None:
                yield one
            elif id(one) not in seen:
                if not isinstance(one, tuple):
                    seen[id(one)] = one
                open_ones.append(iter(inside))
                break
        else:
            open_ones.pop()


def _inside(value: Any) -> Iterable[Any] | None:
    """The parts of a container or an object; None for what has none, or would be used up by looking."""
    if isinstance(value, dict | list | tuple | set | frozenset):
        items = value.values() if isinstance(value, dict) else value
        own = getattr(value, "__dict__", None)
        return chain(items, (v for v in own.values() if not any(v is one for one in items))) if own else items
    if getattr(value, "__dict__", None):
        return None if type(value).__module__ == "builtins" else list(vars(value).values())
    if hasattr(value, "__dataclass_fields__"):
        return [getattr(value, name, None) for name in value.__dataclass_fields__]
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, Iterable) and not isinstance(value, Iterator | np.ndarray) else None
