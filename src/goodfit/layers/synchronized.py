"""Batch normalization whose statistics are those of the rows of all processes, for the CPU, for which torch has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from goodfit.errors import GoodfitError
from goodfit.layers.followed import Followed
from goodfit.processes import world

__all__ = ["FollowedSyncBatchNorm", "FollowedTorchSyncBatchNorm", "SyncBatchNorm", "synchronized"]


class SyncBatchNorm(_BatchNorm):
    """Batch norm over all processes, of any device: they exchange the sums, and the gradients of the sums."""

    def forward(self, x: Tensor) -> Tensor:
        by_batch = self.training or self.running_mean is None
        if not by_batch or world() == 1:
            normed: Tensor = super().forward(x)
            return normed
        self._check_input_dim(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = _over_processes(x.new_tensor([x.numel() // x.shape[1]], dtype=torch.float64))
        if count.item() < 2:
            raise GoodfitError("A synchronized batch norm needs two values per channel over all processes, got one; give more.")
        mean = _over_processes(x.sum(axes)) / count.to(x.dtype)
        centered = x - mean.view(shape)
        var = _over_processes(centered.square().sum(axes)) / count.to(x.dtype)
        if self.training:
            self._move(mean.detach(), var.detach() * (count / (count - 1)).to(x.dtype))
        y = centered * (var + self.eps).rsqrt().view(shape)
        return y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"expected at least 2D input (got {x.ndim}D input)")

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor) -> None:
        """The running statistics, as torch moves them: by the unbiased variance."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_(var.to(self.running_var.dtype), share)


class FollowedSyncBatchNorm(Followed, SyncBatchNorm):
    """Synchronized batch normalization, then the followers."""


class FollowedTorchSyncBatchNorm(Followed, nn.SyncBatchNorm):
    """The same with torch's own."""


def synchronized(device: torch.device) -> type[SyncBatchNorm] | type[nn.SyncBatchNorm]:
    """The synchronized batch norm of a device: torch's, where it has a kernel."""
    return SyncBatchNorm if device.type == "cpu" else nn.SyncBatchNorm


class _Summed(torch.autograd.Function):
    """The sums of all processes; what flows back is summed as well."""

    @staticmethod
    def forward(context: Any, sums: Tensor) -> Tensor:
        total = sums.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total)
        return total


def _over_processes(sums: Tensor) -> Tensor:
    total: Tensor = _Summed.apply(sums)  # type: ignore[no-untyped-call]
    return total
