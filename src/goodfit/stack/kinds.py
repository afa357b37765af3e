"""What two models must have in common to be computed as one."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from goodfit.noise import Noisy

__all__ = ["kind_of"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), slice, range, torch.device, torch.dtype, types.ModuleType)
_TORCH = frozenset(vars(nn.Module())) - {"training"}
_DEPTH = 12
_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that was made by Python code
Seen = dict[int, tuple[Any, Any]]
"""What stands for an object that was met before, by its identity, and the object, so that the identity stays its own."""


def kind_of(model: nn.Module) -> Hashable:
    """Equal for models that differ in the numbers of their tensors alone; those of inserted layers, as rates, are tensors.

    What cannot be looked into is known by its identity, and so never equal to another.
    """
    seen: Seen = {id(module): (name, module) for name, module in model.named_modules()}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    first = {id(t): name for name, t in reversed(named)}
    own = tuple((name, first[id(t)]) for name, t in named)  # what is tied to what
    modules = model.named_modules(remove_duplicate=False)
    return own, tuple((name, *_kind(module, seen)) for name, module in modules)


def _kind(module: nn.Module, seen: Seen) -> tuple[Any, ...]:
    held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    tensors = tuple((n, type(t), tuple(t.shape), t.dtype, t.device, t.requires_grad) for n, t in held)
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    told = len(module._forward_hooks_with_kwargs), len(module._forward_pre_hooks_with_kwargs)
    kind = type(module).__bases__ if is_parametrized(module) else type(module)  # torch makes a class for each such module
    own = {k: v for k, v in vars(module).items() if k not in _TORCH and not k.startswith("goodfit_")}
    if isinstance(module, Noisy):
        own = {k: v for k, v in own.items() if k not in ("clock", "_now", "_calls", "_pending", "_kept")}
    return kind, _value(own, seen), tensors, told, tuple(_value(hook, seen) for hook in hooks)


def _value(value: Any, seen: Seen, depth: int = 0) -> Hashable:
    """A value as something to compare."""
    if isinstance(value, type):
        return value
    if isinstance(value, _PLAIN):
        return repr(value)
    if id(value) in seen:
        return f"the one at {seen[id(value)][0]!r}"
    if depth > _DEPTH or isinstance(value, Tensor):
        return f"this one, {id(value)}"
    seen[id(value)] = len(seen), value
    if type(value) in (dict, OrderedDict):
        return ("dict", *((_value(k, seen, depth + 1), _value(v, seen, depth + 1)) for k, v in value.items()))
    if type(value) in (list, tuple):
        return (type(value).__name__, *(_value(v, seen, depth + 1) for v in value))
    if isinstance(value, types.FunctionType):
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        return value.__code__, _value((value.__defaults__, value.__kwdefaults__, cells, value.__dict__), seen, depth + 1)
    if isinstance(value, partial):
        return "partial", _value((value.func, value.args, value.keywords, value.__dict__), seen, depth + 1)
    if isinstance(value, types.MethodType | types.BuiltinFunctionType):
        function = getattr(value, "__func__", value.__qualname__)
        return _value(function, seen, depth + 1), _value(value.__self__, seen, depth + 1)
    if type(value).__module__ == "_thread":  # what a thread holds, or locks, is empty between two passes
        return repr(type(value))
    if isinstance(value, nn.Module) or not all(map(_plainly_made, type(value).__mro__[:-1])):
        return f"this one, {id(value)}"
    return type(value), _value(dict(vars(value)), seen, depth + 1)


def _plainly_made(kind: type) -> bool:
    """Whether objects of a class hold in their `__dict__` all that they hold."""
    return bool(kind.__flags__ & _HEAP) and not vars(kind).get("__slots__", ())
