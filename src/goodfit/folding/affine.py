"""What a batch norm does in eval mode: scale · x + shift, channel by channel."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from goodfit.layers.synchronized import SyncBatchNorm
from goodfit.surgery.insert import inserted_into, user_hooks

__all__ = ["Affine", "affine", "batch_norms"]

_PLAIN = {_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward}
_NOT_ONE = "does not act as scale · x + shift of its running statistics"


@dataclass(frozen=True, eq=False)
class Affine:
    """scale · x + shift in float64, and the layer that takes the place of the norm when both have gone elsewhere."""

    scale: Tensor
    shift: Tensor
    rest: nn.Module


def batch_norms(model: nn.Module) -> dict[nn.Module, str]:
    """The batch norms of a model with their names: torch's, and what keeps the same running statistics."""
    statistics = ("running_mean", "running_var")
    return {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) or all(module._buffers.get(n) is not None for n in statistics)
    }


def affine(norm: Any, x: Tensor) -> Affine | str:
    """What a batch norm does to inputs like x; or why that cannot be said."""
    mean, var = norm._buffers.get("running_mean"), norm._buffers.get("running_var")
    if mean is None or var is None:
        return "normalizes by its batch in eval too"
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    own = {**norm._parameters, **norm._buffers}
    if own.get("weight") is not weight or own.get("bias") is not bias:
        return "has a weight that is computed"
    if user_hooks(norm) or inserted_into(norm):
        return "has hooks"
    scale = (_double(var) + getattr(norm, "eps", 1e-5)).rsqrt()
    scale = scale if weight is None else scale * _double(weight)
    shift = -_double(mean) * scale
    shift = shift if bias is None else shift + _double(bias)
    if not (scale.isfinite().all() and shift.isfinite().all()):
        return "has statistics or weights that are not finite"
    if type(norm).forward in _PLAIN and "forward" not in vars(norm) and not any(norm.children()):
        return Affine(scale, shift, nn.Identity())
    try:
        return _tried(norm, scale, shift, x)
    except Exception:
        return _NOT_ONE


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()


def _tried(norm: nn.Module, scale: Tensor, shift: Tensor, x: Tensor) -> Affine | str:
    """A class with a forward of its own is run: alone, and with the layers that it calls behind the norm."""
    twin = copy.deepcopy(norm).double().cpu().eval()
    rest: OrderedDict[str, nn.Module] = OrderedDict(twin.named_children())
    shape = [1, -1] + [1] * (x.ndim - 2)
    z = torch.randn((2, *x.shape[1:]), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = z * scale.view(shape) + shift.view(shape)
    if not _same(twin, nn.Sequential(rest), z, expected):
        return _NOT_ONE
    for name in rest:
        twin.add_module(name, nn.Identity())
    if not _same(twin, nn.Identity(), z, expected):
        return _NOT_ONE
    return Affine(scale, shift, nn.Sequential(OrderedDict(norm.named_children())) if rest else nn.Identity())


def _same(whole: nn.Module, rest: Callable[[Tensor], Tensor], z: Tensor, expected: Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(whole(z.clone()), rest(expected.clone()), rtol=1e-10, atol=1e-10)
