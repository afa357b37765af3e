"""Operations across elements: sums, means, softmax, and the normalizations."""

from __future__ import annotations

import torch
from torch import Tensor

from goodfit.dataflow.atoms import compact
from goodfit.dataflow.dependence import Dependence
from goodfit.dataflow.elementwise import combine
from goodfit.dataflow.flows import Call

__all__ = ["batch_norm", "group_norm", "layer_norm", "reduction"]


_OF_ANY_NUMBER = {"mean", "amax", "amin", "max", "min", "any", "all"}  # of equal values: that value, however many there are


def reduction(run: Dependence, call: Call) -> None:
    """Sums, means, extremes and softmax over dimensions, which slices must not leave alone."""
    flow, ndim = run.consume(call.inputs[0]), call.inputs[0].ndim
    given = call.args.get("dim")
    listed = [int(d) % ndim for d in (given if isinstance(given, list | tuple) else [given])] if given is not None else []
    dims = set(listed or range(ndim))
    taint = run.unlevel(flow, dims, zero=call.name not in _OF_ANY_NUMBER)
    layers = [rest for x in flow.layers for rest in run.hold(x, dims, f"is reduced over by {call.name}", if_live=True)]
    softmax = call.name in {"_softmax", "_safe_softmax"} and dims == {ndim - 1}
    run.attending.update(run.modules[-1:] if softmax else [])
    softmax &= bool(flow.tensor.isfinite().all())  # where all is masked, a row sums to zero
    for out in call.outputs:
        gone = [] if out.ndim == ndim else sorted(dims, reverse=True)
        shape = [n for d, n in enumerate(taint.shape) if d not in gone]
        own = [x.reshape([n for d, n in enumerate(x.shape) if d not in gone]) for x in layers]
        if out.shape == flow.tensor.shape:
            own = flow.layers
        run.put(out, flow.fed, taint.reshape(shape), layers=own, averaging=softmax)


def batch_norm(run: Dependence, call: Call) -> None:
    """Each channel by itself: its scale, shift and statistics go with it, and a scale of zero makes a constant."""
    x, out = run.consume(call.inputs[0]), call.outputs[0]
    after = (1,) * (out.ndim - 2)
    sides: list[tuple[torch.Size, list[Tensor]]] = [(out.shape, x.layers)]
    for tensor in call.inputs[1:]:
        flow = run.consume(tensor)
        sides.append((torch.Size([*tensor.shape, *after]), [layer.view(*layer.shape, *after) for layer in flow.layers]))
    taint = x.taint
    if call.args.get("training", call.args.get("train", call.args.get("use_input_stats", False))):
        taint = run.unlevel(x, [0, *range(2, out.ndim)])
    layers = combine(run, out.ndim, sides)
    run.put(out, x.fed, compact(_scaled(taint, call.args.get("weight"), after)), layers=layers)


def layer_norm(run: Dependence, call: Call) -> None:
    """Normalized across its last dimensions: removing one element would change the statistics of the others."""
    x, out = run.consume(call.inputs[0]), call.outputs[0]
    dims = range(out.ndim - len(call.args["normalized_shape"]), out.ndim)
    taint = x.taint
    for dim in dims:
        taint = taint.any(dim, keepdim=True)
    for layer in x.layers:
        run.hold(layer, dims, "is normalized across", if_live=True)
    sides = [(f.tensor.shape, f.layers) for f in (x, *map(run.consume, call.inputs[1:]))]
    run.put(out, x.fed, compact(_scaled(taint, call.args.get("weight"), ())), layers=combine(run, out.ndim, sides))


def group_norm(run: Dependence, call: Call) -> None:
    """The same in groups of channels."""
    x, out = run.consume(call.inputs[0]), call.outputs[0]
    layers = [rest for layer in x.layers for rest in run.hold(layer, range(1, out.ndim), "is normalized across")]
    for tensor in call.inputs[1:]:
        for layer in run.consume(tensor).layers:
            run.slices.pin(layer, "is normalized across")
    taint = run.unlevel(x, range(2, out.ndim)).any(1, keepdim=True)
    run.put(out, x.fed, compact(_scaled(taint, call.args.get("weight"), (1,) * (out.ndim - 2))), layers=layers)


def _scaled(taint: Tensor, scale: Tensor | None, after: tuple[int, ...]) -> Tensor:
    return taint if scale is None else taint & (scale != 0).cpu().view(*scale.shape, *after)
