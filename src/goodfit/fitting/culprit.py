"""Where a number that is not finite comes from: the data, a weight, the first layer, the loss, or a gradient."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from goodfit.processes import first_told
from goodfit.rows import mapped
from goodfit.surgery.running import call_model, quiet

__all__ = ["culprit", "nonfinite"]


def nonfinite(tensor: Any) -> str:
    """ "nan" or "inf" where a tensor has one, else ""."""
    if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return ""
    if bool(tensor.isfinite().all()):
        return ""
    return "nan" if bool(tensor.isnan().any()) else "inf"


def culprit(model: nn.Module, x: Any, y: Any, loss: Tensor) -> str:
    """What is to be said of a step whose loss or gradients are not finite: the first thing in it that is not."""
    looks = (partial(_data, x, y), partial(_tensors, model), partial(_first_layer, model, x), partial(_loss, loss))
    found = (first_told(look()) for look in looks)  # all processes look into one thing together
    return next(filter(None, found), "") or _gradients(model)


def _data(x: Any, y: Any) -> str:
    for name, data in (("x", x), ("y", y)):
        for leaf in _leaves(data):
            if kind := nonfinite(leaf):
                bad = (~leaf.isfinite()).reshape(len(leaf) if leaf.ndim else 1, -1).any(1).nonzero()[:, 0].tolist()
                return f"{name} has {kind} in {len(bad)} of its rows, the first of them row {bad[0]}"
    return ""


def _tensors(model: nn.Module) -> str:
    for what, tensors in (("weight", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if kind := nonfinite(tensor):
                return f"the {what} {name!r} has {kind}"
    return ""


def _loss(loss: Tensor) -> str:
    kind = nonfinite(loss)
    return f"the loss is {kind}, of outputs that are finite" if kind else ""


def _leaves(data: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(data, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


def _first_layer(model: nn.Module, x: Any) -> str:
    """The first module to give what is not finite; the model is run once more on the batch, and left as it was."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def check(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kind = next(filter(None, map(nonfinite, _leaves(output))), "")
            if kind and not found:
                found.append(f"the layer {name!r} ({type(module).__name__}) gives {kind} for an input that is finite")

        return check

    modes = [(module, module.training) for module in model.modules()]
    with quiet(model), ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        for module, mode in modes:
            module.training = mode
        call_model(model, x)
    return found[0] if found else ""


def _gradients(model: nn.Module) -> str:
    """Backward goes from the last layer to the first, and what is not finite spreads that way."""
    bad = [(name, kind) for name, p in model.named_parameters() if (kind := nonfinite(p.grad))]
    if not bad:
        return "no number is found that is not finite: the model gives others when it is run once more"
    name, kind = bad[-1]
    before = f", and those of {len(bad) - 1} weights before it" if len(bad) > 1 else ""
    return f"the gradient of {name!r} has {kind}{before}"
