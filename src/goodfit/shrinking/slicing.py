"""Cut slices out of a model's parameters, after their constants went elsewhere."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from goodfit.axes import oriented
from goodfit.dataflow.atoms import FIXED, Axis
from goodfit.dataflow.flows import Reader
from goodfit.shrinking.attention import lower_numbers, narrow
from goodfit.shrinking.choice import Choice

__all__ = ["bias_of", "cut", "owner"]


def owner(model: nn.Module, name: str) -> tuple[Any, str]:
    """The module that has a parameter or buffer, and its name there."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def bias_of(name: str) -> str:
    """The name of the bias beside a weight."""
    path, dot, attribute = name.rpartition(".")
    return path + dot + attribute.replace("weight", "bias")


def cut(model: nn.Module, choice: Choice) -> None:
    """Edit the model: merge and fold the constants, cut the slices, lower the numbers that modules keep of their sizes."""
    changed = _with_merges(model, choice)
    axes: dict[str, list[Axis]] = defaultdict(list)
    for name, (added, rows) in _folded(choice).items():
        module, attribute = owner(model, name)
        bias = getattr(module, attribute)
        if bias is None:
            axes[name].append(Axis(name, 0, rows.first, rows.size))
            bias = module.weight.new_zeros(rows.size)
        changed[name] = bias.detach().double() + added.to(bias.device)
    for axis in choice.run.slices.axes:
        if not bool(choice.stays(axis).all()):
            axes[axis.name].append(axis)
    for axis in choice.run.slices.axes:
        if axis.groups > 1 and axis.name in axes and axis not in axes[axis.name]:
            axes[axis.name].append(axis)
    touched: dict[nn.Module, None] = {}
    for name in dict.fromkeys([*changed, *axes]):
        module, attribute = owner(model, name)
        old = getattr(module, attribute)
        template = module.weight if old is None else old
        value = changed[name] if name in changed else template.detach()
        value = _sliced(module, value, axes.get(name, []), choice).to(template.dtype)
        _set(module, attribute, value, template)
        touched[module] = None
    for module in touched:
        _tell_sizes(module)
    lower_numbers(list(choice.run.rectangles.values()), choice)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.out_proj in touched:
            _tell_sizes(module.out_proj)
            if module.out_proj.in_features < module.num_heads * module.head_dim:
                narrow(module)


def _folded(choice: Choice) -> dict[str, tuple[Tensor, Axis]]:
    """What biases gain: the products of the weights with the constants that go, and the rows that have these biases."""
    gains: dict[str, tuple[Tensor, Axis]] = {}
    for reader in choice.run.readers:
        which = choice.gone(reader.columns) & choice.foldable(reader) & (reader.value != 0) if reader.live else None
        if which is None or not reader.name or not which.any() or not (which & choice.needed(reader)).any():
            continue
        axis = _axis_of(choice, reader.rows)
        gain, _ = gains.setdefault(bias_of(reader.name), (torch.zeros(axis.size, dtype=torch.float64), axis))
        gain[reader.rows - axis.first] += _constant_part(reader, which)
    return gains


def _constant_part(reader: Reader, which: Tensor) -> Tensor:
    if reader.groups == 1:
        weight = reader.weight.detach()[:, which.to(reader.weight.device)].double().cpu()
        return (weight.flatten(2).sum(2) if weight.ndim > 2 else weight) @ reader.value[which]
    weight = reader.grouped(reader.weight.detach().double().cpu().flatten(2).sum(2))
    shape = (reader.groups, 1, -1)
    return torch.where(which.view(shape), weight * reader.value.view(shape), 0.0).sum(2).flatten()


def _axis_of(choice: Choice, ids: Tensor) -> Axis:
    axes = choice.run.slices.axes
    if int(ids.max()) == FIXED:
        return Axis("", 0, FIXED, 1)
    return axes[bisect_right([a.first for a in axes], int(ids.max())) - 1]


def _with_merges(model: nn.Module, choice: Choice) -> dict[str, Tensor]:
    """Weights in which the column of one constant channel has taken over those of others."""
    changed: dict[str, Tensor] = {}
    for reader, column, host, ratio in choice.merges():
        module, attribute = owner(model, reader.name)
        stored = getattr(module, attribute)
        weight = changed.setdefault(reader.name, stored.detach().double().clone())
        view = oriented(weight, reader.groups, isinstance(module, _ConvTransposeNd))
        width = view.shape[2]
        group = column // width
        view[group, :, host % width] += view[group, :, column % width] * ratio
    return changed


def _sliced(module: Any, value: Tensor, axes: list[Axis], choice: Choice) -> Tensor:
    grouped = next((a for a in axes if a.groups > 1), None)
    if grouped is not None:
        outer = next((choice.stays(a) for a in axes if a.axis == 0), torch.ones(len(value), dtype=torch.bool))
        parts = zip(
            value.reshape(grouped.groups, -1, *value.shape[1:]), outer.view(grouped.groups, -1),
            choice.stays(grouped).view(grouped.groups, -1), strict=True,
        )  # fmt: skip
        left = [part[rows.to(part.device)][:, columns.to(part.device)] for part, rows, columns in parts if rows.any()]
        module.groups = len(left)
        return torch.cat(left)
    for axis in axes:
        index = choice.stays(axis).nonzero().flatten().to(value.device)
        value = value.index_select(axis.axis, index)
    return value


def _set(module: nn.Module, attribute: str, value: Tensor, template: Tensor) -> None:
    for layout in (torch.channels_last, torch.channels_last_3d):
        fits = template.ndim == value.ndim == (4 if layout is torch.channels_last else 5)
        if fits and not template.is_contiguous() and template.is_contiguous(memory_format=layout):
            value = value.contiguous(memory_format=layout)
    if attribute in module._buffers:
        module._buffers[attribute] = value
        return
    new = nn.Parameter(value, requires_grad=template.requires_grad)
    if getattr(module, attribute) is template:
        new.__dict__.update(template.__dict__)
    module._parameters[attribute] = new


def _tell_sizes(module: Any) -> None:
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _ConvNd):
        outer, inner = weight.shape[0], weight.shape[1] * module.groups
        module.out_channels, module.in_channels = (inner, outer) if module.transposed else (outer, inner)
    elif isinstance(module, _NormBase):
        module.num_features = next(len(t) for t in _vectors(module))
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        module.input_size = next(module.parameters(recurse=False)).shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif hasattr(module, "nf") and hasattr(module, "nx"):
        module.nx, module.nf = weight.shape


def _vectors(module: nn.Module) -> Iterator[Tensor]:
    return (t for t in [*module._parameters.values(), *module._buffers.values()] if t is not None and t.ndim == 1)
