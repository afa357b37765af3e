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

DEEPEST = 100  # what is written must be read again, in whatever depth of calls


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


def _pack(value: Any, name: str, tensors: dict[str, Tensor], deep: int = 0) -> Any:
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return value if abs(value) < 2**63 else {"int": hex(value)}
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        return _pack_tensor(_copied(value, name), name, tensors)
    if isinstance(value, np.ndarray | np.generic):
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {kind: _pack_tensor(_from_numpy(value, name), name, tensors)}
    if deep > DEEPEST:
        raise GoodfitError(f"A checkpoint holds states {DEEPEST} levels deep, and {name:.100} goes deeper; flatten it.")
    if isinstance(value, Mapping):
        return _pack_dict(value, name, tensors, deep + 1)
    if type(value) in (list, tuple):
        parts = [_pack(one, f"{name}.{i}", tensors, deep + 1) for i, one in enumerate(value)]
        return parts if type(value) is list else {"tuple": parts}
    raise GoodfitError(
        f"A checkpoint holds numbers, texts, tensors, and lists and dicts of them, and {name} is a {type(value).__name__}; "
        "leave it out of the state_dict, or save a number or a text in its place."
    )


def _pack_dict(value: Mapping[Any, Any], name: str, tensors: dict[str, Tensor], deep: int) -> Any:
    inner = [(key, _pack(one, f"{name}.{key}", tensors, deep)) for key, one in value.items()]
    if type(value) is not Counter and all(type(key) is str for key in value):
        return {"dict": dict(inner)}
    pairs = [[_pack(key, name, tensors, deep), one] for key, one in inner]
    return {"counter" if type(value) is Counter else "pairs": pairs}


def _pack_tensor(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Its kind, and the name under which it is kept: its place in the state, told apart where two places read alike."""
    free = name.encode(errors="backslashreplace").decode()
    while free in tensors or free.endswith(".__metadata__"):  # which safetensors has for itself
        free += "'"
    tensors[free] = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return {"complex" if tensor.is_complex() else "tensor": free}


def _copied(value: Tensor, name: str) -> Tensor:
    plain = value.layout is torch.strided and type(value.data) is Tensor
    try:
        if not plain or value.is_nested or value.is_quantized or value.is_meta:
            raise NotImplementedError
        copy = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return copy.contiguous().resolve_conj().resolve_neg()
    except NotImplementedError:
        what = f"{type(value).__name__} of {value.dtype}, layout {value.layout}, on {value.device}"
        raise GoodfitError(f"A checkpoint holds plain dense tensors, and {name} is a {what}; leave it out.") from None


def _from_numpy(value: Any, name: str) -> Tensor:
    try:
        if isinstance(value, np.ndarray) and type(value) is not np.ndarray:
            raise TypeError("it may be more than its numbers, as one with a mask is")
        return torch.from_numpy(np.array(value, order="C").astype(np.dtype(value.dtype.str).newbyteorder("=")))
    except TypeError:
        what = f"{type(value).__name__} of dtype {value.dtype}"
        raise GoodfitError(f"A checkpoint holds plain arrays of numbers, and {name} is a {what}; leave it out.") from None


def _float(inner: Any, tensors: Mapping[str, Tensor]) -> float:
    return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[inner]


def _pairs(inner: Any, tensors: Mapping[str, Tensor]) -> dict[Any, Any]:
    return {unpacked(key, tensors): unpacked(one, tensors) for key, one in inner}


_READERS: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "int": lambda inner, tensors: int(inner, 16),
    "float": _float,
    "tensor": lambda inner, tensors: tensors[inner],
    "complex": lambda inner, tensors: torch.view_as_complex(tensors[inner]),
    "array": lambda inner, tensors: unpacked(inner, tensors).numpy(),
    "scalar": lambda inner, tensors: unpacked(inner, tensors).numpy()[()],
    "dict": lambda inner, tensors: {key: unpacked(one, tensors) for key, one in inner.items()},
    "pairs": _pairs,
    "counter": lambda inner, tensors: Counter(_pairs(inner, tensors)),
    "tuple": lambda inner, tensors: tuple(unpacked(one, tensors) for one in inner),
}
