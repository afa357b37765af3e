"""Drop path: stochastic depth for any model with residual blocks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from goodfit.errors import GoodfitError, GoodfitWarning, listed
from goodfit.hyper import hyper
from goodfit.layers.path import SeededDropPath
from goodfit.phases import Build
from goodfit.surgery.depth import Branch, branches, rate_name
from goodfit.surgery.insert import insert_after, refuse_wrappers
from goodfit.surgery.records import records, remember
from goodfit.surgery.rows import row_axes
from goodfit.where import Where, everything

__all__ = ["DropPath"]


@dataclass(frozen=True)
class DropPath(Build):
    """Drop path, or stochastic depth: in training a row passes by the branch of a residual block with probability p.

    Formula: y = x + f(x) · mask / (1 − p_l) with one Bernoulli(1 − p_l) per row in training; y = x + f(x) in eval. With
        linear, p_l = p · l / L for the l-th of L residual additions in the order of the forward run, as in the paper (timm
        and torchvision count p · (l − 1) / (L − 1) by blocks, so that their first one never drops); else p_l = p. A layer
        that serves several additions in a row has the rate of the last: in `for _ in range(3): x = x + f(x)`, p at each.
    Phase: Build. A layer is inserted behind the module that hands over the branch f(x) of a residual addition: bn3 of a
        bottleneck, the attention and the mlp of a transformer block, dropout1 and dropout2 of nn.TransformerEncoderLayer
        (whose fast path torch leaves where there are hooks). Stochastic depth that the model has, such as
        torchvision.ops.StochasticDepth and the DropPath of timm and transformers, gets the rate and stays the only one; it
        draws from torch's generator. where picks branches by the name of that module; l and L count all. A
        shortcut of one layer is one where the sum is not what the model says (as that of a wide and a deep part), the branch
        serves this sum alone (unlike keys of attention) and is not the way up of a U-Net. The axis of the rows is found by
        repeating and by moving rows of the example. Shapes of tensors stay.
    Numbers: p, the probability that the last block drops a row, in [0, 1), off at 0.
    Errors: p outside [0, 1); a model without residual additions, or where no branch comes from a module or shows its rows;
        none that where picks; with linear, a module that runs in blocks apart; lazy layers; a bare leaf, a DDP or compiled
        wrapper. Branches where it cannot stand are left out, with a warning. A function of the model's own that drops rows
        is not seen.
    Source: Huang et al. 2016, Deep networks with stochastic depth, arXiv 1603.09382.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> model = DropPath(0.4).build(nn.Sequential(layer), torch.zeros(2, 3, 8))
    >>> layer.dropout1.drop_path, layer.dropout2.drop_path
    (SeededDropPath(p=0.2), SeededDropPath(p=0.4))
    """

    p: float = hyper(0.1, valid="[0, 1)", off=0.0, low=0.0, high=0.5)
    where: Where = everything
    linear: bool = True

    def build(self, model: nn.Module, example: Any) -> nn.Module:
        refuse_wrappers(model, "DropPath")
        found, blocks = branches(model, example)
        chosen = [b for b in found if b.module is not None and self.where.holds(b.place, "place")]
        new = {b.name: b.module for b in chosen if b.module is not None and not b.number}
        axes = row_axes(model, example, new)
        usable = [b for b in chosen if b.number or b.name in axes]
        if not usable:
            raise self._refusal(model, found, chosen)
        shares = [self._share(b, blocks) for b in usable]
        self._tell(found, [b for b in chosen if b not in usable])
        names = [b.name if b.number else _insert(b, axes[b.name]) for b in usable]
        remember(model, self._key, dict(zip(names, shares, strict=True)))
        self.tune(model)
        return model

    def tune(self, model: nn.Module) -> None:
        p = self.at(0).p
        for name, share in records(model).get(self._key, {}).items():
            layer = model.get_submodule(name)
            setattr(layer, rate_name(layer), p * share)

    @property
    def _key(self) -> str:
        return f"DropPath(where={self.where!r}, linear={self.linear!r})"

    def _share(self, branch: Branch, blocks: int) -> float:
        if not self.linear:
            return 1.0
        if max(branch.depths) - min(branch.depths) >= len(branch.depths):
            raise GoodfitError(
                f"DropPath cannot give {branch.name} a rate by its depth, since it runs in blocks {listed(branch.depths, 5)}: "
                "say linear=False for one rate."
            )
        return max(branch.depths) / blocks

    def _refusal(self, model: nn.Module, found: list[Branch], chosen: list[Branch]) -> GoodfitError:
        kind, places = type(model).__name__, [b.place for b in found if b.module is not None]
        if not found:
            return GoodfitError(f"DropPath found no residual addition x + f(x) in {kind}; leave it out of the cocktail.")
        if not places:
            return GoodfitError(
                f"DropPath has no place in {kind}: the branch of each residual addition {found[0].reason}; "
                "let an nn.Identity return it."
            )
        if not chosen:
            return GoodfitError(f"DropPath matched no branch (where={self.where}); {kind} has: {listed(places)}.")
        return GoodfitError(
            f"DropPath cannot tell the rows of {chosen[0].name} in {kind}: no axis of its output follows the number of rows "
            "alone, or two do; give an example of numbers that differ, with the batch first, or second, of a size that the "
            "model takes with one row more."
        )

    def _tell(self, found: list[Branch], rowless: list[Branch]) -> None:
        left = [f"block {b.depths[0]}, whose branch {b.reason}" for b in found if b.reason]
        left += [f"{b.name}, whose rows do not show" for b in rowless]
        if left:
            shown = "; ".join(left[:5]) + (f"; and {len(left) - 5} more" if len(left) > 5 else "")
            warnings.warn(f"DropPath leaves out {shown}.", GoodfitWarning, stacklevel=4)


def _insert(branch: Branch, axis: int) -> str:
    host: Any = branch.module
    child = "inserted_drop_path" if hasattr(host, "drop_path") else "drop_path"
    name = f"{branch.name}.{child}"
    insert_after(host, child, SeededDropPath(name, axis=axis))
    return name
