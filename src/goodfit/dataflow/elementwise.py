"""Operations element by element: the result stands and falls with the slices of all operands."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from goodfit.dataflow.atoms import compact, varying
from goodfit.dataflow.dependence import Dependence
from goodfit.dataflow.flows import Call, Flow

__all__ = ["combine", "copied", "like", "new", "pointwise", "random", "same", "spread"]


def spread(layer: Tensor, ndim: int) -> Tensor:
    """A compact tensor of a higher rank, as broadcasting aligns it."""
    return layer.view((1,) * (ndim - layer.ndim) + tuple(layer.shape))


def combine(run: Dependence, ndim: int, sides: Iterable[tuple[Tensor | torch.Size, list[Tensor]]]) -> list[Tensor]:
    """The layers of what is computed element by element from several sides, each with its size and its layers.

    Layers along the same dimension go together. Where one side has none, or covers only a part, its size is fixed.
    """
    padded = [((1,) * (ndim - len(size)) + tuple(size), [spread(x, ndim) for x in layers]) for size, layers in sides]
    result: list[Tensor] = []
    for i, (_, layers) in enumerate(padded):
        for layer in layers:
            left = [layer]
            for j, (size, others) in enumerate(padded):
                covered = {d for other in others for d in varying(other)}
                fixed = {d for d in varying(layer) if j != i and size[d] > 1 and d not in covered}
                left = [rest for x in left for rest in run.hold(x, fixed, "meets a tensor whose size is fixed")]
            for x in left:
                result = _joined(run, result, x)
    return result


def _joined(run: Dependence, layers: list[Tensor], new: Tensor) -> list[Tensor]:
    kept, fresh = [], [new]
    for layer in layers:
        across = varying(layer) & varying(new)
        if across and varying(layer) == varying(new):
            run.slices.tie(layer, new)
            fresh = []
        elif across:
            reason = "goes with only a part of the slices that it meets"
            kept += run.hold(layer, across, reason)
            fresh = [rest for x in fresh for rest in run.hold(x, across, reason)]
            continue
        kept.append(layer)
    return kept + fresh


def pointwise(run: Dependence, call: Call) -> None:
    """Element by element: the result is tainted where an operand is, but a constant zero factor makes a constant."""
    flows, out = [run.consume(t) for t in call.inputs], call.outputs[0]
    layers = combine(run, out.ndim, [(f.tensor.shape, f.layers) for f in flows])
    zeros = [_constant_zeros(f) if call.name == "mul" and not (call.inplace and f.tensor is out) else None for f in flows]
    taint = torch.zeros((1,) * out.ndim, dtype=torch.bool)
    for i, flow in enumerate(flows):
        own = flow.taint
        for j, zero in enumerate(zeros):
            own = own if zero is None or i == j else own & ~zero
        taint = taint | own
    for t in call.outputs:
        run.put(t, any(f.fed for f in flows), compact(taint), layers=list(layers))


def _constant_zeros(flow: Flow) -> Tensor | None:
    return None if bool(flow.taint.all()) else compact((flow.tensor == 0).cpu() & ~flow.taint)


def copied(run: Dependence, call: Call) -> None:
    """`a.copy_(b)`: the values of b in the place of a."""
    place, source = (run.of(t) for t in call.inputs[:2])
    out = call.outputs[0]
    layers = combine(run, out.ndim, [(f.tensor.shape, f.layers) for f in (place, source)])
    run.put(out, source.fed, spread(source.taint, out.ndim), layers=layers)


def same(run: Dependence, call: Call) -> None:
    """The same values in the same places."""
    flow, out = run.of(call.inputs[0]), call.outputs[0]
    run.put(out, flow.fed, flow.taint, layers=flow.layers, leaf=flow.leaf, averaging=flow.averaging)


def like(run: Dependence, call: Call) -> None:
    """A constant of the size of a tensor."""
    for out in call.outputs:
        run.put(out, layers=list(run.of(call.inputs[0]).layers))


def new(run: Dependence, call: Call) -> None:
    """A constant of a size that code wrote down, or worked out: which, the run cannot tell."""
    for out in call.outputs:
        run.put(out)


def random(run: Dependence, call: Call) -> None:
    """Drawn anew in each run, so never a constant."""
    layers = [layer for t in call.inputs[:1] for layer in run.of(t).layers if layer.ndim == call.outputs[0].ndim]
    for out in call.outputs:
        run.put(out, True, torch.ones((1,) * out.ndim, dtype=torch.bool), layers=layers)
