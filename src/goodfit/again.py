"""What a second gradient needs of the first: its precision, and inputs that got a gradient, to be moved along it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from goodfit.errors import GoodfitError

__all__ = ["StepBatches", "uphill", "watched"]


@dataclass(eq=False)
class _Batch:
    """One batch of a step. done: whether a backward pass has come to its loss, so that it is in the gradients."""

    precise: Callable[[], AbstractContextManager[Any]]
    x: Any
    others: dict[str, Any]
    done: bool = False

    def mark(self, gradient: Tensor) -> None:
        self.done = True


class StepBatches:
    """The batches of a step, with the precision that each was computed in; those count that a backward pass has come to."""

    def __init__(self) -> None:
        self._held: list[_Batch] = []

    def __len__(self) -> int:
        return sum(one.done for one in self._held)

    def note(self, weights: Iterable[Tensor], loss: Tensor, x: Any, **others: Any) -> None:
        """One more; where those before it are done and no weight has a gradient, their step was not taken."""
        if not loss.requires_grad:
            return
        if self._held and all(one.done for one in self._held) and all(w.grad is None for w in weights):
            self._held.clear()
        self._held.append(_Batch(_precision(x), x, others))
        loss.register_hook(self._held[-1].mark)  # type: ignore[no-untyped-call]

    def drop(self) -> None:
        """The gradients so far are gone."""
        self._held = [one for one in self._held if not one.done]

    def forget(self) -> None:
        """A step begins."""
        self._held.clear()

    def again(self, loss: Callable[..., Tensor], epsilon: Any = None) -> None:
        """Backward of the one batch once more, at inputs moved by epsilon where it is given."""
        first = next(one for one in self._held if one.done)
        if any(isinstance(t, Tensor) and t.grad_fn is not None for t in tree_flatten(first.x)[0]):
            raise GoodfitError(
                "A second gradient runs backward once more, and x carries a graph of its own; put what computes it into the "
                "model, or hand over x.detach()."
            )
        with first.precise():
            again = loss(first.x if epsilon is None else uphill(first.x, epsilon), **first.others)
        torch.autograd.backward(again.sum())
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
