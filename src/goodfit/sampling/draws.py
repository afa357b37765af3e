"""Which random numbers a model draws in one run, which module draws them, and whether they drop something.

A draw drops when it becomes a mask (by a comparison, rounding or selection) before it meets the data, or when a module with
others inside decides by it, as layer drop does. Random numbers that meet the data as they are, are noise, but in a layer that
is dropout by its class (Gaussian dropout). An operation that draws and drops at once (attention, recurrent layers on a GPU) is
known by its dropout argument.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from goodfit.noise import Noisy
from goodfit.sampling.kept import elsewhere
from goodfit.sampling.operations import RATES, READS, op_of, random_now, tensors_of, told

__all__ = ["Draw", "Draws", "own_layers"]

# names of aten operations, without the underscore of in-place ones
_MASKS = {"bernoulli", "randperm"}
_UNIFORM = {"rand", "rand_like", "uniform"}
_CUTS = {"argsort", "ceil", "eq", "floor", "ge", "gt", "heaviside", "le", "lt", "ne", "round", "sign", "sort", "topk", "trunc"}
_COMPARE = {"ge", "gt", "le", "lt"}
_SELECT = {"gather", "index", "index_select", "take"}
_SCALES = {"_to_copy", "alias", "clone", "copy", "div", "expand", "mul", "squeeze", "unsqueeze", "view", "_unsafe_view"}


@dataclass(eq=False)
class Draw:
    """One draw: the operation, the modules that were running (the last is its owner), and what became of it."""

    op: str
    stack: tuple[str, ...]
    kind: str = ""  # "drops", "decides", "asks", "noise" or "idle"; "" while nothing has used it
    used: set[str] = field(default_factory=set)  # by which operations, up to where it meets the data
    uniform: bool = False  # whether its numbers lie between 0 and 1

    @property
    def owner(self) -> str:
        return self.stack[-1]

    @property
    def drops(self) -> bool:
        return self.kind in {"drops", "decides"}

    @property
    def scales(self) -> bool:
        """Whether it is a mask with which the data is multiplied, so that its mean can take its place."""
        return self.op == "bernoulli" and self.used <= _SCALES


@dataclass
class _Mark:
    """A tensor that is computed from draws alone; it is held so that its storage, by which it is known, stays its own."""

    tensor: Tensor
    draws: list[Draw]
    cut: bool


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the draws of everything that runs within.

    sizes: of what is drawn and of what is computed from draws alone, in order. largest: bytes of the largest tensor that was
    computed, views of weights aside. means: let each mask be its mean. watch: note in `outside` the modules that draw from
    Python's or NumPy's generator, which no dispatch sees.
    """

    def __init__(self, model: nn.Module, means: bool = False, watch: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws: list[Draw] = []
        self.sizes: list[int] = []
        self.called: set[str] = set()
        self.outside: set[str] = set()
        self.largest = 0
        self._names = {module: name for name, module in model.named_modules()}
        self._containers = {
            name for module, name in self._names.items() if any(m is not None for m in module._modules.values())
        }
        self._noisy = {name for module, name in self._names.items() if isinstance(module, Noisy)}
        self._own = {name for module, name in self._names.items() if _own(module) and getattr(module, "p", 1) != 0}
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._thread = threading.get_ident()
        self._stack = [""]
        self._marks: dict[int, _Mark] = {}
        self._means, self._watch = means, watch
        self._hooks = ExitStack()
        self._elsewhere: Any = None

    def __enter__(self) -> Draws:
        self._elsewhere = elsewhere() if self._watch else None
        # global hooks: a hook on a module would switch off the fast paths of torch's transformer layers, which skip dropout
        self._hooks.callback(register_module_forward_pre_hook(self._enters).remove)
        self._hooks.callback(register_module_forward_hook(self._leaves, always_call=True).remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)  # type: ignore[no-untyped-call]
        self._hooks.close()
        self._marks.clear()

    def _follows(self, module: nn.Module) -> bool:
        """Whether a call is one of this run: the hooks are global, so they meet those of other threads and models as well."""
        return threading.get_ident() == self._thread and module in self._names

    def _enters(self, module: nn.Module, args: Any) -> None:
        if self._follows(module):
            self._charge()
            self._stack.append(self._names[module])
            self.called.add(self._stack[-1])

    def _leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._follows(module):
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        if self._watch and (now := elsewhere()) != self._elsewhere:
            self.outside.add(self._stack[-1])
            self._elsewhere = now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_of([*args, *kwargs.values()]) if self._marks else []
        output = func(*args, **kwargs)
        op, outputs = op_of(func), tensors_of([output])
        for t in outputs:
            if t.nbytes > self.largest and t.untyped_storage().data_ptr() not in self._weights:
                self.largest = t.nbytes
        if random_now(func, args, kwargs):
            self._drawn(func, op, outputs)
            if self._means and op == "bernoulli":
                outputs[0].copy_(torch.as_tensor(told(func, args, kwargs).get("p", args[0])))
        elif any(_place(t) in self._marks for t in inputs):
            self._used(op, args, inputs, outputs)
        return output

    def _drawn(self, func: Any, op: str, outputs: list[Tensor]) -> None:
        draw = Draw(op, tuple(self._stack), uniform=op in _UNIFORM or self._stack[-1] in self._noisy)
        self.draws.append(draw)
        self.sizes.append(outputs[0].numel())
        if "dropout" in op or any(a.name in RATES for a in func._schema.arguments):
            draw.kind = "drops"
        elif op.startswith("rrelu"):
            draw.kind = "noise"
        else:
            self._mark(outputs, [draw], op in _MASKS)

    def _used(self, op: str, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """What becomes of numbers that come from draws: a mask, other random numbers, or a change of the data."""
        marks = [self._marks[_place(t)] for t in inputs if _place(t) in self._marks]
        draws, cut = [d for m in marks for d in m.draws], any(m.cut for m in marks)
        for draw in draws:
            draw.used.add(op)
        if op == "copy" and _place(inputs[0]) not in self._marks:
            inputs = inputs[1:]  # what is written over is no data
        size = max((m.tensor.numel() for m in marks), default=0)
        others = [t for t in inputs if _place(t) not in self._marks and t.is_floating_point() and t.ndim]
        data = [t for t in others if t.numel() > 1 or size == 1]  # one number beside many is a rate
        if op in READS:
            for draw in draws:  # a layer that decides for itself may as well turn images round
                self._settle([draw], "decides" if draw.owner in self._containers else "asks")
        elif op in _COMPARE and _settled([a for a in args if not isinstance(a, Tensor) or _place(a) not in self._marks], draws):
            self._settle(draws, "idle")
        elif op in _CUTS or not data:
            self.sizes.append(sum(t.numel() for t in outputs))
            self._mark(outputs, draws, cut or op in _CUTS)
        else:
            whole = op in _SELECT and outputs[0].numel() >= data[0].numel()  # a permutation
            self._settle(draws, "drops" if cut and not whole else "noise")
            for t in outputs:  # what was written over in place is data now
                self._marks.pop(_place(t), None)

    def _mark(self, outputs: list[Tensor], draws: list[Draw], cut: bool) -> None:
        for t in outputs:
            self._marks[_place(t)] = _Mark(t, draws, cut)

    def _settle(self, draws: list[Draw], kind: str) -> None:
        for draw in draws:
            draw.kind = draw.kind or ("drops" if kind == "noise" and draw.owner in self._own else kind)


def own_layers(model: nn.Module) -> set[str]:
    """Layers that drop by their class: torch's, and those of ours."""
    return {name for name, module in model.named_modules() if _own(module)}


def _own(module: nn.Module) -> bool:
    return isinstance(module, _DropoutNd | Noisy)


def _place(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _settled(bounds: list[Any], draws: list[Draw]) -> bool:
    """Whether a comparison of uniform numbers with one number always ends the same, as at a rate of 0."""
    uniform = all(d.uniform for d in draws)
    return uniform and all((not isinstance(b, Tensor) or b.numel() == 1) and not 0 < float(b) < 1 for b in bounds)
