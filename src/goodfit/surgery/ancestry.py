"""Which tensors each tensor of one run is computed from, and which modules returned it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from goodfit.dataflow.flows import tensors_in
from goodfit.errors import GoodfitError
from goodfit.surgery.refusals import refuse_lazy
from goodfit.surgery.running import call_model, must_run, quiet
from goodfit.surgery.trace import function_name, version_of

__all__ = ["Ancestry", "Value", "ancestry", "bits"]

_ADDITIONS = {"add", "iadd", "radd"}
_LAYERS = {"addbmm", "addmm", "baddbmm", "bilinear", "bmm", "einsum", "linear", "matmul", "mm", "rmatmul"}
_LAYERS |= {"conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"}
_LAYERS |= {"gru", "gru_cell", "lstm", "lstm_cell", "rnn_relu", "rnn_relu_cell", "rnn_tanh", "rnn_tanh_cell"}
_GROWTHS = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "interpolate", "pixel_shuffle", "upsample"}
_GROWTHS |= {"upsample_bilinear", "upsample_nearest"}
_SIGMOIDS = {"logsigmoid", "sigmoid"}
_SOFTMAX = {"log_softmax", "softmax", "softmin"}
_PARTS = {"chunk", "getitem", "index_select", "narrow", "select", "split", "split_with_sizes", "tensor_split", "unbind"}
_JOINS = {"cat", "concat", "concatenate", "stack"}
_PRODUCTS = {"imul", "mul", "multiply", "rmul"}
_QUOTIENTS = {"div", "divide", "idiv", "itruediv", "truediv"}
_REARRANGES = {"bfloat16", "clone", "contiguous", "double", "flatten", "flip", "float", "getitem", "half", "movedim", "narrow"}
_REARRANGES |= {"permute", "reshape", "roll", "squeeze", "swapaxes", "to", "transpose", "type", "type_as"}
_REARRANGES |= {"unflatten", "unsqueeze", "view", "view_as"}


@dataclass(eq=False)
class Value:
    """One tensor of a run, as it is between two changes in place."""

    index: int
    tensor: Tensor
    version: int
    parents: tuple[Value, ...] = ()
    ancestors: int = 0  # a bit for the index of each
    live: bool = False  # depends on the model's input
    layers: int = 0  # how many products with weights it is away from its parents
    part: bool = False  # some of a parent's numbers
    joined: bool = False  # of parts
    of: Value | None = None  # the live tensor that it is a scaled or rearranged copy of
    uses: int = 0
    added: int = 0  # uses that are additions
    logits: bool = False  # a softmax takes it
    squashed: bool = False  # a sigmoid takes it
    final: bool = False  # an output of the model
    grown: bool = False  # to more places, as a map or a series
    straight: list[tuple[str, nn.Module, bool]] = field(default_factory=list)  # who returned it, and whether alone

    def sources(self) -> Iterator[Value]:
        """Itself, and those of which it is a scaled or rearranged copy."""
        value: Value | None = self
        while value is not None:
            yield value
            value = value.of

    def descends(self, other: Value) -> bool:
        """Whether it is computed from `other`."""
        return bool(self.ancestors >> other.index & 1)


class Ancestry(TorchFunctionMode):
    """Notes every value of a run, the additions of two, and the calls of modules."""

    def __init__(self, example: Any) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.additions: list[tuple[Value, Value, Value]] = []
        self.calls: dict[str, list[int]] = defaultdict(list)  # by module: how many values there were when it returned
        self._now: dict[int, Value] = {}
        for t in tensors_in(example):
            self._note(t, ()).live = True

    def value(self, t: Tensor) -> Value:
        """What is known of a tensor as it is now."""
        known = self._now.get(id(t))
        if known is not None and known.version == version_of(t):
            return known
        return self._note(t, () if known is None else (known,))

    def _note(self, t: Tensor, parents: tuple[Value, ...]) -> Value:
        made = Value(len(self.values), t, version_of(t), live=any(p.live for p in parents))
        # integers and masks carry no features
        made.parents = tuple(p for p in parents if _real(p.tensor)) if _real(t) else ()
        for p in made.parents:
            made.ancestors |= p.ancestors | 1 << p.index
        self.values.append(made)
        self._now[id(t)] = made
        return made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {id(v): v for v in map(self.value, tensors_in([*args, *kwargs.values()]))}.values()
        output = func(*args, **kwargs)
        name, old = function_name(func), {id(v.tensor): v.version for v in inputs}
        changed = [t for t in tensors_in([output, *args, *kwargs.values()]) if old.get(id(t)) != version_of(t)]
        made = [self._made(name, t, tuple(inputs)) for t in {id(t): t for t in changed}.values()]
        for value in inputs if made else ():
            value.uses += 1
            for source in value.sources() if name in _SOFTMAX | _SIGMOIDS else ():
                source.logits |= name in _SOFTMAX
                source.squashed |= name in _SIGMOIDS
        operands = [v for v in inputs if _real(v.tensor)]
        if name in _ADDITIONS and len(operands) == 2 and len(made) == 1:
            self.additions.append((operands[0], operands[1], made[0]))
            for one in operands:
                one.added += 1
        return output

    def _made(self, name: str, t: Tensor, inputs: tuple[Value, ...]) -> Value:
        made, live = self._note(t, inputs), [v for v in inputs if v.live and _real(v.tensor)]
        weights = [v for v in inputs if not v.live and v.tensor.ndim >= 2]
        if name == "multi_head_attention_forward":
            made.layers = 2
        elif live and weights and name in _LAYERS:
            made.layers = 1
        made.part = name in _PARTS and bool(inputs) and t.numel() < max(v.tensor.numel() for v in inputs)
        made.joined, made.grown = name in _JOINS, name in _GROWTHS
        divided = name in _QUOTIENTS and inputs and live and live[0] is inputs[0]
        if len(live) == 1 and (name in _REARRANGES or name in _PRODUCTS or divided):
            made.of = live[0]
        return made

    def leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A module returns."""
        self.calls[name].append(len(self.values))
        first = output if isinstance(output, Tensor) else output[0] if type(output) is tuple and output else None
        for t in tensors_in(output):
            if id(t) not in self._now:  # computed where no mode sees it, as by an autograd function
                made = self._note(t, tuple(map(self.value, tensors_in([args, kwargs]))))
                made.layers = int(any(p.ndim >= 2 for p in module.parameters()))
        if isinstance(first, Tensor):
            self.value(first).straight.append((name, module, first is output))


def ancestry(model: nn.Module, example: Any) -> Ancestry:
    """Run the example once in eval mode and note what comes from what; the model stays as it is."""
    refuse_lazy(model, type(model).__name__)
    run = Ancestry(example)
    with ExitStack() as stack:
        stack.enter_context(quiet(model))
        for name, module in model.named_modules():
            hook = _leaving(run, name)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(run)
        try:
            outputs = call_model(model, example)
        except GoodfitError:
            raise
        except Exception as error:
            raise must_run(model, error) from error
    for t in tensors_in(outputs):
        run.value(t).uses += 1
        for source in run.value(t).sources():
            source.final = True
    return run


def _leaving(run: Ancestry, name: str) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        run.leave(name, module, args, kwargs, output)

    return hook


def _real(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def bits(mask: int) -> Iterator[int]:
    """Positions of the ones."""
    text = bin(mask)[:1:-1]
    at = text.find("1")
    while at >= 0:
        yield at
        at = text.find("1", at + 1)
