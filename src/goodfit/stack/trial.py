"""Whether models give as one what each of them gives alone."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from goodfit.noise import Clock, Noisy
from goodfit.stack.forward import Forward
from goodfit.stack.kinds import kind_of
from goodfit.stack.members import Members
from goodfit.surgery.running import call_model, quiet

__all__ = ["differs"]

_TRAINED = 32


@torch.no_grad()
def differs(members: Members, x: Any) -> str:
    """Why these models cannot be computed as one on inputs like x, "" where they can.

    All are compared in eval mode, and up to so many in train mode, buffers included.
    """
    hooked = _gradient_hooks(members.models[0])
    if hooked:
        return hooked
    trial = Forward(members, Clock())  # a model may count how often it runs
    kept = {name: t.clone() for name, t in members.buffers.items()}
    weights = {name: t.detach().clone() for name, t in members.weights.items()}
    try:
        _stir(members)
        together = trial(x, False, False)
        for i, model in enumerate(members.models):
            with quiet(model):
                _compare(together, call_model(model, x), i)
        together = trial(x, False, True)
        after = {name: t.clone() for name, t in members.buffers.items()}
        for name, before in kept.items():
            members.buffers[name].copy_(before)
        for i in range(0, members.count, max(1, members.count // _TRAINED)):
            alone, again = (_trained(members.models[i], x) for _ in range(2))
            if _same(alone[0], again[0]):  # else it draws by torch's generator
                _compare(together, alone[0], i)
                _compare({n: after[n] for n in alone[1]}, alone[1], i)
    except Exception as wrong:
        return (str(wrong).strip().splitlines() or [type(wrong).__name__])[0]
    finally:
        for name, before in kept.items():
            members.buffers[name].copy_(before)
        for name, before in weights.items():
            members.weights[name].copy_(before)
    return ""


def _stir(members: Members) -> None:
    """Move all weights a little: behind a last layer of zeros nothing would show."""
    draws = torch.Generator().manual_seed(0)
    for w in members.weights.values():
        w.add_(torch.rand(w.shape, generator=draws).to(w) / 16)


def _trained(model: nn.Module, x: Any) -> tuple[Any, dict[str, Tensor]]:
    """What a copy of a model gives in train mode, and what becomes of its buffers."""
    copied = deepcopy(model)
    for module in copied.modules():
        if isinstance(module, Noisy):
            module.clock = Clock()
            module.forget()
    before = kind_of(copied.train())
    outputs = call_model(copied, x)
    if kind_of(copied) != before:
        raise ValueError("in train mode they change what is no tensor")
    return outputs, dict(copied.named_buffers())


def _compare(together: Any, alone: Any, i: int) -> None:
    for one, other in zip(tree_flatten(together)[0], tree_flatten(alone)[0], strict=True):
        short = one.dtype not in (torch.float64, torch.int64)
        near = (1e-3, 1e-4) if short else (1e-9, 1e-9)
        if not torch.allclose(one[i].double(), other.double(), rtol=near[0], atol=near[1], equal_nan=True):
            raise ValueError("together they give other numbers than alone")


def _same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tree_flatten(one)[0], tree_flatten(other)[0], strict=True))


def _gradient_hooks(model: nn.Module) -> str:
    """Hooks on gradients would meet those of all members at once."""
    for name, p in model.named_parameters():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            return f"{name} has a hook on its gradient"
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            return f"{name or 'the model'} has a hook on gradients"
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return f"the padding of {name} would be trained under vmap"
    return ""
