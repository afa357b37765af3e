"""The tensors inside an input: out of nested dicts, tuples and lists, and others in their places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from goodfit.errors import GoodfitError, listed

__all__ = ["floats", "only_floats", "refuse_other_rows", "replaced"]


def floats(x: Any, who: str) -> dict[str, Tensor]:
    """The tensors of floating point in an input, by the names with which Python reaches them: x, x['age'], x[0]."""
    found = _leaves(x, "x")
    chosen = {name: leaf for name, leaf in found.items() if isinstance(leaf, Tensor) and leaf.is_floating_point()}
    if not chosen:
        got = listed(f"{name} of {_kind(leaf)}" for name, leaf in found.items()) or "an empty x"
        raise GoodfitError(f"{who} acts on tensors of floating point, got {got}; leave it out of the cocktail.")
    return chosen


def only_floats(x: Any, who: str) -> dict[str, Tensor]:
    """The same, of an input that holds nothing else (None aside): half a token is no token."""
    chosen = floats(x, who)
    for name, leaf in _leaves(x, "x").items():
        if name not in chosen and leaf is not None:
            raise GoodfitError(
                f"{who} mixes rows, and only tensors of floating point can be mixed, got {name} of {_kind(leaf)}; hand it over "
                "as one (one-hot, embedded), or leave it out of the cocktail."
            )
    return chosen


def refuse_other_rows(found: dict[str, Tensor], y: Tensor, who: str) -> None:
    """Refuse a tensor that does not have one row per target on axis 0: another axis would be taken for the rows."""
    for name, leaf in found.items():
        if leaf.ndim == 0 or leaf.shape[0] != y.shape[0]:
            raise GoodfitError(
                f"{who} needs the {y.shape[0]} rows of y on axis 0 of every tensor, got {name} of shape {tuple(leaf.shape)}; "
                "put the batch first, and what belongs to no row into the model."
            )


def replaced(x: Any, others: Mapping[str, Tensor], name: str = "x") -> Any:
    """The same input with other tensors in the places of these names."""
    if isinstance(x, Mapping):
        return {key: replaced(inner, others, f"{name}[{key!r}]") for key, inner in x.items()}
    if isinstance(x, tuple | list):
        inside = [replaced(inner, others, f"{name}[{i}]") for i, inner in enumerate(x)]
        return type(x)(*inside) if hasattr(x, "_fields") else type(x)(inside)
    return others.get(name, x)


def _leaves(x: Any, name: str) -> dict[str, Any]:
    if isinstance(x, Mapping):
        return {k: v for key, inner in x.items() for k, v in _leaves(inner, f"{name}[{key!r}]").items()}
    if isinstance(x, tuple | list):
        return {k: v for i, inner in enumerate(x) for k, v in _leaves(inner, f"{name}[{i}]").items()}
    return {name: x}


def _kind(leaf: Any) -> str:
    return str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
