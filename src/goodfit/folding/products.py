"""The layers of a run whose weights can take up a scale and a shift: those that are read by one product alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.dataflow.flows import storage
from goodfit.folding.record import Operation, Record, span
from goodfit.surgery.insert import user_hooks
from goodfit.surgery.proof import BOUNDS

__all__ = ["Layer", "layers", "unique"]


@dataclass(eq=False)
class Layer:
    """One product with the weight of a module. Rows of it are channels of the output, columns channels of the input."""

    module: Any
    x: Tensor
    out: Tensor
    columns: int  # the axis of x
    rows: int  # the axis of out
    product: Operation
    last: Operation  # the product, or the addition of the bias behind it
    groups: int = 1
    transposed: bool = False
    padded: bool = False  # the border sees zeros, or fewer columns: a constant does not stay one
    reason: str = ""  # why its weights must stay


def layers(model: nn.Module, run: Record) -> list[Layer]:
    """All of a run."""
    several = _tied(model)
    found = []
    for operation in run.operations:
        layer = _layer(operation)
        if layer is not None:
            layer.reason = _bias_followed(layer, run) or _reason(layer, run, several)
            found.append(layer)
    return found


def _tied(model: nn.Module) -> set[int]:
    """The memory of parameters and buffers that more than one module has, or one module twice."""
    holders: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.numel():
                holders[tensor.data_ptr()] += 1
    return {place for place, count in holders.items() if count > 1}


def _layer(operation: Operation) -> Layer | None:
    call = operation.call
    given, out = call.args, next(iter(call.outputs), None)
    if out is None:
        return None
    if call.name == "convolution":
        padded = given["transposed"] or any(given["padding"])
        module = _owner(operation, given["weight"])
        numbers = {"groups": given["groups"], "transposed": given["transposed"], "padded": padded}
        return module and Layer(module, given["input"], out, 1, 1, operation, operation, **numbers)
    if call.name in ("addmm", "mm") and given.get("alpha", 1) == given.get("beta", 1) == 1:
        x, weight = (given["mat1"], given["mat2"]) if call.name == "addmm" else (given["self"], given["mat2"])
        module = _owner(operation, weight.t())
        return module and Layer(module, x, out, 1, 1, operation, operation)
    if call.name == "linear":
        module = _owner(operation, given["weight"])
        return module and Layer(module, given["input"], out, given["input"].ndim - 1, out.ndim - 1, operation, operation)
    return None


def _owner(operation: Operation, weight: Tensor) -> Any:
    """The running module that has this very weight."""
    for module in reversed(operation.modules):
        own = module._parameters.get("weight")
        if own is not None and _same_place(own, weight):
            return module if _layout(own) == _layout(weight) else None
    return None


def _layout(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return tensor.shape, tensor.stride()


def _same_place(one: Tensor, other: Tensor) -> bool:
    return storage(one) == storage(other) and span(one) == span(other)


def _bias_followed(layer: Layer, run: Record) -> str:
    """A product of more than two axes adds its bias in a second step: then that is the output."""
    bias = layer.module._parameters.get("bias")
    if bias is None or any(_same_place(bias, t) for t in layer.product.call.inputs):
        return ""
    after = run.reading(layer.out)
    add = after[0] if len(after) == 1 else None
    added = add is not None and add.call.name == "add" and add.call.args["alpha"] == 1 and layer.module in add.modules
    if add is None or not added or layer.product.call.name == "convolution":
        return "its bias is not added to its product"
    layer.last, layer.out = add, add.call.outputs[0]
    layer.rows = layer.out.ndim - 1
    return ""


def _reason(layer: Layer, run: Record, several: set[int]) -> str:
    module = layer.module
    weight, bias = module.weight, module._parameters.get("bias")
    if {t.data_ptr() for t in (weight, bias) if t is not None} & several:
        return "its weight is tied to another one"
    if user_hooks(module):
        return "it has hooks"
    if weight.dtype not in BOUNDS:
        return f"its weight is {weight.dtype}"
    if run.reading(weight) != [layer.product]:
        return f"its weight is read {len(run.reading(weight))} times in a run"
    if bias is not None and run.reading(bias) != [layer.last]:
        return f"its bias is read {len(run.reading(bias))} times in a run"
    given: Any = layer.product.call.args.get("bias")
    if bias is None and ("bias" not in module._parameters or given is not None or layer.product.call.name == "addmm"):
        return "its bias is not a parameter of its own"
    return ""


def unique(outer: Tensor, outer_axis: int, inner: Tensor, inner_axis: int, forward: bool) -> Tensor | None:
    """How the channels of a tensor and of a view of it belong together, told by where their elements lie.

    `forward`: for each channel of the view that of the tensor, else the other way, -1 for none. None where one has several.
    """
    if storage(outer) != storage(inner) or outer.dtype != inner.dtype or not inner.numel():
        return None
    if outer_axis == inner_axis and _same_place(outer, inner) and _layout(outer) == _layout(inner):
        return torch.arange(outer.shape[outer_axis])
    length = outer.untyped_storage().nbytes() // outer.element_size()
    labels = torch.full((length,), -1)
    labels.as_strided(outer.shape, outer.stride(), outer.storage_offset()).copy_(_along(outer.shape, outer_axis))
    at = labels.as_strided(inner.shape, inner.stride(), inner.storage_offset()).flatten()
    own = _along(inner.shape, inner_axis).expand(inner.shape).flatten()
    keys, values, size = (own, at, inner.shape[inner_axis]) if forward else (at, own, outer.shape[outer_axis])
    if bool((at < 0).any()):
        return None
    low = torch.full((size,), length).scatter_reduce(0, keys, values, "amin")
    high = torch.full((size,), -1).scatter_reduce(0, keys, values, "amax")
    return high if bool(((low == high) | (high < 0)).all()) else None


def _along(shape: torch.Size, axis: int) -> Tensor:
    return torch.arange(shape[axis]).view([-1 if d == axis else 1 for d in range(len(shape))])
