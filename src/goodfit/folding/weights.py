"""Put scales and shifts into weights and biases, in float64 and rounded once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.axes import oriented
from goodfit.folding.chains import Pair
from goodfit.surgery.insert import take_out
from goodfit.tensors import put

__all__ = ["fold_into"]


def fold_into(model: nn.Module, pairs: Iterable[Pair]) -> None:
    """Fold pairs into the layers of a model, and put what is left in the place of the norms."""
    pairs = list(pairs)
    values: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for pair in pairs:
        values[pair.layer] = _folded(pair, *values.get(pair.layer, _numbers(pair.layer)))
    for layer, (weight, bias) in values.items():
        _put(layer, weight, bias)
    for pair in pairs:
        pair.rest.training = pair.norm.training
        for parent in list(model.modules()):
            for name in [n for n, child in parent._modules.items() if child is pair.norm]:
                if not take_out(parent, name):
                    parent._modules[name] = pair.rest


def _put(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    own: dict[str, nn.Parameter | None] = layer._parameters
    for name, value in (("weight", weight), ("bias", bias)):
        old, template = own[name], own["weight"]
        if old is not None:
            put(old, value)
        elif bool(value.any()) and template is not None:
            with torch.inference_mode(False):  # else it could not be trained
                made = value.to(template.device, template.dtype, copy=True)
                layer.register_parameter(name, nn.Parameter(made, requires_grad=template.requires_grad))


def _numbers(layer: Any) -> tuple[Tensor, Tensor]:
    weight, bias = layer.weight.detach().double().cpu(), layer.bias
    return weight, torch.zeros(0, dtype=torch.float64) if bias is None else bias.detach().double().cpu()


def _folded(pair: Pair, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and bias of a layer with scale and shift of its rows or columns."""
    weight = weight.clone(memory_format=torch.contiguous_format)
    view = oriented(weight, pair.groups, pair.transposed)
    groups, rows, columns = view.shape[:3]
    tail = [1] * (view.ndim - 3)
    bias = bias if bias.numel() else torch.zeros(groups * rows, dtype=torch.float64)
    if pair.before:
        view *= pair.scale.view(groups, rows, 1, *tail)
        return weight, bias * pair.scale + pair.shift
    gain = view.flatten(3).sum(3) if tail else view
    bias = bias + (gain * pair.shift.view(groups, 1, columns)).sum(2).flatten()
    view *= pair.scale.view(groups, 1, columns, *tail)
    return weight, bias
