"""A model as it was, to be put back when an edit fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from goodfit.noise import Noisy

__all__ = ["Snapshot"]


class Snapshot:
    """What every module and every hook of ours holds, by reference: cheap, and enough since edits write no tensor in place.

    Two things are written in place, and kept by value: the numbers of inserted layers, and whether a parameter is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kept = [
            (one, type(one), {k: (v, dict(v)) if isinstance(v, dict) else (v, None) for k, v in vars(one).items()})
            for module in model.modules()
            for one in (module, *_hooks(module))
        ]
        drawing = [m for m in model.modules() if isinstance(m, Noisy) and isinstance(m, nn.Module)]
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
                    value.update(items)
                one.__dict__[name] = value
        for number, before in self.numbers:
            number.copy_(before)
        for parameter, trained in self.trained:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)


def _hooks(module: nn.Module) -> Iterator[Any]:
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if type(hook).__module__.startswith("goodfit."):
            yield hook
