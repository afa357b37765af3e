"""Products: with a weight, whose rows make slices and whose columns read them, and of two activations, as in attention."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from goodfit.dataflow.atoms import FIXED, compact, varying
from goodfit.dataflow.dependence import Dependence
from goodfit.dataflow.elementwise import combine, spread
from goodfit.dataflow.flows import INPUT, Call, Flow, Reader
from goodfit.dataflow.moves import unknown

__all__ = ["batched", "convolution", "matrix"]


def matrix(run: Dependence, call: Call) -> None:
    """x · W or W · x, where x is fed by the input."""
    left, right = (run.consume(t) for t in call.inputs[-2:])
    if left.fed == right.fed:
        return batched(run, call)
    x, weight, k = (left, right, 1) if left.fed else (right, left, 0)  # k: the dimension of x that is summed over
    own = [layer for layer in weight.layers if _plain(run, layer)]
    rows = [layer.flatten() for layer in own if k in varying(layer)]
    columns = [layer.flatten() for layer in own if k not in varying(layer)]
    reading = [layer.flatten() for layer in x.layers if varying(layer) == {k}]
    passing = [rest for layer in x.layers if varying(layer) != {k} for rest in run.hold(layer, [k], _PARTS)]
    oriented = weight.tensor.t() if left.fed else weight.tensor
    reader = _read(run, weight.leaf, x, k, oriented, (rows, columns, reading), groups=1, padded=False)
    shape = [len(reader.rows) if dim == k else 1 for dim in (0, 1)]
    _biased(run, call, x.fed, _stained(x, k, reader).view(shape), passing + [layer for layer in own if k in varying(layer)])
    return None


_PARTS = "meets a weight that several parts share"


def convolution(run: Dependence, call: Call) -> None:
    """Convolutions of all ranks: grouped, depthwise and transposed."""
    x, weight, ndim = run.consume(call.args["input"]), run.consume(call.args["weight"]), call.outputs[0].ndim
    if weight.fed or not x.fed:
        return unknown(run, call)
    groups, transposed, w = int(call.args["groups"]), bool(call.args["transposed"]), weight.tensor
    # what varies within a channel too, as after a pixel shuffle, goes with its channel
    within = [rest for layer in x.layers if 0 not in varying(layer) for rest in run.hold(layer, range(2, ndim), _PARTS)]
    reading = [layer.flatten() for layer in within]
    passing = [rest for layer in x.layers if 0 in varying(layer) for rest in run.hold(layer, range(1, ndim), _PARTS)]
    own = [layer for layer in weight.layers if _plain(run, layer)]
    stored, inner = ([layer.flatten() for layer in own if varying(layer) == {axis}] for axis in (0, 1))
    if groups > 1:
        total = x.tensor.shape[1] if not transposed else call.outputs[0].shape[1]
        inner = [run.slices.new(weight.leaf, 1, total, groups)] if weight.leaf and stored else []
    if transposed:
        w = w.reshape(groups, -1, *w.shape[1:]).transpose(1, 2).flatten(0, 1)
    rows, columns = (inner, stored) if transposed else (stored, inner)
    if groups > 1 and rows and columns and w.shape[1] == 1:
        run.slices.tie(rows[0].view(groups, -1), columns[0].view(groups, 1))
    padded = transposed or any(call.args["padding"])
    reader = _read(run, weight.leaf, x, 1, w, (rows, columns, reading), groups, padded)
    made = [layer.view((-1,) + (1,) * (ndim - 2)).unsqueeze(0) for layer in rows]
    _biased(run, call, x.fed, _stained(x, 1, reader).view((1, -1) + (1,) * (ndim - 2)), passing + made)
    return None


def _plain(run: Dependence, layer: Tensor) -> bool:
    if len(varying(layer)) > 1:
        run.slices.pin(layer, "is part of a weight that is computed")
    return len(varying(layer)) == 1


def _read(
    run: Dependence, name: str, x: Flow, dim: int, weight: Tensor, ids: tuple[list[Tensor], ...], groups: int, padded: bool
) -> Reader:
    """Note what a product reads; the columns of its weight go with what they read."""
    rows, columns, reading = ids
    raw = not reading and x.leaf == INPUT
    if columns and reading:
        for one in reading:
            run.slices.tie(columns[0], one)
    elif columns:
        run.slices.pin(columns[0], "reads an input whose size is fixed")
    for one in reading if not columns else []:
        run.slices.pin(one, "meets a weight whose size is fixed")
    wide = [rows[0] if rows else torch.full(weight.shape[:1], FIXED)]
    wide.append((columns or reading or [torch.full(x.tensor.shape[dim : dim + 1], FIXED)])[0])
    constant, value = _constants(x, dim)
    reader = Reader(name, wide[0], wide[1], weight, groups, constant, value, padded, raw, len(run.events) - 1)
    run.readers.append(reader)
    return reader


def _constants(x: Flow, dim: int) -> tuple[Tensor, Tensor]:
    """Which channels are the same everywhere whatever the input is, up to rounding, and their values."""
    others = [d for d in range(x.tensor.ndim) if d != dim]
    length = x.tensor.shape[dim]
    free = ~_any(x.taint, others).flatten().expand(length)
    if not free.any():
        return free, torch.zeros(length, dtype=torch.float64)
    low, high = x.tensor.amin(others).double().cpu(), x.tensor.amax(others).double().cpu()
    size = torch.maximum(low.abs(), high.abs())
    near = (high - low <= 16 * torch.finfo(x.tensor.dtype).eps * size) & size.isfinite()
    return free & near, torch.where(low == high, low, (low + high) / 2)


def _stained(x: Flow, dim: int, reader: Reader) -> Tensor:
    """Which rows of a product depend on the input: those with a weight other than zero at a column that does."""
    stained = _any(x.taint, [d for d in range(x.tensor.ndim) if d != dim]).flatten().expand(x.tensor.shape[dim])
    per_group = stained.view(reader.groups, 1, -1)
    return (reader.grouped(reader.live_weights()) & per_group).any(2).flatten()


def _any(taint: Tensor, dims: Iterable[int]) -> Tensor:
    for dim in dims:
        taint = taint.any(dim, keepdim=True)
    return taint


def _biased(run: Dependence, call: Call, fed: bool, taint: Tensor, layers: list[Tensor]) -> None:
    out = call.outputs[0]
    bias = call.args.get("bias") if call.name == "convolution" else call.args["self"] if call.name == "addmm" else None
    if bias is not None:
        flow = run.consume(bias)
        after = (1,) * (out.ndim - 2)
        size = torch.Size([*bias.shape, *after])
        layers = combine(run, out.ndim, [(out.shape, layers), (size, [x.view(*x.shape, *after) for x in flow.layers])])
        taint, fed = taint | spread(flow.taint.view(*flow.taint.shape, *after), out.ndim), fed or flow.fed
    run.put(out, fed, compact(taint), layers=layers)


def batched(run: Dependence, call: Call) -> None:
    """Two activations: what is summed over stays whole within each part, so whole heads of attention go."""
    left, right = (run.consume(t) for t in call.inputs[-2:])
    out = call.outputs[0]
    reason = "is summed over in a product of activations"
    sides = []
    for flow, dim in ((left, out.ndim - 1), (right, out.ndim - 2)):
        left_over: list[Tensor] = []
        size = torch.Size([1 if d == dim else n for d, n in enumerate(flow.tensor.shape)])
        for layer in flow.layers:
            across = {out.ndim - 1, out.ndim - 2} if varying(layer) & set(range(out.ndim - 2)) else {dim}
            left_over += run.hold(layer, across, reason)
        sides.append((size, left_over))
    taint = _product_taint(left, right)
    if len(call.inputs) == 3:
        extra = run.consume(call.inputs[0])
        sides.append((extra.tensor.shape, extra.layers))
        taint = taint | spread(extra.taint, out.ndim)
    run.put(out, left.fed or right.fed, compact(taint), layers=combine(run, out.ndim, sides))


def _product_taint(left: Flow, right: Flow) -> Tensor:
    a, b = left.tensor, right.tensor
    if bool(left.taint.all()) and bool(right.taint.all()):
        return torch.ones((1,) * a.ndim, dtype=torch.bool)
    # two constants that are not zero make one for this number of terms only
    taint = ((a != 0).cpu() | left.taint).float() @ ((b != 0).cpu() | right.taint).float() > 0.5
    if left.averaging:
        level = ((b == b[..., :1, :]).cpu() & ~right.taint).all(-2, keepdim=True)
        taint = taint & ~level
    return taint
