"""Whether two models say the same: their outputs on the same inputs, compared number by number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.dataflow.flows import leaves_in, tensors_in
from goodfit.errors import GoodfitError
from goodfit.surgery.running import call_model, must_run, quiet

__all__ = ["BOUNDS", "Proof", "along", "answers", "largest_error", "mapped", "shuffled", "variants"]

_PLAIN = (Tensor, str, bytes, range, int, float, complex, type, Enum, type(None), torch.dtype, torch.device)

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def answers(model: nn.Module, example: Any) -> list[Tensor]:
    """Copies of all output tensors, in order; refused where an output cannot be read, since nothing is then proved."""
    with quiet(model):
        outputs = call_model(model, example)
        leaves = list(leaves_in(outputs))
        found = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]
    unread = [leaf for leaf in leaves if not isinstance(leaf, _PLAIN)]
    if unread or not found:
        kind = type(unread[0] if unread else outputs).__name__
        raise GoodfitError(
            f"The outputs of {type(model).__name__} are compared, so they must be tensors, or tuples, lists, dicts or data "
            f"classes of them; got {kind}: let the model return tensors."
        )
    return found


def variants(example: Any) -> Iterator[Any]:
    """Other inputs that a model may take: other numbers, another number of rows, and other lengths and image sizes.

    What a run shows as constant must hold for them too; a model that refuses one is not asked to take it.
    """
    yield shuffled(example, torch.Generator().manual_seed(0))
    yield mapped(example, lambda t: -2 * t if t.is_floating_point() else t)
    yield mapped(example, lambda t: 5 * t + 1 if t.is_floating_point() else t)
    shapes = [t.shape for t in tensors_in(example) if t.ndim]
    for axis in range(max(map(len, shapes), default=0)):
        size = next(shape[axis] for shape in shapes if len(shape) > axis)
        for index in ((*range(size), *range(min(size, 5))), range(size - 1)):
            if len(index):
                yield mapped(example, partial(along, axis=axis, size=size, index=index))


def along(t: Tensor, axis: int, size: int, index: Sequence[int]) -> Tensor:
    """Some rows along an axis, where the tensor has it in this size."""
    fits = t.ndim > axis and t.shape[axis] == size
    return t.index_select(axis, torch.tensor(index, device=t.device)) if fits else t


def mapped(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """A nested value with each tensor in it replaced."""
    if isinstance(value, Tensor):
        return f(value.detach())
    if isinstance(value, dict):
        return {key: mapped(one, f) for key, one in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(mapped(one, f) for one in value)
    return value


def shuffled(example: Any, generator: torch.Generator) -> Any:
    """The example with the elements of each floating tensor in another order: numbers a model has not seen, yet can take."""

    def mixed(t: Tensor) -> Tensor:
        if not t.is_floating_point() or t.numel() < 2:
            return t
        other = t.flatten()[torch.randperm(t.numel(), generator=generator).to(t.device)].view(t.shape)
        return other if not torch.equal(other, t) else other + torch.rand(t.shape, generator=generator).to(t)

    return mapped(example, mixed)


def largest_error(before: list[Tensor], after: list[Tensor]) -> tuple[float, float]:
    """The largest difference relative to the largest output, over its bound, and by itself; inf where shapes differ.

    NaN equals NaN, and an infinity itself. Integers must agree exactly.
    """
    if [t.shape for t in before] != [t.shape for t in after]:
        return float("inf"), float("inf")
    worst = (0.0, 0.0)
    for a, b in zip(before, after, strict=True):
        same = (a == b) | (a.isnan() & b.isnan())
        if bool(same.all()):
            continue
        if not a.is_floating_point():
            return float("inf"), float("inf")
        finite = a[a.isfinite()].abs()
        size = float(finite.max()) if finite.numel() else 0.0
        gap = float((a.double() - b.double()).abs()[~same].max())
        error = gap / size if size > 0 and gap == gap else float("inf")
        worst = max(worst, (error / BOUNDS.get(a.dtype, 1e-5), error))
    return worst


class Proof:
    """What a model says before an edit, on the example and on the other inputs that it takes."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = model
        try:
            self.truth = [(example, answers(model, example))]
        except GoodfitError:
            raise
        except Exception as problem:
            raise must_run(model, problem) from problem
        for other in variants(example):
            with suppress(Exception):  # a model may well refuse it
                self.truth.append((other, answers(model, other)))

    def gap(self) -> tuple[float, float]:
        """How far the model is from it now: the largest error over its bound, and by itself."""
        return max(largest_error(known, answers(self.model, test)) for test, known in self.truth)
