"""The processes that train together."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gathered", "rank", "world"]


def rank() -> int:
    """This process among those that train together."""
    return torch.distributed.get_rank() if _together() else 0


def world() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if _together() else 1


def gathered(row: Tensor) -> Tensor:
    """The rows of all processes, (world, numbers), alike on each of them."""
    home = torch.device("cuda", torch.cuda.current_device()) if torch.distributed.get_backend() == "nccl" else row.device
    own = row.to(home)
    parts = [torch.empty_like(own) for _ in range(world())]
    torch.distributed.all_gather(parts, own)
    return torch.stack(parts).to(row.device)


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
