"""What the kinds of dropout share: places picked by name, rates by shape, layers that are adjusted and not doubled."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, ClassVar

from torch import nn

from goodfit.errors import GoodfitError, GoodfitWarning, listed
from goodfit.layers.dropout import SeededLayer
from goodfit.phases import Build
from goodfit.regularizers.shapes import refuse_unknown, shares
from goodfit.surgery.droppers import droppers, set_rate
from goodfit.surgery.insert import refuse_wrappers
from goodfit.surgery.places import Place, places
from goodfit.surgery.records import records, remember
from goodfit.surgery.trace import Call, flow
from goodfit.where import Where

__all__ = ["Insertion"]

SHIFT = "the norm meets a larger variance in training than in eval (Li et al. 2019, arXiv 1801.05134)"


class Insertion(Build):
    """A kind of dropout: one layer per place, or the rates of the model's own layers of that kind.

    The root of a model remembers, by name, which rates each regularizer moves and by which share of p; so two of them in a
    cocktail keep apart, and a copied model takes that along.
    """

    p: float
    where: Where
    shape: str
    before_norm: bool

    made: ClassVar[type[SeededLayer]]
    """The layer that is inserted."""

    adjusts: ClassVar[tuple[type[nn.Module], ...]] = ()
    """torch's layers of this kind."""

    functions: ClassVar[frozenset[str]] = frozenset()
    """torch's functions of this kind."""

    sought: ClassVar[str] = "activation with a layer behind it"
    """What a place is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unknown(type(self).__name__, self.shape)

    @abstractmethod
    def layer(self, model: nn.Module, place: Place, calls: list[Call]) -> SeededLayer | str | None:
        """What to insert at a place; None where this kind has no business there, a reason where it cannot be right."""

    def build(self, model: nn.Module, example: Any) -> nn.Module:
        kind = type(self).__name__
        refuse_wrappers(model, kind)
        there = [name for name in droppers(model, example) if self._knows(model, name)]
        mine = [name for name in there if self.where.holds(_place_of(model, name), "place") and self._may_take(model, name)]
        if not any(self._complete(model, name) for name in mine):
            found = self._insertions(model, example, there, mine)
            child = kind.lower()
            for place, layer in found:
                name = f"inserted_{child}" if hasattr(place.host, child) else child  # an LSTM has a number of that name
                place.insert(place.host, name, layer)
                layer.name = f"{place.name}.{name}".lstrip(".")
                mine.append(layer.name)
            if found and self.shape != "brick":
                order = droppers(model, example)
                mine.sort(key=order.index)
        remember(model, self._key, dict(zip(mine, shares(self.shape, len(mine)), strict=True)))
        self.tune(model)
        return model

    def tune(self, model: nn.Module) -> None:
        p = self.at(0).p
        for name, share in records(model).get(self._key, {}).items():
            set_rate(model, name, p * share)

    @property
    def _key(self) -> str:
        return f"{type(self).__name__}(where={self.where!r}, shape={self.shape!r}, before_norm={self.before_norm})"

    def _knows(self, model: nn.Module, name: str) -> bool:
        """Whether one of the model's droppers is of this kind."""
        if name.endswith("()"):
            return name.removesuffix("()").rpartition(".")[2] in self.functions
        module = model.get_submodule(name)
        return type(module) is self.made or (isinstance(module, self.adjusts) and not isinstance(module, SeededLayer))

    def _may_take(self, model: nn.Module, name: str) -> bool:
        """Whether no other regularizer has a rate; plain dropout, which takes all kinds, gives way to the special ones."""
        holders = {key.partition("(")[0] for key, names in records(model).items() if name in names}
        return holders <= {type(self).__name__, "Dropout"}

    def _complete(self, model: nn.Module, name: str) -> bool:
        """Whether a rate of the model's own says that its author has chosen the places."""
        return name.endswith("()") or not isinstance(model.get_submodule(name), SeededLayer | nn.RNNBase)

    def _insertions(self, model: nn.Module, example: Any, there: list[str], mine: list[str]) -> list[tuple[Place, SeededLayer]]:
        calls = flow(model, example)
        found = places(calls, self.before_norm)
        matched = [p for p in found if self.where.holds(p.name, "place")]
        free = [p for p in matched if not p.taken and not any(type(m) is self.made for m in p.host.children())]
        made = [(p, self.layer(model, p, calls)) for p in free]
        chosen = [(p, layer) for p, layer in made if isinstance(layer, SeededLayer)]
        reasons = {p.name: reason for p, reason in made if isinstance(reason, str)}
        if not chosen and not mine:
            self._refuse(model, [*(p.name for p in found), *(_place_of(model, n) for n in there)], matched, reasons)
        self._tell([p for p, _ in chosen], reasons)
        return chosen

    def _refuse(self, model: nn.Module, names: list[str], matched: list[Place], reasons: dict[str, str]) -> None:
        kind, model_kind = type(self).__name__, type(model).__name__
        if names and not matched:
            raise GoodfitError(f"{kind} matched no place (where={self.where}); {model_kind} has: {listed(names)}.")
        if reasons:
            name, reason = next(iter(reasons.items()))
            raise GoodfitError(f"{kind} has no place in {model_kind}: at {name}, {reason}; leave it out of the cocktail.")
        if matched and all(p.taken for p in matched):
            raise GoodfitError(f"{kind} finds dropout at each place of {model_kind} already: Dropout(p) sets its rate.")
        layer = f"nn.{self.adjusts[0].__name__}" if self.adjusts else ""
        mend = f"put {layer} where you want it, {kind}(p) then sets its rate" if layer else "leave it out of the cocktail"
        raise GoodfitError(f"{kind} found no {self.sought} in {model_kind}: {mend}.")

    def _tell(self, chosen: list[Place], reasons: dict[str, str]) -> None:
        kind, normed = type(self).__name__, [p.name for p in chosen if p.normed]
        told = [f"{kind} leaves out {name}: {reason}." for name, reason in reasons.items()]
        told += [f"{kind} stands before a norm at {listed(normed)}: {SHIFT}."] if normed else []
        for text in [*told, *self.odd(chosen)]:
            warnings.warn(text, GoodfitWarning, stacklevel=5)

    def odd(self, chosen: list[Place]) -> list[str]:
        """What else to warn of."""
        return []


def _place_of(model: nn.Module, name: str) -> str:
    """The name by which `where` knows a dropper: of the host for a layer of ours."""
    inserted = not name.endswith("()") and isinstance(model.get_submodule(name), SeededLayer)
    return name.rpartition(".")[0] if inserted else name
