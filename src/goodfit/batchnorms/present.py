"""Which batch norms of a model normalize by their batch now."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["by_batch"]


def by_batch(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms in train mode by name; a frozen one is in eval mode."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training}
