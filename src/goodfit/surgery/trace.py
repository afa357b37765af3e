"""What happens inside a model when it sees an example: which layers run, and what each output flows into.

A trace follows tensors by identity, so it sees activations that are functions (`F.relu(self.fc1(x))`) as well as
modules, and does not take `conv → add → relu` for `conv → relu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

__all__ = ["Call", "call_model", "evaluating", "flow"]

KERNELS = (nn.Linear, _ConvNd, nn.Bilinear)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_THROUGH = (_DropoutNd, nn.Identity)
_ACTIVATIONS = (
    "celu celu_ elu elu_ gelu glu hardsigmoid hardswish hardswish_ hardtanh hardtanh_ leaky_relu leaky_relu_ logsigmoid mish "
    "mish_ prelu relu relu6 relu_ rrelu selu selu_ sigmoid sigmoid_ silu silu_ softplus softsign tanh tanh_ threshold"
)  # names of torch functions, whichever module defines them


@dataclass
class Call:
    """One call of a layer or activation: who ran, on what, and what the output flows straight into."""

    kind: str  # "kernel", "norm", "dropout" or "activation"
    name: str  # of the module, "" for a function
    module: nn.Module | None
    source: Tensor
    output: Tensor
    feeds: list[Call] = field(default_factory=list)


def call_model(model: nn.Module, x: Any) -> Any:
    """Run a model on one input batch: a dict goes in as keywords, a tuple as positions, else as it is."""
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; every submodule gets its own mode back, whatever happens."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def flow(model: nn.Module, example: Any) -> list[Call]:
    """The calls of kernel layers, norms, dropouts and activations for one example, in order, in eval mode."""
    calls: list[Call] = []
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for name, module in model.named_modules():
            if isinstance(module, KERNELS + NORMS + _THROUGH):
                handle = module.register_forward_hook(_record_module(calls, name))
                stack.callback(handle.remove)
            elif not any(module.children()):
                handle = module.register_forward_hook(_name_activation(calls, name))
                stack.callback(handle.remove)
        stack.enter_context(_Activations(calls))
        call_model(model, example)
    _connect(calls)
    return calls


def _record_module(calls: list[Call], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            kind = "kernel" if isinstance(module, KERNELS) else "norm" if isinstance(module, NORMS) else "dropout"
            calls.append(Call(kind, name, module, args[0], output))

    return hook


def _name_activation(calls: list[Call], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        last = calls[-1] if calls else None
        if last is not None and last.kind == "activation" and last.output is output and last.module is None:
            last.name, last.module = name, module

    return hook


class _Activations(TorchFunctionMode):
    """Notes every call of an activation function, whoever makes it."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "?") in _ACTIVATIONS.split() and args and isinstance(args[0], Tensor):
            self.calls.append(Call("activation", "", None, args[0], output))
        return output


def _connect(calls: list[Call]) -> None:
    for i, call in enumerate(calls):
        flowing = [call.output]
        for later in calls[i + 1 :]:
            if any(later.source is t for t in flowing):
                if later.kind == "dropout":
                    flowing.append(later.output)
                call.feeds.append(later)
