"""Parts of an input that are cut: columns of a table, boxes of images."""

from __future__ import annotations

import torch
from torch import Tensor

from goodfit.errors import GoodfitError
from goodfit.noise import Noise

__all__ = ["patches"]


def patches(found: dict[str, Tensor], share: Tensor, noise: Noise, who: str) -> tuple[dict[str, Tensor], Tensor]:
    """What is cut of each tensor, as booleans that broadcast to it, and all of it at once.

    share: how much, (1, 1) for one patch that all rows share, (rows, 1) for one each; it says where the draws are made, too.
    The columns of several tensors are those of one table; several images have one box.
    """
    sizes = {t.shape[2:] for t in found.values()}
    if all(t.ndim <= 2 for t in found.values()):
        widths = [t.shape[1] if t.ndim == 2 else 1 for t in found.values()]
        whole = _columns(sum(widths), share, noise)
        parts = zip(found.items(), torch.split(whole, widths, dim=1), strict=True)
        return {name: part if t.ndim == 2 else part[:, 0] for (name, t), part in parts}, whole
    if all(t.ndim == 4 for t in found.values()) and len(sizes) == 1:
        height, width = sizes.pop()
        whole = _boxes(height, width, share, noise)
        return dict.fromkeys(found, whole[:, None]), whole
    shapes = ", ".join(f"{name} of shape {tuple(t.shape)}" for name, t in found.items())
    raise GoodfitError(
        f"{who} cuts tables (rows, columns) or images (rows, channels, height, width) of one size, got {shapes}; leave it out "
        "of the cocktail."
    )


def _columns(count: int, share: Tensor, noise: Noise) -> Tensor:
    """(rows, columns): a random round(share · count) of them in each row."""
    rank = noise.uniform(len(share), count, device=share.device).argsort(dim=1, stable=True).argsort(1)
    return rank < (share * count).round()


def _boxes(height: int, width: int, share: Tensor, noise: Noise) -> Tensor:
    """(rows, height, width): a box of that share of the area around a point anywhere, cut off at the border."""
    points = noise.uniform(2, len(share), 1, device=share.device)

    def inside(size: int, point: Tensor) -> Tensor:
        length = (size * share.sqrt()).round()
        start = (size * point).floor() - (length / 2).floor()
        at = torch.arange(size, device=share.device)
        return (at >= start) & (at < start + length)

    return inside(height, points[0])[:, :, None] & inside(width, points[1])[:, None, :]
