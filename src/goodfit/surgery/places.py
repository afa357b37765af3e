"""Where a model takes dropout: behind activations whose output comes to a later layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from goodfit.surgery.insert import insert_after, insert_before
from goodfit.surgery.trace import Call

__all__ = ["Place", "channel_axis", "places"]

Insert = Callable[[nn.Module, str, nn.Module], Any]


@dataclass
class Place:
    """A module behind or before which a layer may hang, and what flows there.

    functions: the activations that it follows. taken: whether dropout stands there already. normed: whether a norm follows.
    """

    name: str
    host: nn.Module
    insert: Insert
    value: Tensor
    call: Call
    functions: set[str] = field(default_factory=set)
    taken: bool = False
    normed: bool = False


def places(calls: list[Call], before_norm: bool) -> list[Place]:
    """In the order of the forward run.

    A place is an activation module; for an activation that is a function or a gate, the layers that it reaches. None is on
    the way to a norm unless `before_norm`, and none behind the last layer.
    """
    ends = {id(c): _ends(c, before_norm) for c in calls if c.kind == "activation"}
    activations = [c for c in calls if c.kind == "activation"]
    usable = [c for c in activations if ends[id(c)] and (before_norm or not c.reached("norm"))]
    unfit = {id(c.module) for c in activations if c not in usable or c.gate}
    hosted = [c for c in usable if c.module is not None and id(c.module) not in unfit]
    found: dict[str, Place] = {}
    for c in hosted:
        _add(found, c, insert_after, c.output, c)
    covered = {id(k.module) for c in hosted for k in ends[id(c)]}
    reached = [k for c in usable if c not in hosted for k in ends[id(c)]]
    covered |= {id(c.module) for c in calls if c.kind in ("kernel", "norm") and c not in reached}
    for c in (c for c in usable if c not in hosted):
        for layer in ends[id(c)]:
            attends = isinstance(layer.module, nn.MultiheadAttention)  # its query alone would be dropped
            if id(layer.module) not in covered and not attends:
                _add(found, layer, insert_before, layer.source, c)
    order = {id(c): i for i, c in enumerate(calls)}
    return sorted(found.values(), key=lambda place: order[id(place.call)])


def _ends(activation: Call, before_norm: bool) -> list[Call]:
    norms = activation.reached("norm") if before_norm else []
    return activation.reached("kernel") + [c for c in norms if c.goes_on()]


def _add(found: dict[str, Place], at: Call, insert: Insert, value: Any, activation: Call) -> None:
    if at.module is None or not isinstance(value, Tensor):
        return
    place = found.setdefault(at.name, Place(at.name, at.module, insert, value, at))
    place.functions.add(activation.function)
    place.taken |= bool(activation.reached("dropout"))
    place.normed |= bool(activation.reached("norm"))


def channel_axis(place: Place, calls: list[Call]) -> int | str:
    """The axis of the channels of a batch that flows at a place, 1 or -1; else why it cannot be told.

    Layers whose very output comes to the place say it, or that take the place's very output; else those around it, where
    they agree and no two axes could be confused.
    """
    value, call = place.value, place.call
    heads = place.insert is insert_before
    before = _chain(call, lambda c: [f for f in calls if c in f.feeds])
    behind = [call] if heads else _chain(call, lambda c: c.feeds)
    straight = [axis for axis in (_axis(c, value) for c in (*before, *behind)) if axis is not None]
    if straight:
        return straight[0]
    near = [c for c in calls if call in c.reaches and c.output.shape == value.shape]
    near += [] if heads else [c for c in call.reaches if isinstance(c.source, Tensor) and c.source.shape == value.shape]
    around = {axis for axis in (_axis(c, value) for c in near) if axis is not None}
    if value.ndim == 2 and around <= {-1}:
        return -1
    confused = value.ndim < 3 or value.shape[1] == value.shape[-1]
    return around.pop() if len(around) == 1 and not confused else "no layer beside it says which axis has the channels"


def _chain(call: Call, following: Callable[[Call], list[Call]]) -> Iterator[Call]:
    """Layers along very outputs, the nearest first, through activations and norms, which keep the layout."""
    known = following(call)
    for one in known:  # grows as it is walked
        yield one
        if one.kind != "kernel":
            known += [c for c in following(one) if c not in known]


def _axis(call: Call, value: Tensor) -> int | str | None:
    """What the type of a layer says of the channels of `value`, which it takes or returns."""
    module = call.module
    if isinstance(module, _ConvNd):
        return 1 if value.ndim == len(module.kernel_size) + 2 else f"{call.name} runs without a batch axis"
    if isinstance(module, _BatchNorm | nn.GroupNorm):
        return 1
    features_last = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
    if isinstance(module, features_last) or type(module) in (nn.LayerNorm, nn.RMSNorm):
        return -1 if value.ndim > 1 else f"{call.name} runs without a batch axis"
    return -1 if module is not None and call.kind == "kernel" and _mixes_last(call, module) else None


def _mixes_last(call: Call, module: nn.Module) -> bool:
    """Whether a layer that torch does not define is a matrix between two last axes of different lengths."""
    if not isinstance(call.source, Tensor) or call.source.ndim < 2:
        return False
    before, behind = call.source.shape, call.output.shape
    matrices = [set(p.shape) for p in module.parameters(recurse=False) if p.ndim == 2]
    return before[:-1] == behind[:-1] and before[-1] != behind[-1] and {before[-1], behind[-1]} in matrices
