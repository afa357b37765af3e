"""Steps whose numbers are not finite: noticed before they spoil a weight, named, and ended, left out, or rolled back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.batchnorms.present import by_batch
from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.fitting.culprit import culprit

__all__ = ["POLICIES", "Guard", "Nonfinite", "refuse_policy"]

POLICIES = ("stop", "raise", "skip", "rollback")
IN_A_ROW = 10


class Nonfinite(GoodfitError):
    """A step whose loss, gradients or batch statistics are not finite; the step was not taken."""


class Guard:
    """Look at each step between its backward and its move.

    back: puts the best weights so far into the model, and says whether there are any. spoiled: steps that were left out, in a
    row, or since the last check.
    """

    def __init__(self, model: nn.Module, policy: str, back: Callable[[], bool]) -> None:
        self.model, self.policy, self.back = model, policy, back
        self.spoiled = 0
        self._buffers = [b for norm in by_batch(model).values() for b in norm.buffers() if b.is_floating_point()]
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """Before the forward of a step, in which batch norms count."""
        self._before = [b.clone() for b in self._buffers]

    def finite(self, losses: Sequence[Tensor]) -> bool:
        """Whether the step may be taken."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        fine = _finite([*grads, *self._buffers, *(loss.detach() for loss in losses)])
        if fine and self.policy == "skip":
            self.spoiled = 0
        return fine

    def restore(self) -> None:
        """Take back what the forward has counted."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)

    def refuse(self, step: int, x: Any, y: Any, loss: Tensor) -> None:
        """Name what was not finite, and end the training, leave out the step, or go back."""
        told = f"step {step} is not finite: {culprit(self.model, x, y, loss)}"
        self.spoiled += 1
        if self.policy in ("stop", "raise"):
            raise Nonfinite(f"{told}; the step was not taken.")
        if self.spoiled > IN_A_ROW:
            raise Nonfinite(f"{told}, as {IN_A_ROW} batches before it; none of their steps was taken.")
        what = ""
        if self.policy == "rollback":
            what = ", and the model goes back to its best weights so far" if self.back() else ", before any check to go back to"
        warnings.warn(f"{told}; it is left out{what}.", GoodfitWarning, stacklevel=2)


@torch.no_grad()
def _finite(tensors: Sequence[Tensor]) -> bool:
    """A sum is finite where all is, unless it overflows: it is the quickest look, and what it doubts is looked at."""
    sums = [t.sum() for t in tensors]
    if len({s.dtype for s in sums}) > 1:
        sums = [s.to(torch.complex128) for s in sums]
    return bool(torch.stack(sums).sum().isfinite()) or all(bool(t.isfinite().all()) for t in map(_dense, tensors))


def _dense(tensor: Tensor) -> Tensor:
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def refuse_policy(policy: Any) -> None:
    """Refuse what is no policy."""
    if policy not in POLICIES:
        known = ", ".join(map(repr, POLICIES[:-1])) + f" or {POLICIES[-1]!r}"
        raise GoodfitError(f"nonfinite must be {known}, got nonfinite={policy!r}.")
