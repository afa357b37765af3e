"""Which atoms can go: the largest set in which nothing that stays needs anything that goes.

An atom goes if each weight that reads it is zero in all rows that stay, or if what it brings there is a constant. A constant
goes into the bias of its reader. Where padding forbids that (the border sees less of it), constant channels with the same
readers are merged into one of them, which stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from goodfit.dataflow.atoms import FIXED, Axis
from goodfit.dataflow.dependence import Dependence
from goodfit.dataflow.flows import Reader

__all__ = ["Choice"]

_Key = frozenset[tuple[int, int]]


class Choice:
    """`removed` says it for each class of slices, `reasons` why others stay. `banned` are families that must stay."""

    def __init__(self, run: Dependence, shared: dict[str, str], unfoldable: set[str]) -> None:
        self.run, self.label, self.unfoldable = run, run.slices.classes(), unfoldable
        self.pinned: dict[int, str] = {FIXED: "is fixed"}
        whole = [axis for axis in run.slices.axes if axis.name in shared]
        pins = [(torch.arange(axis.first, axis.first + axis.size), shared[axis.name]) for axis in whole]
        for ids, reason in [*pins, *run.slices.pins]:
            for one in torch.unique(self.label[ids]).tolist():
                self.pinned.setdefault(one, reason)
        self.candidates = torch.zeros(run.slices.count, dtype=torch.bool)
        for reader in run.readers:
            self.candidates[self.label[reader.columns]] = True
        self.candidates[list(self.pinned)] = False
        self.families = self._families()
        self.removed, self.reasons = self.candidates.clone(), dict(self.pinned)

    def _families(self) -> dict[tuple[int, ...], list[int]]:
        """The candidates by the axes that they cut: those of one layer, usually."""
        axis_of = torch.repeat_interleave(torch.tensor([1, *(a.size for a in self.run.slices.axes)])) - 1
        cuts: dict[int, set[int]] = defaultdict(set)
        chosen = self.candidates[self.label]
        for one, axis in torch.unique(torch.stack([self.label[chosen], axis_of[chosen]]), dim=1).t().tolist():
            cuts[one].add(axis)
        families: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for one, axes in cuts.items():
            families[tuple(sorted(axes))].append(one)
        return families

    def settle(self, banned: Iterable[tuple[int, ...]] = (), reason: str = "") -> Choice:
        """Start from all candidates and keep what must stay, until nothing changes."""
        self.removed, self.reasons = self.candidates.clone(), dict(self.pinned)
        for family in banned:
            self._keep(torch.tensor(self.families[family]), reason)
        before = -1
        while before != (before := int(self.removed.sum())):
            self._keep_what_is_needed()
            if before != int(self.removed.sum()):
                continue
            self._keep_shapes()
            self._keep_hosts()
            self._keep_one_of_each()
        return self

    def gone(self, ids: Tensor) -> Tensor:
        """Which of these slices go."""
        return self.removed[self.label[ids]]

    def needed(self, reader: Reader) -> Tensor:
        """Which columns have a weight other than zero in a row that stays."""
        stays = ~self.gone(reader.rows).view(reader.groups, -1, 1)
        return (reader.grouped(reader.live_weights()) & stays).any(1).flatten()

    def foldable(self, reader: Reader) -> Tensor:
        """Which columns bring a constant that the bias can take."""
        into_bias = not reader.padded and reader.name not in self.unfoldable
        return reader.constant if into_bias else reader.constant & (reader.value == 0)

    def _keep(self, classes: Tensor, reason: str) -> None:
        for one in torch.unique(classes[self.removed[classes]]).tolist():
            self.reasons.setdefault(one, reason)
        self.removed[classes] = False

    def _keep_what_is_needed(self) -> None:
        for reader in self.run.readers:
            if reader.live:
                bad = self.gone(reader.columns) & ~reader.constant
                if bad.any():
                    bad &= self.needed(reader)
                    self._keep(self.label[reader.columns[bad]], f"is read by {reader.name or 'a computed weight'}")

    def _keep_shapes(self) -> None:
        for reader in self.run.readers:
            if reader.groups > 1:
                self._keep_groups(reader)
        for rectangle in self.run.rectangles.values():
            ids, gone = rectangle.ids, self.gone(rectangle.ids)
            if rectangle.even:
                self._keep_surplus(ids, torch.zeros(len(ids), dtype=torch.bool), "lies in one of several equal pieces")
                continue
            whole = torch.zeros_like(gone)
            for dim in range(ids.ndim):
                plane = gone.movedim(dim, 0).flatten(1).all(1)
                whole |= plane.view([-1 if d == dim else 1 for d in range(ids.ndim)])
            self._keep(self.label[ids[gone & ~whole]], "lies in a block of which other parts stay")

    def _keep_groups(self, reader: Reader) -> None:
        rows, columns = reader.rows.view(reader.groups, -1), reader.columns.view(reader.groups, -1)
        whole = self.gone(rows).all(1) & self.gone(columns).all(1)
        if whole.all():
            self._keep(self.label[torch.cat([rows[0], columns[0]])], "is the last group of its layer")
            whole[0] = False
        for ids in (rows, columns):
            self._keep_surplus(ids, whole, "lies in a group that would become smaller than the others")

    def _keep_surplus(self, ids: Tensor, whole: Tensor, reason: str) -> None:
        gone = self.gone(ids) & ~whole.view(-1, 1)
        least = int(gone.sum(1)[~whole].min()) if not whole.all() else 0
        surplus = gone & (gone.cumsum(1) > min(least, ids.shape[1] - 1))
        self._keep(self.label[ids[surplus]], reason)

    def _keep_one_of_each(self) -> None:
        for axis in self.run.slices.axes:
            ids = torch.arange(axis.first, axis.first + axis.size)
            if axis.groups == 1 and bool(self.gone(ids).all()):
                self._keep(self.label[ids[:1]], "is the last of its layer")

    def _demands(self) -> dict[_Key, list[tuple[int, list[tuple[int, int]]]]]:
        """Classes whose constants need a host, by the groups of the readers in which they need it."""
        wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, reader in enumerate(self.run.readers):
            if reader.live:
                which = self.gone(reader.columns) & reader.constant & ~self.foldable(reader)
                if which.any():
                    for column in (which & self.needed(reader)).nonzero().flatten().tolist():
                        wanted[int(self.label[reader.columns[column]])].append((number, column))
        found: dict[_Key, list[tuple[int, list[tuple[int, int]]]]] = defaultdict(list)
        for one, places in wanted.items():
            key = frozenset((number, self._group(number, column)) for number, column in places)
            if len(key) < len(places) or any(not self._mergeable(self.run.readers[number]) for number, _ in key):
                self._keep(torch.tensor([one]), "brings a constant that no bias can take")
            else:
                found[key].append((one, places))
        return found

    def _mergeable(self, reader: Reader) -> bool:
        return reader.weight.ndim > 2 and bool(reader.name) and reader.name not in self.unfoldable

    def _group(self, number: int, column: int) -> int:
        reader = self.run.readers[number]
        return column // (len(reader.columns) // reader.groups)

    def _hosts(self, key: _Key) -> dict[int, dict[int, int]]:
        """Constant classes that stay and that all these readers see: class → reader → column."""
        seen: list[dict[int, int]] = []
        for number, group in key:
            reader = self.run.readers[number]
            width = len(reader.columns) // reader.groups
            usable = reader.constant & (reader.value != 0) & ~self.gone(reader.columns) & (reader.columns != FIXED)
            columns = [c for c in usable.nonzero().flatten().tolist() if c // width == group]
            seen.append({int(self.label[reader.columns[c]]): c for c in columns})
        common = set.intersection(*(set(s) for s in seen))
        return {one: {number: s[one] for (number, _), s in zip(key, seen, strict=True)} for one in common}

    def _keep_hosts(self) -> None:
        for key, classes in self._demands().items():
            if not self._hosts(key):
                strength = [min(abs(float(self.run.readers[n].value[c])) for n, c in places) for _, places in classes]
                host = classes[strength.index(max(strength))][0]
                self._keep(torch.tensor([host]), "carries the constants of others, which padding needs")

    def merges(self) -> Iterator[tuple[Reader, int, int, float]]:
        """(reader, column that goes, column that takes its weights, times what)."""
        for key, classes in self._demands().items():
            hosts = self._hosts(key)
            best = max(hosts, key=lambda one: min(abs(float(self.run.readers[n].value[c])) for n, c in hosts[one].items()))
            for _, places in classes:
                for number, column in places:
                    reader, host = self.run.readers[number], hosts[best][number]
                    yield reader, column, host, float(reader.value[column] / reader.value[host])

    def stays(self, axis: Axis) -> Tensor:
        """Which slices of an axis stay."""
        return ~self.gone(torch.arange(axis.first, axis.first + axis.size))
