"""What shrinking did: the result, and its table."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from goodfit.shrinking.attention import heads_lost
from goodfit.shrinking.choice import Choice
from goodfit.shrinking.slicing import owner

__all__ = ["BENIGN", "Shrunk", "kept_zeros", "what_went"]

# zero units that are needed where they are, so that a model which was shrunk can be shrunk again
BENIGN = {
    "carries the constants of others, which padding needs",
    "is the last of its layer",
    "is the last group of its layer",
}


@dataclass(frozen=True)
class Shrunk:
    """What `gf.shrink` returns. Pairs are (before, after); latency is in milliseconds, the median of
    alternating measurements."""

    model: nn.Module
    parameters: tuple[int, int]
    flops: tuple[int, int]
    latency: tuple[float, float]
    removed: tuple[tuple[str, str, int, int], ...]  # layer, what, how many, of how many
    kept: tuple[tuple[str, int, str], ...]  # weight, how many zero units stay in it, why
    inputs: dict[str, tuple[int, ...]]  # layer → the input features that it still takes
    error: float  # the largest difference of outputs, relative to the largest output

    def __str__(self) -> str:
        lines = [f"{'':12}{'before':>16}{'after':>16}"]
        lines += [f"{name:12}{a:>16,}{b:>16,}" for name, (a, b) in (("parameters", self.parameters), ("FLOPs", self.flops))]
        lines += [f"{'latency, ms':12}{self.latency[0]:>16.3f}{self.latency[1]:>16.3f}"]
        lines += [f"largest relative difference of outputs: {self.error:.1e}", ""]
        lines += [f"{name}: {count} of {total} {what} removed" for name, what, count, total in self.removed] or ["0 removed"]
        lines += [f"{name}: {count} zero units kept: {reason}" for name, count, reason in self.kept]
        return "\n".join(lines)


def what_went(model: nn.Module, choice: Choice, inputs: dict[str, Tensor]) -> list[tuple[str, str, int, int]]:
    """Per layer: what went, how many, of how many; heads of attention beside its units."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[tuple[str, str], tuple[int, int]] = {}
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for reader in choice.run.readers:
        if reader.name:
            rows[reader.name].append(reader.rows)
    for name, parts in rows.items():
        ids = torch.unique(torch.cat(parts))
        kind = "filters" if isinstance(owner(model, name)[0], _ConvNd) else "units"
        found[name.rpartition(".")[0], kind] = int(choice.gone(ids).sum()), len(ids)
    for axis in choice.run.slices.axes:
        if axis.axis == 1 and isinstance(owner(model, axis.name)[0], nn.Embedding):
            found[axis.name.rpartition(".")[0], "features"] = int((~choice.stays(axis)).sum()), axis.size
    for module, lost in heads_lost(choice).items():
        found[names[module], "heads"] = lost
    for name, taken in inputs.items():
        total = next(len(reader.columns) for reader in choice.run.readers if reader.name == name)
        found[name.rpartition(".")[0], "inputs"] = total - len(taken), total
    return [(path, what, count, total) for (path, what), (count, total) in found.items() if count]


def kept_zeros(choice: Choice) -> list[tuple[str, int, str]]:
    """Rows of weights that are zero and stay, counted by weight and reason."""
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for reader in choice.run.readers:
        if not reader.name or not reader.live:
            continue
        zero = ~reader.live_weights().any(1) & ~choice.gone(reader.rows)
        for row, one in zip(reader.rows[zero].tolist(), choice.label[reader.rows[zero]].tolist(), strict=True):
            found[reader.name, choice.reasons.get(one, "is read by nothing that is known")].add(row)
    return [(name, len(rows), reason) for (name, reason), rows in found.items()]
