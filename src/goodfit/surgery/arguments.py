"""The inputs of a model by name, and a layer that acts on one of them.

An input is named after the parameter of `forward` that it goes into, whether it is handed over by position or by keyword:
"x"; within a dict or tuple "x.mask" or "x.0".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from goodfit.surgery.insert import hang, hung

__all__ = ["insert_on_input", "named_inputs", "runs_on_input"]


def named_inputs(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """All tensors that go into a model, by name, for one input batch."""
    args = () if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)
    found: dict[str, Tensor] = {}

    def note(name: str, t: Tensor) -> Tensor:
        found[name] = t
        return t

    _mapped_inputs(model, args, example if isinstance(example, dict) else {}, note)
    return found


def insert_on_input(model: nn.Module, name: str, child: str, layer: nn.Module) -> None:
    """Let `layer` act on this input of `model`."""
    hang(model, child, layer)
    model.register_forward_pre_hook(_OnInput(name, child), with_kwargs=True)


def runs_on_input(hook: object, name: str) -> str | None:
    """The child that a hook of ours runs on this input, None for any other hook."""
    return hook.child if isinstance(hook, _OnInput) and hook.name == name else None


class _OnInput:
    """A hook that knows its layer by name only, as those of `insert`."""

    def __init__(self, name: str, child: str) -> None:
        self.name, self.child = name, child

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = hung(model, self.child)
        if not layer.training:
            return None
        return _mapped_inputs(model, args, kwargs, lambda name, t: layer(t) if name == self.name else t)


def _mapped_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], f: Callable[[str, Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    for name, value in bound.arguments.items():
        bound.arguments[name] = _mapped(name, value, f)
    return bound.args, bound.kwargs


def _mapped(name: str, value: Any, f: Callable[[str, Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return f(name, value)
    if isinstance(value, dict):
        return {key: _mapped(f"{name}.{key}", one, f) for key, one in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_mapped(f"{name}.{i}", one, f) for i, one in enumerate(value))
    return value
