"""The tensors of K models, each in one tensor with an axis for the members, of which the models hold views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Members", "release"]


class Members:
    """The weights and buffers of models of one kind.

    weights: by name, (K, *shape) leaves, those that are trained with a gradient. buffers: the same, those included that no
    `state_dict` holds. What is written into them is written into the models, and the other way round.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = list(models)
        first = dict(self.models[0].named_parameters())
        each = [dict(model.named_parameters()) for model in models]
        stacked = {name: torch.stack([one[name].detach() for one in each]) for name in first}
        self.weights = {name: t.requires_grad_(first[name].requires_grad) for name, t in stacked.items()}
        held = [dict(model.named_buffers()) for model in models]
        self.buffers = {name: torch.stack([one[name] for one in held]) for name in held[0]}
        self._point()

    @property
    def count(self) -> int:
        """How many members there are."""
        return len(self.models)

    def keep(self, rows: Tensor) -> None:
        """Go on with these members; the others keep tensors of their own."""
        left = set(rows.tolist())
        for i, model in enumerate(self.models):
            if i not in left:
                release(model)
        self.models = [self.models[i] for i in rows.tolist()]
        with torch.no_grad():
            self.weights = {n: t[rows.to(t.device)].requires_grad_(t.requires_grad) for n, t in self.weights.items()}
            self.buffers = {n: t[rows.to(t.device)] for n, t in self.buffers.items()}
        self._point()

    def _point(self) -> None:
        for i, model in enumerate(self.models):
            for name, p in model.named_parameters():
                p.data = self.weights[name].data[i]
            views = {name: t[i] for name, t in self.buffers.items()}
            for name, home, leaf in _buffers(model):
                home._buffers[leaf] = views[name]


def release(model: nn.Module) -> None:
    """Give a model tensors of its own in the place of views."""
    for p in model.parameters():
        p.data = p.data.clone()
    own = {name: t.clone() for name, t in model.named_buffers()}
    for name, home, leaf in _buffers(model):
        home._buffers[leaf] = own[name]


def _buffers(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Each place of a buffer: the first name of the tensor that it holds, the module, and the name there."""
    first = {id(t): name for name, t in reversed(list(model.named_buffers(remove_duplicate=False)))}
    found = []
    for name, t in model.named_buffers(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        found.append((first[id(t)], model.get_submodule(path), leaf))
    return found
