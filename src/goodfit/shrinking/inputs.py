"""Input features that a first layer ignores: a layer before it takes the others."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from goodfit.shrinking.choice import Choice
from goodfit.shrinking.slicing import owner
from goodfit.surgery.insert import insert_before

__all__ = ["Take", "ignored", "take"]


class Take(nn.Module):
    """Lets the listed features pass, so that a layer with fewer inputs still accepts the old ones."""

    indices: Tensor

    def __init__(self, indices: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("indices", indices)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features, ...) → (..., features taken, ...)."""
        return x.index_select(self.dim, self.indices)


def ignored(model: nn.Module, choice: Choice, shared: dict[str, str]) -> dict[str, Tensor]:
    """Weights of layers that read the model's input, with the columns that they need."""
    found: dict[str, Tensor] = {}
    for reader in choice.run.readers:
        if not (reader.live and reader.raw and reader.name and reader.groups == 1) or reader.name in shared:
            continue
        module, attribute = owner(model, reader.name)
        known = attribute == "weight" and isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, _ConvTransposeNd)
        needed = choice.needed(reader)
        needed[0] |= not needed.any()
        if known and len(needed) == module.weight.shape[1] and not needed.all():
            found[reader.name] = needed.nonzero().flatten()
    return found


def take(model: nn.Module, needed: dict[str, Tensor]) -> None:
    """Narrow these layers, and put before each a layer that takes what it needs."""
    for name, indices in needed.items():
        module: Any = owner(model, name)[0]
        indices = indices.to(module.weight.device)
        weight = module.weight.detach().index_select(1, indices)
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        if isinstance(module, nn.Linear):
            module.in_features = len(indices)
        else:
            module.in_channels = len(indices)
        if isinstance(getattr(module, "take", None), Take):
            module._modules["take"] = Take(module.take.indices[indices], module.take.dim)
        else:
            insert_before(module, "take", Take(indices, 1 - module.weight.ndim))
