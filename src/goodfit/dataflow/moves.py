"""Operations that put elements elsewhere: views, concatenations, look-ups, pooling within a channel."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from goodfit.dataflow.atoms import FIXED, compact, varying
from goodfit.dataflow.dependence import Dependence
from goodfit.dataflow.elementwise import combine, same, spread
from goodfit.dataflow.flows import INPUT, Call, tensors_in

__all__ = ["embedding", "glu", "joined", "move", "restrided", "spatial", "unknown"]


def move(run: Dependence, call: Call) -> None:
    """Views, permutations and repetitions: the same operation on the numbers of the slices tells where they go."""
    chosen = not call.func.is_view and call.outputs[0].numel() != call.inputs[0].numel()
    source = run.consume(call.inputs[0]) if chosen else run.of(call.inputs[0])  # picks elements, perhaps repeatedly
    if call.inplace or any(run.of(t).fed for t in call.inputs[1:]):
        return unknown(run, call)
    shape = source.tensor.shape
    taints = [t.bool() for t in _again(call, source.tensor, source.taint.expand(shape))]
    layers: list[list[Tensor]] = [[] for _ in call.outputs]
    for layer in source.layers:
        pieces = [compact(t) for t in _again(call, source.tensor, layer.expand(shape))]
        for found, piece in zip(layers, pieces, strict=True):
            if varying(piece):
                found.append(piece)
            else:
                run.slices.pin(piece, "is picked by its number")
            if len(varying(piece)) > 1:
                run.lay_out(piece.squeeze())
        flat = [p.flatten() for p in pieces]
        if len(flat) > 1 and not torch.equal(flat[0], flat[1]) and len({len(p) for p in flat}) == 1:
            run.lay_out(torch.stack(flat), even=True)
    for out, taint, found in zip(call.outputs, taints, layers, strict=True):
        leaf = "" if chosen and source.leaf != INPUT else source.leaf
        averaging = source.averaging and out.shape[-1:] == shape[-1:]
        run.put(out, source.fed, compact(taint), layers=found, leaf=leaf, averaging=averaging)
    return None


def restrided(run: Dependence, call: Call) -> None:
    """`as_strided` that only says anew how an axis of length 1 is laid out, as pooling does."""
    source, out = call.inputs[0], call.outputs[0]
    laid = [(n, stride) for n, stride in zip(source.shape, source.stride(), strict=True) if n > 1]
    if source.shape == out.shape and laid == [(n, s) for n, s in zip(out.shape, out.stride(), strict=True) if n > 1]:
        return same(run, call)
    return unknown(run, call)


def _again(call: Call, source: Tensor, stand_in: Tensor) -> list[Tensor]:
    if call.name in {"view", "_unsafe_view", "_reshape_alias"}:
        return [stand_in.reshape(call.outputs[0].shape)]
    if call.name == "im2col":  # is not implemented for integers
        stand_in = stand_in.double()
    args = {n: stand_in if a is source else _beside(a) for n, a in call.args.items()}
    return [t.long() if t.is_floating_point() else t for t in tensors_in(call.func(**args))]


def _beside(value: Any) -> Any:
    """An argument where the numbers of slices are: not on an accelerator."""
    if isinstance(value, list | tuple):
        return [_beside(one) for one in value]
    return value.cpu() if isinstance(value, Tensor) else value


def joined(run: Dependence, call: Call) -> None:
    """Concatenation and stacking: along the axis slices stand side by side, along the others they go together."""
    out = call.outputs[0]
    dim = int(call.args["dim"]) % out.ndim
    flows = [run.consume(t) for t in call.inputs if t.ndim == out.ndim or call.name == "stack"]
    taints, layers = [f.taint for f in flows], [f.layers for f in flows]
    if call.name == "stack":
        taints, layers = [t.unsqueeze(dim) for t in taints], [[x.unsqueeze(dim) for x in own] for own in layers]
    lengths = [1 if call.name == "stack" else f.tensor.shape[dim] for f in flows]
    sizes = [[n if d == dim else size for d, size in enumerate(out.shape)] for n in lengths]
    taint = torch.cat([t.expand(size) for t, size in zip(taints, sizes, strict=True)], dim)
    along = any(dim in varying(x) for own in layers for x in own)
    if along:
        filled = [own or [torch.full((1,) * out.ndim, FIXED)] for own in layers]
        for own in filled:
            for extra in own[1:]:
                run.slices.pin(extra, "is concatenated in more than one way")
        found = [compact(torch.cat([own[0].expand(size) for own, size in zip(filled, sizes, strict=True)], dim))]
        if len(varying(found[0])) > 1:
            run.lay_out(found[0].squeeze())
    else:
        beside = [torch.Size([1 if d == dim else n for d, n in enumerate(size)]) for size in sizes]
        found = combine(run, out.ndim, list(zip(beside, layers, strict=True)))
    run.put(out, any(f.fed for f in flows), compact(taint), layers=found)


def spatial(run: Dependence, call: Call) -> None:
    """Pooling, padding and resizing act within a channel."""
    flow = run.consume(call.inputs[0])
    kind = re.search(r"([123])d", call.name)
    width = len(call.args["pad"]) // 2 if kind is None else int(kind[1])
    ndim = flow.tensor.ndim
    dims = range(ndim - width, ndim)
    if kind is None:
        dims = [d for d in dims if flow.tensor.shape[d] != call.outputs[0].shape[d]]  # type: ignore[assignment]
    taint = run.unlevel(flow, dims)
    layers = [rest for layer in flow.layers for rest in run.hold(layer, dims, "is pooled or padded over")]
    for out in call.outputs:
        run.put(out, flow.fed, taint, layers=layers)


def embedding(run: Dependence, call: Call) -> None:
    """Rows looked up by number; a feature that is the same in all rows is a constant."""
    table, index, out = run.consume(call.args["weight"]), run.of(call.args["indices"]), call.outputs[0]
    layers = [rest for x in table.layers for rest in run.hold(x, [0], "is looked up by its number")]
    differs = (table.tensor != table.tensor[:1]).any(0).cpu()
    taint = spread(differs & index.fed, out.ndim)
    run.put(out, index.fed, compact(taint), layers=[spread(x, out.ndim) for x in layers])


def glu(run: Dependence, call: Call) -> None:
    """One half gates the other, so their slices go in pairs."""
    flow, out = run.consume(call.inputs[0]), call.outputs[0]
    dim = int(call.args["dim"]) % out.ndim
    halves = [[x.chunk(2, dim)[i] if x.shape[dim] > 1 else x for x in flow.layers] for i in (0, 1)]
    layers = combine(run, out.ndim, [(out.shape, half) for half in halves])
    value, gate = flow.taint.expand(flow.tensor.shape).chunk(2, dim)
    run.put(out, flow.fed, compact(value | gate), layers=layers)


def unknown(run: Dependence, call: Call) -> None:
    """No rule: nothing that comes in may go, and everything that goes out may depend on the input."""
    flows = [run.consume(t) for t in call.inputs]
    for flow in flows:
        for layer in flow.layers:
            run.slices.pin(layer, f"passes through {call.name}, for which there is no rule")
    fed = any(f.fed for f in flows)
    for out in call.outputs:
        run.put(out, fed, torch.full((1,) * out.ndim, fed))
