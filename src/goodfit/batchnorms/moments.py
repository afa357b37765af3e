"""Mean and variance per channel over many batches, as if they were one."""

from __future__ import annotations

import torch
from torch import Tensor

from goodfit.processes import world

__all__ = ["Moments"]


class Moments:
    """How many values per channel were seen, their mean, and the sum of their squared deviations, in double precision.

    Merged by the formula of Chan, Golub and LeVeque (1983), which loses no digits where a mean is large beside its spread.
    """

    def __init__(self, like: Tensor) -> None:
        self.count = 0.0
        self.mean = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
        self.squares = torch.zeros_like(self.mean)

    def see(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Merge values with their channels on axis 1; their own mean and variance."""
        var, mean = torch.var_mean(x.double(), [axis for axis in range(x.ndim) if axis != 1], correction=0)
        count = x.numel() // x.shape[1]
        self.add(count, mean, var * count)
        return mean, var

    def add(self, count: float, mean: Tensor, squares: Tensor) -> None:
        """Merge another set of values."""
        total = self.count + count
        gap = mean - self.mean
        self.mean = self.mean + gap * (count / total)
        self.squares = self.squares + squares + gap.square() * (self.count * count / total)
        self.count = total

    @property
    def var(self) -> Tensor:
        """The population variance."""
        return self.squares / self.count

    def over_processes(self) -> None:
        """Merge what the processes of a group have seen, each of its share of the data."""
        own = torch.cat([torch.full_like(self.mean[:1], self.count), self.mean, self.squares])
        parts = [torch.empty_like(own) for _ in range(world())]
        torch.distributed.all_gather(parts, own)
        self.count, self.mean, self.squares = 0.0, torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        for part in parts:
            if part[0] > 0:
                self.add(float(part[0]), *part[1:].chunk(2))
