"""What a second gradient needs of the first: its precision, and inputs that got a gradient, to be moved along it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from goodfit.errors import GoodfitError

__all__ = ["StepBatches", "uphill", "watched"]


class StepBatches:
    """The batches of a step, with the precision that each was computed in."""

    def __init__(self) -> None:
        self._held: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return len(self._held)

    def note(self, model: nn.Module, x: Any, *others: Any) -> None:
        """One more; where there is no gradient, the step of those before it was not taken."""
        if self._held and all(p.grad is None for p in model.parameters()):
            self._held.clear()
        self._held.append((_precision(x), x, *others))

    def forget(self) -> None:
        """A step begins."""
        self._held.clear()

    def again(self, loss: Callable[..., Tensor], epsilon: Any = None) -> None:
        """Backward of the one batch once more, at inputs moved by epsilon where it is given."""
        precise, x, y, through = first = self._held[0]
        if any(isinstance(t, Tensor) and t.grad_fn is not None for t in tree_flatten(x)[0]):
            raise GoodfitError(
                "A second gradient runs backward once more, and x carries a graph of its own; put what computes it into the "
                "model, or hand over x.detach()."
            )
        with precise():
            again = loss(x if epsilon is None else uphill(x, epsilon), y, through=through)
        torch.autograd.backward(again)
        self._held[:] = [first]


def _precision(x: Any) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the contexts in which operations on x are as precise as now."""
    device = next((t.device.type for t in tree_flatten(x)[0] if isinstance(t, Tensor)), "cpu")
    if not torch.is_autocast_enabled(device):
        return nullcontext
    return partial(torch.autocast, device, torch.get_autocast_dtype(device))


def watched(x: Any) -> Any:
    """The same inputs, those of floating point with a gradient to come."""
    if not any(map(_real, tree_flatten(x)[0])):
        raise GoodfitError("Inputs must hold numbers of floating point to be moved along their gradient; leave FGSM out.")
    return tree_map(_watched, x)


def uphill(x: Any, epsilon: Any) -> Any:
    """Inputs moved by epsilon, one or one for each along the first axis, along the sign of their gradient.

    A sign, since it is the same for a scaled loss.
    """
    return tree_map(lambda t: t.detach() + _beside(epsilon, t) * t.grad.sign() if _real(t) and t.grad is not None else t, x)


def _beside(epsilon: Any, t: Tensor) -> Any:
    each = isinstance(epsilon, Tensor) and epsilon.ndim == 1
    return epsilon.to(t).view(-1, *(1 for _ in t.shape[1:])) if each else epsilon


def _watched(t: Any) -> Any:
    if not _real(t):
        return t
    return t.detach().requires_grad_()


def _real(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()
