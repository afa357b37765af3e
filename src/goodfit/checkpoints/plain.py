"""States as plain data: a tree of JSON, and the tensors that it names. Nothing in it can be code."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from goodfit.errors import GoodfitError

__all__ = ["packed", "unpacked"]


def packed(value: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """A state as (tree, tensors); `name` is what its tensors and errors call it. The tensors are copies on the CPU."""
    tensors: dict[str, Tensor] = {}
    return _pack(value, name, tensors), tensors


def unpacked(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that was packed, with its tensors on the CPU.

    Raises: KeyError, TypeError, ValueError, where it is not what `packed` gives.
    """
    if isinstance(tree, list):
        return [unpacked(part, tensors) for part in tree]
    if not isinstance(tree, dict):
        return tree
    (kind, inner), *rest = tree.items()
    if rest:
        raise ValueError(f"{kind!r} is not alone")
    return _READERS[kind](inner, tensors)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        return {"tensor": _named(_copied(value, name), name, tensors)}
    if isinstance(value, np.ndarray | np.generic):
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {kind: _named(_from_numpy(value, name), name, tensors)}
    if isinstance(value, Mapping):
        if type(value) is not Counter and all(type(key) is str for key in value):
            return {"dict": {key: _pack(one, f"{name}.{key}", tensors) for key, one in value.items()}}
        pairs = [[_pack(key, name, tensors), _pack(one, f"{name}.{key}", tensors)] for key, one in value.items()]
        return {"counter" if type(value) is Counter else "pairs": pairs}
    if type(value) in (list, tuple):
        parts = [_pack(one, f"{name}.{i}", tensors) for i, one in enumerate(value)]
        return parts if type(value) is list else {"tuple": parts}
    raise GoodfitError(
        f"A checkpoint holds numbers, texts, tensors, and lists and dicts of them, and {name} is a {type(value).__name__}; "
        "leave it out of the state_dict, or save a number or a text in its place."
    )


def _named(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> str:
    """The name under which a tensor is kept: its place in the state, told apart where two places read alike."""
    free = name
    while free in tensors:
        free += "'"
    tensors[free] = tensor
    return free


def _copied(value: Tensor, name: str) -> Tensor:
    if value.layout is not torch.strided or value.is_quantized or value.is_meta or type(value.data) is not Tensor:
        what = f"{type(value).__name__} of layout {value.layout} on {value.device}"
        raise GoodfitError(f"A checkpoint holds plain dense tensors, and {name} is a {what}; leave it out of the state.")
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous().resolve_conj().resolve_neg()


def _from_numpy(value: Any, name: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(value, order="C"))
    except TypeError:
        raise GoodfitError(f"A checkpoint holds arrays of numbers, and {name} has dtype {value.dtype}.") from None


def _float(inner: Any, tensors: Mapping[str, Tensor]) -> float:
    return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[inner]


def _pairs(inner: Any, tensors: Mapping[str, Tensor]) -> dict[Any, Any]:
    return {unpacked(key, tensors): unpacked(one, tensors) for key, one in inner}


_READERS: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "float": _float,
    "tensor": lambda inner, tensors: tensors[inner],
    "array": lambda inner, tensors: tensors[inner].numpy(),
    "scalar": lambda inner, tensors: tensors[inner].numpy()[()],
    "dict": lambda inner, tensors: {key: unpacked(one, tensors) for key, one in inner.items()},
    "pairs": _pairs,
    "counter": lambda inner, tensors: Counter(_pairs(inner, tensors)),
    "tuple": lambda inner, tensors: tuple(unpacked(one, tensors) for one in inner),
}
