"""Penalty factors: how much each single weight is penalised, as a multiple of lam.

`L1(lam, factors=given({"0.weight": [1, 0.5, 0]}))` takes numbers; `L1(lam, factors=adaptive())` takes them from the weights
that the run starts from, which is the adaptive lasso. A factor of 0 leaves a weight alone, inf holds it at zero. Values are
frozen, and print as they are written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from goodfit.errors import GoodfitError, nearest

__all__ = ["Factors", "adaptive", "frozen", "given", "thawed"]


class Factors(ABC):
    """A factor for each number of each selected weight."""

    @abstractmethod
    def of(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The factors by name, each in the shape of its weight; a weight that is left out has factor 1."""


@dataclass(frozen=True, repr=False)
class _Adaptive(Factors):
    gamma: float

    def __repr__(self) -> str:
        return f"adaptive({self.gamma!r})"

    def of(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: w.detach().abs().pow(-self.gamma) for name, w in weights.items()}


@dataclass(frozen=True, repr=False)
class _Given(Factors):
    numbers: tuple[tuple[str, Any], ...]

    def __repr__(self) -> str:
        return f"given({ {name: thawed(numbers) for name, numbers in self.numbers}!r})"

    def of(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, numbers in self.numbers:
            if name not in weights:
                raise GoodfitError(f"factors.given names {name!r}, which is not among the weights; {nearest(name, weights)}")
            w = weights[name]
            factor = torch.tensor(thawed(numbers), dtype=w.dtype, device=w.device)
            try:
                found[name] = factor.expand(w.shape).clone()
            except RuntimeError:
                raise GoodfitError(
                    f"factors.given({name!r}) must broadcast to shape {tuple(w.shape)}, got {tuple(factor.shape)}."
                ) from None
        return found


def adaptive(gamma: float = 1.0) -> Factors:
    """The factors of the adaptive lasso: 1/|w|^gamma at the weights that the run starts from; a zero stays zero.

    Source: Zou 2006, The adaptive lasso and its oracle properties. Start from weights that were trained before.

    >>> adaptive(2.0).of({"w": torch.tensor([0.5, -1.0, 0.0])})["w"]
    tensor([4., 1., inf])
    """
    if not isinstance(gamma, int | float) or isinstance(gamma, bool) or not 0 < gamma < float("inf"):
        raise GoodfitError(f"adaptive needs a finite gamma > 0, got gamma={gamma!r}.")
    return _Adaptive(float(gamma))


def given(numbers: Mapping[str, Any]) -> Factors:
    """Factors by name of the weight: numbers >= 0, or inf, as nested lists (or arrays) that broadcast to its shape.

    >>> given({"w": [0.0, 2.0]}).of({"w": torch.ones(3, 2)})["w"][0]
    tensor([0., 2.])
    """
    if not isinstance(numbers, Mapping):
        raise GoodfitError(f"given takes factors by name of the weight, as in given({{'0.weight': 2.0}}), got {numbers!r:.60}.")
    kept = []
    for name, values in numbers.items():
        try:
            tensor = torch.as_tensor(values, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            tensor = torch.full((), torch.nan)
        if not bool((tensor >= 0).all()):
            raise GoodfitError(f"factors.given({name!r}) must hold numbers >= 0, got {values!r:.60}.")
        kept.append((str(name), frozen(tensor.tolist())))
    return _Given(tuple(kept))


def frozen(values: Any) -> Any:
    """Nested lists as nested tuples, which can be hashed."""
    return tuple(map(frozen, values)) if isinstance(values, list | tuple) else values


def thawed(values: Any) -> Any:
    """Nested tuples as nested lists, as a user writes them."""
    return list(map(thawed, values)) if isinstance(values, tuple) else values
