"""The processes that train together."""

from __future__ import annotations

import torch

__all__ = ["rank", "world"]


def rank() -> int:
    """This process among those that train together."""
    return torch.distributed.get_rank() if _together() else 0


def world() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if _together() else 1


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
