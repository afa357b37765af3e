"""What folding did: the result, and its table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

__all__ = ["Folded"]


@dataclass(frozen=True)
class Folded:
    """What `gf.fold_batchnorm` returns. latency is (before, after) in milliseconds, medians of alternating measurements."""

    model: nn.Module
    folded: tuple[tuple[str, str], ...]  # batch norm, the layer that took it up
    kept: tuple[tuple[str, str], ...]  # batch norm, why it stays
    latency: tuple[float, float]
    error: float  # the largest difference of outputs, relative to the largest output

    def __str__(self) -> str:
        total = len(self.folded) + len(self.kept)
        lines = [f"{len(self.folded)} of {total} batch norms folded" if total else "no batch norm to fold"]
        lines += [f"latency, ms: {self.latency[0]:.3f} before, {self.latency[1]:.3f} after"]
        lines += [f"largest relative difference of outputs: {self.error:.1e}", ""]
        lines += [f"{norm}: folded into {layer}" for norm, layer in self.folded]
        lines += [f"{norm} {reason}" for norm, reason in self.kept]
        return "\n".join(lines).rstrip()
