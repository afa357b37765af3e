"""Norms that go on as the batch norm did whose place they take: with an activation in the same module, say."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Followed", "FollowedGroupNorm"]


class Followed(nn.Module):
    """Mixin for a norm that hands its output to children of its own, in order; a child inserted by a hook is none of them."""

    followers: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        for name in self.followers:
            y = self.get_submodule(name)(y)
        return y


class FollowedGroupNorm(Followed, nn.GroupNorm):
    """Group normalization, then the followers."""
