"""Ghost batch normalization: statistics over few rows, whatever the size of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from goodfit.layers.followed import Followed

__all__ = ["GhostBatchNorm", "GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d"]

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


class _Chunked(_BatchNorm):
    size: int = 32

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, size={self.size}"  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) <= self.size:
            return super().forward(x)
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        whole = len(x) // self.size
        if len(x) % self.size * x[0, 0].numel() == 1:  # one value per channel has no variance: its row joins a chunk
            whole -= 1
        parts = [(part, k) for part, k in ((x[: whole * self.size], whole), (x[whole * self.size :], 1)) if len(part)]
        done = [self._normalized(part, k) for part, k in parts]
        rate = self._rate()
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            for i, running in enumerate((self.running_mean, self.running_var), start=1):
                shares = [one[i] * (len(one[0]) / len(x)) for one in done]
                running.mul_(1 - rate).add_(torch.stack(shares).sum(0), alpha=rate)
        y = torch.cat([one[0] for one in done]) if len(done) > 1 else done[0][0]
        channels_last = x.ndim in _LAYOUTS and x.stride(1) == 1 and x.stride(-1) == x.shape[1] > 1
        return y.contiguous(memory_format=_LAYOUTS[x.ndim]) if channels_last else y

    def _rate(self) -> float:
        """The share of this batch in the running statistics, counted as torch counts."""
        if self.num_batches_tracked is not None and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return self.momentum or 0.0

    def _normalized(self, x: Tensor, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each of some equally long chunks by its own statistics, and their mean: one norm of chunks · C channels."""
        like = x if self.running_mean is None else self.running_mean
        mean, var = (like.new_zeros(chunks * x.shape[1]) for _ in range(2))
        weight, bias = (None if p is None else p.repeat(chunks) for p in (self.weight, self.bias))
        folded = torch.unflatten(x, 0, (chunks, -1)).transpose(0, 1).flatten(1, 2)
        y = F.batch_norm(folded, mean, var, weight, bias, True, 1.0, self.eps)  # momentum 1: the statistics themselves
        y = torch.unflatten(y, 1, (chunks, -1)).transpose(0, 1).flatten(0, 1)
        return y, mean.view(chunks, -1).mean(0), var.view(chunks, -1).mean(0)


class GhostBatchNorm(Followed, _Chunked):
    """Batch norm that in training normalizes each `size` consecutive rows by statistics of their own.

    The last rows are a smaller chunk. A batch of at most `size` rows, and eval, are torch's own. The running statistics
    move once per batch, by the momentum, toward the chunks' mean and unbiased variance, averaged by rows: so the running mean
    is that of a plain batch norm, and the running variance the one within chunks, which training divides by.
    """


class GhostBatchNorm1d(GhostBatchNorm, nn.BatchNorm1d):
    """For (N, C) and (N, C, L)."""


class GhostBatchNorm2d(GhostBatchNorm, nn.BatchNorm2d):
    """For (N, C, H, W)."""


class GhostBatchNorm3d(GhostBatchNorm, nn.BatchNorm3d):
    """For (N, C, D, H, W)."""
