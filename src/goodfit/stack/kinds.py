"""What two models must have in common to be computed as one."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import nn

from goodfit.noise import Noisy

__all__ = ["kind_of"]

_PLAIN = (bool, int, float, str, tuple, type(None))


def kind_of(model: nn.Module) -> Hashable:
    """Equal for models that differ in the numbers of their tensors alone; those of inserted layers, as rates, are tensors."""
    return tuple((name, *_kind(module)) for name, module in model.named_modules(remove_duplicate=False))


def _kind(module: nn.Module) -> tuple[Any, ...]:
    held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    tensors = tuple((n, type(t), tuple(t.shape), t.dtype, t.device, t.requires_grad) for n, t in held)
    hooks: list[Any] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return type(module), _fields(module), tensors, tuple((type(hook), _fields(hook)) for hook in hooks)


def _fields(one: Any) -> tuple[Hashable, ...]:
    """What it holds that is no tensor; of an object that cannot be looked into, which one it is."""
    held = {k: v for k, v in getattr(one, "__dict__", {}).items() if not k.startswith(("_", "goodfit_"))}
    if isinstance(one, Noisy):
        held.pop("clock")
    return tuple(sorted((k, repr(v) if isinstance(v, _PLAIN) else _known(v)) for k, v in held.items()))


def _known(value: Any) -> str:
    if isinstance(value, nn.Module):
        return ""  # it has a name of its own
    return f"{type(value).__qualname__} {getattr(value, '__qualname__', id(value))}"
