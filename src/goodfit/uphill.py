"""Inputs that get a gradient, and are moved along it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from goodfit.errors import GoodfitError

__all__ = ["uphill", "watched"]


def watched(x: Any) -> Any:
    """The same inputs, those of floating point with a gradient to come."""
    if not any(map(_real, tree_flatten(x)[0])):
        raise GoodfitError("Inputs must hold numbers of floating point to be moved along their gradient; leave FGSM out.")
    return tree_map(_watched, x)


def uphill(x: Any, epsilon: Any) -> Any:
    """Inputs moved by epsilon along the sign of their gradient; a sign, since it is the same for a scaled loss."""
    return tree_map(lambda t: t.detach() + epsilon * t.grad.sign() if _real(t) and t.grad is not None else t, x)


def _watched(t: Any) -> Any:
    if not _real(t):
        return t
    if t.requires_grad:
        t.retain_grad()
        return t
    return t.detach().requires_grad_()


def _real(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()
