"""What acts on the branches of residual blocks: one layer per branch, with a rate by its depth."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, ClassVar

from torch import nn

from goodfit.errors import GoodfitError, GoodfitWarning, listed
from goodfit.layers.path import SeededDropPath
from goodfit.phases import Build
from goodfit.surgery.depth import Branch, branches, rate_name
from goodfit.surgery.insert import insert_after, refuse_wrappers
from goodfit.surgery.records import records, remember
from goodfit.surgery.rows import row_axes
from goodfit.where import Where

__all__ = ["Branching"]


class Branching(Build):
    """A layer behind the module that hands over a branch, or the rate of the layer that is there."""

    p: float
    where: Where
    linear: bool

    made: ClassVar[type[SeededDropPath]]
    """The layer that is inserted."""

    child: ClassVar[str]
    """Its name in its host."""

    @abstractmethod
    def knows(self, layer: nn.Module) -> bool:
        """Whether a layer that acts on a branch already is of this kind."""

    def build(self, model: nn.Module, example: Any) -> nn.Module:
        refuse_wrappers(model, type(self).__name__)
        found, blocks = branches(model, example)
        chosen = [b for b in found if b.module is not None and self.where.holds(b.place, "place")]
        self._refuse_other(chosen)
        new = {b.name: b.module for b in chosen if b.module is not None and not b.number}
        axes = row_axes(model, example, new)
        usable = [b for b in chosen if b.number or b.name in axes]
        if not usable:
            raise self._refusal(model, found, chosen)
        shares = [self._share(b, blocks) for b in usable]
        self._tell(found, [b for b in chosen if b not in usable])
        names = [b.name if b.number else self._insert(b, axes[b.name]) for b in usable]
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
        return f"{type(self).__name__}(where={self.where!r}, linear={self.linear!r})"

    def _refuse_other(self, chosen: list[Branch]) -> None:
        for b in chosen:
            if b.number and b.module is not None and not self.knows(b.module):
                raise GoodfitError(
                    f"{type(self).__name__} finds {type(b.module).__name__} at {b.name}, and a branch takes one of them: leave "
                    "one out, or keep them apart by where."
                )

    def _share(self, branch: Branch, blocks: int) -> float:
        if not self.linear:
            return 1.0
        if max(branch.depths) - min(branch.depths) >= len(branch.depths):
            raise GoodfitError(
                f"{type(self).__name__} cannot give {branch.name} a rate by its depth, since it runs in blocks "
                f"{listed(branch.depths, 5)}: say linear=False for one rate."
            )
        return max(branch.depths) / blocks

    def _refusal(self, model: nn.Module, found: list[Branch], chosen: list[Branch]) -> GoodfitError:
        who, kind = type(self).__name__, type(model).__name__
        places = [b.place for b in found if b.module is not None]
        if not found:
            return GoodfitError(f"{who} found no residual addition x + f(x) in {kind}; leave it out of the cocktail.")
        if not places:
            return GoodfitError(
                f"{who} has no place in {kind}: the branch of each residual addition {found[0].reason}; "
                "let an nn.Identity return it."
            )
        if not chosen:
            return GoodfitError(f"{who} matched no branch (where={self.where}); {kind} has: {listed(places)}.")
        return GoodfitError(
            f"{who} cannot tell the rows of {chosen[0].name} in {kind}: no axis of its output follows the number of rows "
            "alone, or two do; give an example of numbers that differ, with the batch first, or second, of a size that the "
            "model takes with one row more."
        )

    def _tell(self, found: list[Branch], rowless: list[Branch]) -> None:
        left = [f"block {b.depths[0]}, whose branch {b.reason}" for b in found if b.reason]
        left += [f"{b.name}, whose rows do not show" for b in rowless]
        if left:
            shown = "; ".join(left[:5]) + (f"; and {len(left) - 5} more" if len(left) > 5 else "")
            warnings.warn(f"{type(self).__name__} leaves out {shown}.", GoodfitWarning, stacklevel=4)

    def _insert(self, branch: Branch, axis: int) -> str:
        host: Any = branch.module
        child = f"inserted_{self.child}" if hasattr(host, self.child) else self.child
        layer = self.made(f"{branch.name}.{child}", axis=axis)
        return f"{branch.name}.{insert_after(host, child, layer)}"
