"""What happens inside a model when it sees an example: which layers run, and where each output flows.

A trace sees every call of a torch function, so it knows activations that are functions (`F.relu(self.fc1(x))`) as well as
modules, and follows tensors by what they are computed from, so it does not take `conv → add → relu` for `conv → relu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from goodfit.dataflow.flows import tensors_in
from goodfit.layers.skip import SKIPS
from goodfit.noise import Noisy
from goodfit.surgery.running import call_model, must_run, quiet
from goodfit.where import KERNELS, NORMS

__all__ = ["DROPPERS", "Call", "flow", "function_name", "rate_of", "trains", "version_of"]

# names of torch functions, whichever module defines them, without the underscores of in-place and private ones
_ACTIVATIONS = {"celu", "elu", "gelu", "glu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid"}
_ACTIVATIONS |= {"mish", "prelu", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus", "softshrink", "softsign"}
_ACTIVATIONS |= {"tanh", "tanhshrink", "threshold"}
_NORMALIZERS = {"batch_norm", "group_norm", "instance_norm", "layer_norm", "local_response_norm", "rms_norm"}
DROPPERS = {"alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout", "feature_dropout"}
_PRODUCTS = {"imul", "mul", "multiply", "rmul"}


@dataclass(eq=False)
class Call:
    """One call of a layer or activation: who ran, on what, and where the output flows."""

    kind: str  # "kernel", "norm" or "activation", or "dropout", which passes on what comes to it
    name: str  # of the module, "" for a function
    module: nn.Module | None
    source: Any  # the first argument
    output: Tensor
    function: str = ""  # the torch function, for an activation and a norm that is one
    feeds: list[Call] = field(default_factory=list)  # the calls that take this very output
    reaches: list[Call] = field(default_factory=list)  # those, and the next ones behind additions, pooling and the like
    gate: bool = False  # the output is multiplied into something of its size or larger
    scales: bool = False  # the output, reshaped or expanded, is multiplied into something larger

    def reached(self, kind: str) -> list[Call]:
        """The next calls of one kind."""
        return [c for c in self.reaches if c.kind == kind]

    def goes_on(self) -> bool:
        """Whether a kernel layer comes behind."""
        known = [self]
        for call in known:  # grows as it is walked
            known += [c for c in call.reaches if c not in known]
        return any(c.kind == "kernel" for c in known[1:])


def rate_of(args: Any, kwargs: Any) -> float:
    """The rate that a dropout function is called with."""
    return args[1] if len(args) > 1 else kwargs.get("p", 0.5)


def trains(args: Any, kwargs: Any) -> bool:
    """Whether it is called to drop."""
    return bool(args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True)))


def flow(model: nn.Module, example: Any) -> list[Call]:
    """The calls of kernel layers, norms and activations for one example, in order, in eval mode; the model stays as it is."""
    trace = _Trace()
    with ExitStack() as stack:
        stack.enter_context(quiet(model))
        for name, module in model.named_modules():
            hook = trace.on(name, _kind_of(module), leaf=_leaf(module) and not isinstance(module, (Noisy, *SKIPS)))
            if hook is not None:
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(trace)
        try:
            call_model(model, example)
        except Exception as error:
            raise must_run(model, error) from error
    return trace.calls


def _leaf(module: nn.Module) -> bool:
    """Whether a module has no modules of its own; layers that we have hung there do not count."""
    return all(isinstance(child, (Noisy, *SKIPS)) for child in module.children())


def _kind_of(module: nn.Module) -> str:
    """A layer that torch does not define is a kernel by a weight of two axes, and a norm by its class name."""
    leaf = _leaf(module)
    if isinstance(module, (*NORMS, nn.LocalResponseNorm)) or (leaf and "norm" in type(module).__name__.lower()):
        return "norm"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return ""
    owns_matrix = any(p.ndim >= 2 for p in module.parameters(recurse=False))
    return "kernel" if isinstance(module, KERNELS) or (leaf and owns_matrix) else ""


@dataclass
class _Origin:
    """Where a tensor comes from. `version` tells whether it was changed in place since."""

    tensor: Tensor
    version: int
    straight: tuple[Call, ...] = ()  # the call whose output it is
    calls: tuple[Call, ...] = ()  # the last calls on all ways to it


class _Trace(TorchFunctionMode):
    """Notes every call of a kernel, norm or activation, and follows what each tensor is computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.origins: dict[int, _Origin] = {}

    def on(self, name: str, kind: str, leaf: bool) -> Any:
        """The hook for a module: a layer is a call, a module around one function gives that call its name."""

        def layer(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = [*args, *kwargs.values()]
            new = isinstance(output, Tensor) and not any(t is output for t in tensors_in(inputs))
            if kind == "norm" and new and any(c.kind == "activation" for c in self.of(output).straight):
                return  # a norm with its activation in it: both were seen as functions
            self.note(kind, name, module, inputs, [self.of(t) for t in tensors_in(inputs)], output)

        def around(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            last = self.calls[-1] if self.calls else None
            if last is not None and last.output is output and last.module is None:
                last.name, last.module = name, module

        return layer if kind else around if leaf else None

    def of(self, tensor: Tensor) -> _Origin:
        known, version = self.origins.get(id(tensor)), version_of(tensor)
        if known is None:
            return _Origin(tensor, version)
        return known if known.version == version else _Origin(tensor, version, (), known.calls)

    def note(
        self,
        kind: str,
        name: str,
        module: nn.Module | None,
        inputs: Any,
        origins: list[_Origin],
        output: Any,
        function: str = "",
    ) -> None:
        outputs = list(tensors_in(output))
        if not outputs:
            return
        call = Call(kind, name, module, next(iter(inputs), None), outputs[0], function)
        self.calls.append(call)
        for one in _distinct(c for origin in origins for c in origin.straight):
            one.feeds.append(call)
        for one in _distinct(c for origin in origins for c in origin.calls):
            one.reaches.append(call)
        for t in outputs:
            self.origins[id(t)] = _Origin(t, version_of(t), (call,), (call,))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, inputs = function_name(func), [*args, *kwargs.values()]
        origins = [self.of(t) for t in tensors_in(inputs)]
        output = func(*args, **kwargs)
        if name in _ACTIVATIONS or name in _NORMALIZERS:
            self.note("activation" if name in _ACTIVATIONS else "norm", "", None, inputs, origins, output, name)
            return output
        if name in _PRODUCTS and len(origins) == 2:
            for one, other in (origins, origins[::-1]):
                for call in one.calls:
                    acts = call.kind == "activation" and one.tensor.numel() <= other.tensor.numel()
                    call.gate |= acts and call in one.straight
                    call.scales |= acts and call.output.numel() < other.tensor.numel()
        reached = tuple(_distinct(c for origin in origins for c in origin.calls))
        if name in DROPPERS and rate_of(args, kwargs) > 0:
            self.calls.append(Call("dropout", "", None, next(iter(inputs), None), output, name))
            for before in reached:
                before.reaches.append(self.calls[-1])
        untouched = {id(o.tensor) for o in origins if o.version == version_of(o.tensor)}
        changed = output if output is not None else inputs[:1]  # x[i] = y returns nothing
        for t in tensors_in(changed):
            if id(t) not in untouched:
                self.origins[id(t)] = _Origin(t, version_of(t), (), reached)
        return output


def function_name(func: Any) -> str:
    """The name of a torch function, whichever module defines it, without underscores of in-place and private ones."""
    return str(getattr(func, "__name__", "?")).strip("_")


def version_of(tensor: Tensor) -> int:
    """Which writing of a tensor this is; -1 where torch does not count."""
    return -1 if is_lazy(tensor) or tensor.is_inference() else tensor._version


def _distinct(calls: Iterator[Call]) -> list[Call]:
    return list(dict.fromkeys(calls))
