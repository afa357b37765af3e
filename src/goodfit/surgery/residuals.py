"""Residual additions of an existing model: x + f(x), with the module whose output is the branch f(x).

An addition is residual where one operand is computed from the other by layers (the other is the skip), where it adds one
more branch to such a sum, or where both come from one value and the longest way to one has fewer layers than the shortest to
the other (a projection shortcut). Joining by concatenation and multiplying by a gate are not residual.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.jit import ScriptModule

from goodfit.surgery.ancestry import Ancestry, Value, ancestry, bits

__all__ = ["Residual", "residual_additions", "residuals"]


_SHORTCUT = 1  # layers at most; a branch has more


@dataclass(frozen=True)
class Residual:
    """One branch of one residual addition. Where no module hands the branch over, `module` is None and `reason` says why.

    order counts the additions as they run; branches that are summed before they come to the skip share it. straight are the
    modules whose output is the branch as it is, the innermost first; `branch` names the last of them that returns nothing
    else. inside are all modules that return something on the way from the skip to the branch.
    """

    order: int
    time: int  # how many values there were before the sum, comparable with `Ancestry.calls`
    branch: str
    module: nn.Module | None
    straight: tuple[str, ...] = ()
    inside: frozenset[str] = frozenset()
    reason: str = ""


@dataclass(frozen=True)
class _Sum:
    """A residual addition: where its ways part, its branch and its result."""

    start: Value
    branch: Value
    total: Value
    projected: bool = False


def residuals(model: nn.Module, example: Any) -> list[Residual]:
    """The residual additions of one run in eval mode, in order; the model stays as it is."""
    return residual_additions(ancestry(model, example))


def residual_additions(run: Ancestry) -> list[Residual]:
    """The same, of a run that is known."""
    sums: dict[int, _Sum] = {}
    for a, b, total in run.additions:
        one = _by_descent(run, sums, a, b, total) or _by_projection(run, a, b, total)
        if one is not None and not total.logits:  # the bias of attention scores, added again in each layer
            sums[total.index] = one
    terms = {t.index: (a, b) for a, b, t in run.additions if t.index not in sums or sums[t.index].projected}
    opened: set[int] = set()
    ends = {i: list(_ends(one.branch, terms, opened)) for i, one in sums.items()}
    kept = [i for i in sums if i not in opened]  # branches that are summed first may look like a projection shortcut
    found = [(order, sums[i], end, reason) for order, i in enumerate(kept) for end, reason in ends[i]]
    branches = Counter(name for _, _, end, reason in found if not reason for name, _, _ in end.straight)
    hosts = {name for name, count in branches.items() if count == len(run.calls[name])}
    return _each_time(run, [_residual(run, hosts, *one) for one in found])


def _by_descent(run: Ancestry, sums: dict[int, _Sum], a: Value, b: Value, total: Value) -> _Sum | None:
    for skip, branch in ((a, b), (b, a)):
        start = sums[skip.index].start if skip.index in sums and not branch.descends(skip) else skip
        if not (branch.live and branch.descends(start)):
            continue
        source, constant = _source(branch), not start.live
        if constant and start.uses == start.added:  # positions that are added again and again
            continue
        if (source.uses == 1 and source.straight) or (not constant and _ways(run, start, branch).longest > 0):
            return _Sum(start, branch, total)
    return None


def _by_projection(run: Ancestry, a: Value, b: Value, total: Value) -> _Sum | None:
    common = a.ancestors & b.ancestors
    fork = run.values[common.bit_length() - 1] if common else None
    if fork is None or not fork.live:
        return None
    if total.final or (total.squashed and total.uses == 1):
        return None
    ways = {v: _ways(run, fork, v) for v in (a, b)}
    short, long = sorted(ways, key=lambda v: ways[v].longest)
    parts = ways[short].parts and ways[long].parts  # each works on its own part of one value
    apart = ways[short].longest <= _SHORTCUT < ways[long].shortest
    grown = ways[long].grown and not ways[short].grown
    if apart and not (parts or grown or _escapes(run, fork, long, total)) and _source(long).straight:
        return _Sum(fork, long, total, projected=True)
    return None


def _escapes(run: Ancestry, fork: Value, branch: Value, total: Value) -> bool:
    """Whether something on the way from `fork` to `branch` comes elsewhere too, as the keys and values of attention do."""
    within = (branch.ancestors | 1 << branch.index) & ~(fork.ancestors | 1 << fork.index)
    inside = {v for v in (run.values[i] for i in bits(within)) if v.descends(fork)}
    later = (v for v in run.values[fork.index + 1 :] if v not in inside and v is not total)
    return any(p in inside for v in later for p in v.parents) or any(v.final for v in inside)


@dataclass(frozen=True)
class _Ways:
    """Layers on the shortest and on the longest way between two values, and whether a way goes through a part of one, or
    through what makes more places."""

    shortest: int
    longest: int
    parts: bool
    grown: bool


def _ways(run: Ancestry, start: Value, end: Value) -> _Ways:
    known = {start: _Ways(0, 0, False, False)}
    within = (end.ancestors | 1 << end.index) >> start.index + 1
    for value in (run.values[start.index + 1 + i] for i in bits(within)):
        before = [known[p] for p in value.parents if p in known]
        if before:
            shortest, longest = min(w.shortest for w in before), max(w.longest for w in before)
            parts = value.part or (any(w.parts for w in before) and not value.joined)
            grown = value.grown or any(w.grown for w in before)
            known[value] = _Ways(shortest + value.layers, longest + value.layers, parts, grown)
    return known[end]


def _source(value: Value) -> Value:
    """The value that a module handed over, behind scaling and rearranging."""
    while value.uses == 1 and not value.straight and value.of is not None:
        value = value.of
    return value


def _ends(value: Value, terms: dict[int, tuple[Value, Value]], opened: set[int]) -> Iterator[tuple[Value, str]]:
    """The values that add up to a branch, each handed over by a module, or the reason why it is not."""
    value = _source(value)
    if value.uses > 1:
        yield value, "is used elsewhere too"
    elif value.straight:
        yield value, ""
    elif value.index in terms and all(term.live for term in terms[value.index]):
        opened.add(value.index)
        for term in terms[value.index]:
            yield from _ends(term, terms, opened)
    else:
        yield value, "is the result of a function, not of a module"


def _residual(run: Ancestry, hosts: set[str], order: int, one: _Sum, end: Value, reason: str) -> Residual:
    """Its host is the last module that returned the branch alone, else the last that returned it first."""
    able = [entry for entry in end.straight if entry[0] in hosts and not isinstance(entry[1], ScriptModule)]
    ranked = sorted(able, key=lambda entry: entry[2])
    name, module, _ = ranked[-1] if ranked and not reason else ("", None, False)
    if not ranked and end.straight and not reason:
        reason = f"comes from {end.straight[-1][0]}, which runs elsewhere too"
    between = (one.branch.ancestors | 1 << one.branch.index) & ~(one.start.ancestors | 1 << one.start.index)
    inside = {n for i in bits(between) if run.values[i].descends(one.start) for n, _, _ in run.values[i].straight}
    straight = tuple(n for n, _, _ in end.straight)
    return Residual(order, one.total.index, name, module, straight, frozenset(inside), reason)


def _each_time(run: Ancestry, found: list[Residual]) -> list[Residual]:
    """A host must be the host each time it runs."""
    branches = Counter(r.branch for r in found)
    return [
        replace(r, module=None, reason=f"comes from {r.branch}, which runs elsewhere too")
        if r.module is not None and branches[r.branch] != len(run.calls[r.branch])
        else r
        for r in found
    ]
