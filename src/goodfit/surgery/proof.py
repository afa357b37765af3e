"""Whether two models say the same: their outputs on the same inputs, compared number by number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.dataflow.flows import tensors_in
from goodfit.surgery.trace import call_model, evaluating

__all__ = ["BOUNDS", "answers", "largest_error", "quiet", "shuffled"]

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and a random generator that starts the same each time and is put back."""
    cuda = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=sorted(cuda)))
        torch.manual_seed(0)
        yield


def answers(model: nn.Module, example: Any) -> list[Tensor]:
    """Copies of all output tensors, in order."""
    with quiet(model):
        return [t.detach().clone() for t in tensors_in(call_model(model, example))]


def shuffled(value: Any, generator: torch.Generator) -> Any:
    """The example with the elements of each floating tensor in another order: numbers a model has not seen, yet can take."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.numel() < 2:
            return value
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        mixed = value.detach().flatten()[order].view(value.shape)
        return mixed if not torch.equal(mixed, value) else mixed + torch.rand(value.shape, generator=generator).to(value)
    if isinstance(value, dict):
        return {key: shuffled(one, generator) for key, one in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(shuffled(one, generator) for one in value)
    return value


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
