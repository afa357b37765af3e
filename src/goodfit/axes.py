"""Where a layer's weight has its output units, its inputs and its heads: ids along axes, by the type of the layer.

Each function returns ids that broadcast to the weight. Parts of one owner with the same label share their numbering.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = ["head_ids", "input_ids", "oriented", "unit_ids"]


def unit_ids(weight: Tensor, owner: nn.Module | None, local: str) -> tuple[str, Tensor]:
    """The output unit or filter of each number; for a recurrent layer the hidden unit, across its gates."""
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase) and local.startswith(("weight_ih", "weight_hh")):
        return local[len("weight_ih") :] or "cell", _along(weight, 0) % owner.hidden_size
    if isinstance(owner, _ConvTransposeNd):
        return "", _grouped(weight, owner.groups)
    return "", _along(weight, 1 if _is_transposed(owner, weight) else 0)


def input_ids(weight: Tensor, owner: nn.Module | None, local: str) -> tuple[str, Tensor]:
    """The input feature or channel that each number multiplies."""
    if isinstance(owner, _ConvNd) and not isinstance(owner, _ConvTransposeNd):
        return "", _grouped(weight, owner.groups)
    first = isinstance(owner, _ConvTransposeNd) or _is_transposed(owner, weight) or weight.ndim < 2
    return "", _along(weight, 0 if first else 1)


def head_ids(weight: Tensor, owner: nn.Module | None, local: str) -> Tensor | None:
    """The head of each number of an nn.MultiheadAttention: rows of its projections in, columns of the one out."""
    if not isinstance(owner, nn.MultiheadAttention):
        return None
    if local == "out_proj.weight":
        return _along(weight, 1) // owner.head_dim
    return _along(weight, 0) % owner.embed_dim // owner.head_dim if local.endswith("proj_weight") else None


def oriented(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """A convolution's stored weight, seen as (group, row, column, kernel...)."""
    grouped = weight.view(groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2) if transposed else grouped


def _is_transposed(owner: nn.Module | None, weight: Tensor) -> bool:
    """Whether a layer of Transformers keeps its matrix as (inputs, units), as GPT-2 does."""
    return type(owner).__name__ == "Conv1D" and getattr(owner, "nf", None) == weight.shape[-1]


def _along(weight: Tensor, axis: int) -> Tensor:
    axis = min(axis, max(weight.ndim - 1, 0))
    return torch.arange(weight.shape[axis] if weight.ndim else 1).view([-1 if a == axis else 1 for a in range(weight.ndim)])


def _grouped(weight: Tensor, groups: int) -> Tensor:
    """Axis 1 counts within the group that axis 0 tells, for convolutions in groups."""
    within = _along(weight, 1)
    return within if groups == 1 else within + _along(weight, 0) // (weight.shape[0] // groups) * weight.shape[1]
