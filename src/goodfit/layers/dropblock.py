"""DropBlock: dropout of whole regions of a feature map."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from goodfit.errors import GoodfitError
from goodfit.layers.dropout import SeededLayer

__all__ = ["SeededDropBlock"]


class SeededDropBlock(SeededLayer):
    """Blocks of a map are zero, in each channel by themselves; the rest is scaled by all over kept, of the whole batch.

    size: the side of a block, cut to the map. ndim: the rank of a batch of maps, 3 to 5.
    """

    def __init__(self, name: str = "dropblock", p: float = 0.0, size: int = 7, ndim: int = 4) -> None:
        super().__init__(name, p)
        self.size, self.ndim = size, ndim

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, size={self.size}"

    def noisy(self, x: Tensor) -> Tensor:
        if x.ndim != self.ndim:
            raise GoodfitError(
                f"{self.name} drops blocks of a batch of rank {self.ndim}, (N, C, ...), got {tuple(x.shape)}: "
                "give a batch as in the example the model was built on."
            )
        block = [min(self.size, length) for length in x.shape[2:]]
        corners = [length - side + 1 for length, side in zip(x.shape[2:], block, strict=True)]
        gamma = self.rate * (prod(x.shape[2:]) / prod(block) / prod(corners))
        hit = self.draw(torch.Size((*x.shape[:2], *corners)), x.device) < gamma
        hit = F.pad(hit, [pad for side in reversed(block) for pad in (0, side - 1)])
        for axis, side in enumerate(block, 2):
            hit = _spread(hit, axis, side)
        share = (~hit).sum().clamp(min=1).to(torch.float64) / hit.numel()
        return x * (1 / share) * ~hit


def _spread(hit: Tensor, axis: int, side: int) -> Tensor:
    """Let each hit cover `side` places from its own on; where nothing hits the last `side` − 1, none comes round the end."""
    covered = 1
    while covered < side:
        more = min(covered, side - covered)
        hit = hit | hit.roll(more, axis)
        covered += more
    return hit
