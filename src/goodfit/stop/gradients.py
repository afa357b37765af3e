"""Whether the gradients of the training data still say something, or are noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.batchnorms.batches import device_of
from goodfit.batchnorms.moments import Moments
from goodfit.errors import GoodfitError
from goodfit.processes import gathered, world
from goodfit.rows import rows_of, to_device
from goodfit.surgery.running import call_model, evaluating

__all__ = ["evidence"]


def evidence(model: nn.Module, loss: Callable[[Any, Tensor], Tensor], batches: Iterable[Any]) -> float:
    """How likely the gradients are under pure noise, for `gf.stop.Evidence`: above 0 they say nothing any more.

    Formula: 1 − (1/D) · Σ_k g_k² / Var(g_k), over the D trainable weights whose gradients differ between batches. g is the
        gradient of the mean loss over all N rows; Var(g) = Σ_b n_b · (g_b − g)² / ((B − 1) · N), from the gradients g_b of B
        batches of n_b rows.
    Shapes: batches is a DataLoader or a list of (x, y); loss is f(outputs, y) → mean over the rows. One pass, in eval mode.
    Numbers: the result is at most 1, and on average just below 0 where the true gradient is zero.
    Errors: fewer than two batches; gradients that do not differ between batches at all.
    Source: Mahsereci, Balles, Lassner and Hennig 2017, Early stopping without a validation set, arXiv 1703.09580.

    `.grad`, modes, buffers and torch's random generator stay as they are; what a dataset draws elsewhere is its own. Where
    several processes train together, each gives its share of the data, and all get the evidence of the whole.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> x, y = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [-1.0]])
    >>> batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    >>> _ = nn.init.zeros_(model.weight)
    >>> evidence(model, nn.functional.mse_loss, batches)
    1.0
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise GoodfitError(f"{type(model).__name__} has no trainable parameter, so no gradient; unfreeze some.")
    moments, seen = [Moments(w.flatten()) for w in weights], 0
    with _as_in_prediction(model):
        for batch in batches:
            x, y = to_device(batch, device_of(model))
            grads = torch.autograd.grad(loss(call_model(model, x), y), weights, allow_unused=True, materialize_grads=True)
            for one, grad in zip(moments, grads, strict=True):
                one.add(float(rows_of(y) or 1), grad.flatten().double(), torch.zeros_like(one.mean))
            seen += 1
    if world() > 1:
        for one in moments:
            one.over_processes()
        seen = int(gathered(torch.tensor([float(seen)])).sum())
    if seen < 2:
        raise GoodfitError(
            f"evidence needs the spread of gradients over two batches or more, got {seen}; give smaller batches."
        )
    total, counted = 0.0, 0
    for one in moments:
        varies = one.squares != 0
        variance = one.squares[varies] / ((seen - 1) * one.count)
        total += float((one.mean[varies].square() / variance).sum())
        counted += int(varies.sum())
    if not counted:
        raise GoodfitError("evidence needs gradients that differ between batches, got the same from all; give other batches.")
    return 1 - total / counted


@contextmanager
def _as_in_prediction(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients; torch's random numbers go on afterwards as if nothing had been drawn."""
    home = device_of(model)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[home] if home.type == "cuda" else []))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if home.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # it has no gradient in eval mode
        yield
