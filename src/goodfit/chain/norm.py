"""Batch normalization of K members."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from goodfit.chain.drop import Drop
from goodfit.chain.passes import Part, Pass, Piece

__all__ = ["Norm"]


@dataclass
class _Statistics:
    """Of all members and features, (K, features, 1). total: the sum over the rows; length: of what is centered, over the rows;
    inverse: 1 / √(var + eps); factor and shift: γ and β, times what dropout scales by.
    """

    by_batch: bool
    eps: Tensor
    zero: Tensor
    total: Tensor
    length: Tensor
    inverse: Tensor
    scale: Tensor | None
    factor: Tensor | None
    shift: Tensor | None


class Norm(Piece):
    """y = γ · (x − mean) / √(var + eps) + β, each feature of each member by itself.

    bias: of the linear layer before, which has not added it. drop: what multiplies by 1 / (1 − p) further on, which γ and β do.
    """

    def __init__(self, layer: nn.BatchNorm1d, name: str) -> None:
        self.layer, self.name = layer, name
        self.bias: str | None = None
        self.drop: Drop | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (f"{self.name}.weight", f"{self.name}.bias") if self.layer.affine else ()

    @property
    def by_batch(self) -> bool:
        """Whether the statistics are those of the batch."""
        return self.layer.training or self.layer.running_mean is None

    def forward(self, part: Part, x: Tensor, free: bool) -> tuple[Tensor, bool]:
        shared = x.ndim == 2
        if shared:
            x, free = x.expand(part.members, *x.shape), False
        known = part.whole.once.get(self) or self._begin(part.whole, x)
        shape, span = tuple(x.shape), part.span
        total, inverse = known.total[span], known.inverse[span]
        to = x if free else part.room((self, "centered"), shape, x)
        if known.by_batch:
            torch.sum(x, -1, keepdim=True, out=total)
            centered = torch.sub(x, total, alpha=1 / shape[-1], out=to)
            length = torch.linalg.vector_norm(centered, 2, -1, True, out=known.length[span])
            torch.addcmul(known.eps, length, length, value=1 / shape[-1], out=inverse).rsqrt_()
        else:
            centered = torch.sub(x, total, out=to)
        factor = inverse if known.factor is None else inverse * known.factor[span]
        y = torch.mul(centered, factor, out=part.room(self, shape, x))
        if known.shift is not None:
            y.add_(known.shift[span])
        part.kept[self] = centered, shared
        return y, True

    def _begin(self, whole: Pass, x: Tensor) -> _Statistics:
        if self.layer.training and whole.rows == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {(1, x.shape[-2])}")
        draw = self.drop.draw(whole, x) if self.drop else None
        scale = None if draw is None else draw.scale
        learned = [whole.params[name].unsqueeze(-1) for name in self.names]
        if scale is not None:
            learned = [one * scale for one in learned]
        factor, shift = learned or (scale, None)
        eps = whole.room((self, "eps"), (), x).fill_(self.layer.eps)
        if self.by_batch:
            shape = (whole.members, x.shape[-2], 1)
            total, length, inverse = (whole.room((self, what), shape, x) for what in ("total", "length", "inverse"))
        else:
            total, length = (whole.buffers[f"{self.name}.running_{what}"].unsqueeze(-1) for what in ("mean", "var"))
            inverse = (length + eps).rsqrt_()
        zero = torch.zeros_like(inverse)
        whole.once[self] = known = _Statistics(self.by_batch, eps, zero, total, length, inverse, scale, factor, shift)
        return known

    def after_forward(self, whole: Pass) -> None:
        """The running statistics move, by the unbiased variance and with the bias that was left out."""
        if not self.layer.training or self.layer.running_mean is None:
            return
        known: _Statistics = whole.once[self]
        batches = whole.buffers[f"{self.name}.num_batches_tracked"].add_(1)
        mean, length = known.total.squeeze(-1) / whole.rows, known.length.squeeze(-1)
        share = 1 / batches.view(-1, 1).to(mean.dtype) if self.layer.momentum is None else self.layer.momentum
        if self.bias is not None:
            mean = mean + whole.params[self.bias]
        whole.buffers[f"{self.name}.running_mean"].lerp_(mean, share)
        whole.buffers[f"{self.name}.running_var"].lerp_(length.square().div_(whole.rows - 1), share)

    def backward(self, part: Part, g: Tensor, free: bool, wanted: bool) -> tuple[Tensor, bool]:
        known: _Statistics = part.whole.once[self]
        centered, shared = part.kept[self]
        gradients = [part.gradients.get(name) for name in self.names] or [None, None]
        asked = [wanted, *(gradient is not None for gradient in gradients)]
        if not any(asked):
            return g, free
        x, *found = (_by_batch if known.by_batch else _fixed)(known, part.span, g, centered, asked)
        scale = 1 if known.scale is None else known.scale[part.span].squeeze(-1)
        for gradient, one in zip(gradients, found, strict=True):
            if gradient is not None and one is not None:
                torch.mul(one.view(gradient.shape), scale, out=gradient)
        if x is None:
            return g, free
        return (x.sum(0) if shared else x), True


def _by_batch(known: _Statistics, span: slice, g: Tensor, centered: Tensor, asked: list[bool]) -> tuple[Tensor | None, ...]:
    """Each feature of each member as a group of its own, of one sample: torch's fastest kernel where rows are last."""
    inverse, zero = known.inverse[span], known.zero[span]
    factor = torch.ones_like(inverse) if known.factor is None else known.factor[span].expand(inverse.shape)
    groups, rows = inverse.numel(), g.shape[-1]
    flat = (1, groups, rows)
    x, weight, bias = torch.ops.aten.native_group_norm_backward(
        g.reshape(flat),
        centered.view(flat),
        zero.view(1, groups),
        inverse.view(1, groups),
        factor.reshape(groups),
        1,
        groups,
        rows,
        groups,
        asked,
    )
    return (x.view(g.shape) if asked[0] else None), weight, bias


def _fixed(known: _Statistics, span: slice, g: Tensor, centered: Tensor, asked: list[bool]) -> tuple[Tensor | None, ...]:
    inverse = known.inverse[span]
    return (
        g * (inverse if known.factor is None else inverse * known.factor[span]) if asked[0] else None,
        (g * centered).sum(-1, keepdim=True).mul_(inverse) if asked[1] else None,
        g.sum(-1) if asked[2] else None,
    )
