"""A model as it was, to be put back when an edit fails."""

from __future__ import annotations

from torch import nn

__all__ = ["Snapshot"]


class Snapshot:
    """What every module holds, by reference: cheap, and enough since no tensor is ever written in place."""

    def __init__(self, model: nn.Module) -> None:
        self.kept = [
            (m, type(m), {k: (v, dict(v)) if isinstance(v, dict) else (v, None) for k, v in vars(m).items()})
            for m in model.modules()
        ]

    def restore(self) -> None:
        """Put everything back."""
        for module, kind, held in self.kept:
            module.__class__ = kind
            for name in set(vars(module)) - set(held):
                del module.__dict__[name]
            for name, (value, items) in held.items():
                if items is not None:
                    value.clear()
                    value.update(items)
                module.__dict__[name] = value
