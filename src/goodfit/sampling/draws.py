"""Which random numbers a model draws in one run, which module draws them, and whether they drop something.

A draw drops when it becomes a mask (by a comparison, rounding or selection) before it meets the data, or when a module with
others inside decides by it, as layer drop does. Random numbers that meet the data as they are, are noise. An operation that
draws and drops at once (attention, recurrent layers on a GPU) is known by its dropout argument.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from goodfit.dataflow.flows import tensors_in

__all__ = ["Draw", "Draws", "elsewhere"]

# names of aten operations, without the underscore of in-place ones
_MASKS = {"bernoulli", "randperm"}
_CUTS = {"argsort", "ceil", "eq", "floor", "ge", "gt", "heaviside", "le", "lt", "ne", "round", "sign", "sort", "topk", "trunc"}
_COMPARE = {"ge", "gt", "le", "lt"}
_SELECT = {"gather", "index", "index_select", "take"}
_READS = {"_local_scalar_dense", "is_nonzero", "nonzero"}
_SCALES = {"_to_copy", "alias", "clone", "copy", "div", "expand", "mul", "squeeze", "unsqueeze", "view", "_unsafe_view"}
_RECURRENT = {"_cudnn_rnn", "miopen_rnn"}
_RATES = {"dropout", "dropout_p"}


@dataclass(eq=False)
class Draw:
    """One draw: the operation, the modules that were running (the last is its owner), and what became of it."""

    op: str
    stack: tuple[str, ...]
    kind: str = ""  # "drops", "decides", "asks", "noise" or "idle"; "" while nothing has used it
    used: set[str] = field(default_factory=set)  # by which operations, up to where it meets the data

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
        self._containers = {name for module, name in self._names.items() if any(True for _ in module.children())}
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
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

    def _enters(self, module: nn.Module, args: Any) -> None:
        self._charge()
        self._stack.append(self._names.get(module, self._stack[-1]))
        self.called.add(self._stack[-1])

    def _leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        self._charge()
        self._stack.pop()

    def _charge(self) -> None:
        if self._watch and (now := elsewhere()) != self._elsewhere:
            self.outside.add(self._stack[-1])
            self._elsewhere = now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(tensors_in([args, kwargs]))
        output = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        op = name if name in _READS else name.rstrip("_")
        outputs = list(tensors_in(output))
        self.largest = max([self.largest, *(t.nbytes for t in outputs if t.untyped_storage().data_ptr() not in self._weights)])
        if _random(func, op, args, kwargs):
            self._drawn(func, op, outputs)
            if self._means and op == "bernoulli":
                outputs[0].copy_(torch.as_tensor(dict(_told(func, args, kwargs)).get("p", args[0])))
        elif any(_place(t) in self._marks for t in inputs):
            self._used(op, args, inputs, outputs)
        return output

    def _drawn(self, func: Any, op: str, outputs: list[Tensor]) -> None:
        draw = Draw(op, tuple(self._stack))
        self.draws.append(draw)
        self.sizes.append(outputs[0].numel())
        if "dropout" in op or any(a.name in _RATES for a in func._schema.arguments):
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
        if op in _READS:
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

    @staticmethod
    def _settle(draws: list[Draw], kind: str) -> None:
        for draw in draws:
            draw.kind = draw.kind or kind


def _place(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _random(func: Any, op: str, args: Any, kwargs: Any) -> bool:
    """Whether an operation draws: not one that is told a rate of 0, or not to train."""
    if torch.Tag.nondeterministic_seeded not in func.tags and op not in _RECURRENT:
        return False
    told = dict(_told(func, args, kwargs))
    if told.get("train", True) is False or told.get("training", True) is False:
        return False
    if op == "bernoulli" and told.get("p") == 1:
        return False
    rates = [told[name] for name in ("p", *_RATES) if isinstance(told.get(name), float | int)]
    return not rates or rates[0] > 0


def _told(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[str, Any]]:
    """Arguments by name, with the defaults of those left out."""
    for i, one in enumerate(func._schema.arguments):
        yield one.name, args[i] if i < len(args) else kwargs.get(one.name, one.default_value)


def _settled(bounds: list[Any], draws: list[Draw]) -> bool:
    """Whether a comparison of uniform numbers with one number always ends the same, as at a rate of 0."""
    uniform = all(d.op in {"rand", "rand_like", "uniform"} for d in draws)
    return uniform and all((not isinstance(b, Tensor) or b.numel() == 1) and not 0 < float(b) < 1 for b in bounds)


def elsewhere() -> tuple[Any, ...]:
    """Where Python's and NumPy's generators stand."""
    state: Any = np.random.get_state()
    return random.getstate(), state[1].tobytes(), state[2]
