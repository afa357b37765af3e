"""A model as it was, to be put back when an edit fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from goodfit.noise import Noisy

__all__ = ["Snapshot"]


class Snapshot:
    """What every module holds, and every hook of an edit: by reference, which is cheap, since edits write no tensor in place.

    Dicts and lists are kept by what is in them; so are the numbers of inserted layers, and whether a parameter is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        held = [one for module in model.modules() for one in (module, *_edits(module))]
        self.kept = [(one, type(one), {k: (v, _items(v)) for k, v in vars(one).items()}) for one in held]
        drawing = [m for m in model.modules() if isinstance(m, Noisy)]
        self.numbers = [(b, b.clone()) for layer in drawing for b in layer.buffers(recurse=False)]
        self.trained = [(p, p.requires_grad) for p in model.parameters()]

    def restore(self) -> None:
        """Put everything back."""
        for one, kind, held in self.kept:
            one.__class__ = kind
            for name in set(vars(one)) - set(held):
                del one.__dict__[name]
            for name, (value, items) in held.items():
                if items is not None:
                    value.clear()
                    value.update(items) if isinstance(items, dict) else value.extend(items)
                one.__dict__[name] = value
        for number, before in self.numbers:
            number.copy_(before)
        for parameter, trained in self.trained:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)


def _items(value: Any) -> dict[Any, Any] | list[Any] | None:
    return dict(value) if isinstance(value, dict) else list(value) if type(value) is list else None


def _edits(module: nn.Module) -> Iterator[Any]:
    """The objects that an edit has hung at a module's hooks, and those that they hold, but for modules."""
    ahead: list[Any] = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    seen: set[int] = set()
    for one in ahead:  # grows as it is walked
        if isinstance(one, dict | list):
            ahead += one.values() if isinstance(one, dict) else one
        elif type(one).__module__.startswith("goodfit.surgery.") and not isinstance(one, nn.Module) and id(one) not in seen:
            seen.add(id(one))
            ahead += vars(one).values()
            yield one
