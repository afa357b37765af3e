"""Which modules of a model drop, found by running it: once in eval mode, once with all modules in train mode.

A module whose own code draws masks in training is one that drops. Modules that cannot be in train mode without changing the
form of the outputs are found by halving, and stay in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from goodfit.errors import GoodfitError
from goodfit.noise import Noisy
from goodfit.sampling.draws import Draw, Draws
from goodfit.sampling.kept import buffers_kept, modes_kept, noise_kept, seeded
from goodfit.surgery.trace import must_run

__all__ = ["Pass", "Survey", "observe", "observing", "own_layers", "set_modes", "survey"]

_SEEDS = range(4)  # a layer that its model skips at random is seen in one of these passes, or known by its class

_OBSERVING: ContextVar[bool] = ContextVar("observing", default=False)
_OTHER = "in train mode it returns outputs of another form"


@dataclass
class Pass:
    """One run of the model: its output and form, what it drew, and which buffers it changed."""

    output: Any = None
    form: Any = None
    problem: str = ""
    draws: Draws = field(repr=False, default=None)  # type: ignore[assignment]
    written: frozenset[str] = frozenset()

    @property
    def dropping(self) -> list[Draw]:
        return [d for d in self.draws.draws if d.drops]

    @property
    def owners(self) -> set[str]:
        return {d.owner for d in self.dropping}


@dataclass(frozen=True)
class Survey:
    """on: the modules to put into train mode. off: those that draw in training, or cannot train, and why they stay in
    eval mode. doubts: those of them that might drop. still: the pass in eval mode. moving: one with dropout on."""

    on: tuple[str, ...]
    off: dict[str, str]
    doubts: tuple[str, ...]
    still: Pass
    moving: Pass


def set_modes(model: nn.Module, on: Iterable[str]) -> None:
    """Train mode for some modules by name, eval mode for all others."""
    chosen = set(on)
    for name, module in model.named_modules():
        module.training = name in chosen


def own_layers(model: nn.Module) -> set[str]:
    """Layers that drop by their class: torch's, and those of ours."""
    return {name for name, m in model.named_modules() if isinstance(m, _DropoutNd | Noisy)}


def observe(model: nn.Module, call: Callable[[], Any], on: Iterable[str], seed: int = 0) -> Pass:
    """Run the model with some modules in train mode; it stays as it was."""
    seen = Pass(draws=Draws(model))
    with ExitStack() as stack:
        stack.callback(_OBSERVING.reset, _OBSERVING.set(True))
        stack.enter_context(modes_kept(model))
        stack.enter_context(buffers_kept(model))
        stack.enter_context(noise_kept(model, seed))
        stack.enter_context(seeded(model, seed))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        set_modes(model, on)
        before = {name: b.clone() for name, b in model.named_buffers()}
        try:
            with seen.draws:
                seen.output = call()
        except Exception as problem:
            seen.problem = f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0]}"
            seen.output = problem
        seen.form = _form(seen.output)
        after = dict(model.named_buffers())
        seen.written = frozenset(n for n, b in before.items() if n not in after or not _same(after[n], b))
    return seen


def observing() -> bool:
    """Whether a model is being observed, so that its modes are not those of a user's call."""
    return _OBSERVING.get()


def survey(model: nn.Module, call: Callable[[], Any]) -> Survey:
    """Find what must be in train mode for everything to drop that drops in training, and prove that it does."""
    still = observe(model, call, ())
    if still.problem:
        raise must_run(model, still.output)
    trained, unfit = _trained(model, call, still)
    owners, passes = set(trained.owners), [trained]
    for seed in _SEEDS[1:]:
        if not any(d.kind == "decides" for d in trained.dropping):
            break
        passes.append(observe(model, call, _candidates(model) - unfit.keys(), seed))
        owners |= passes[-1].owners
    called = set().union(*(p.draws.called for p in passes))
    on = _alike(model, owners, called) | own_layers(model)
    for seed, wanted in zip(_SEEDS, passes, strict=False):
        on |= _missing(model, call, on, seed, wanted) - unfit.keys()
    on -= unfit.keys()
    moving = _proved(model, call, on, still, passes)
    off, doubts = _left_off(on, passes, still, unfit)
    return Survey(tuple(name for name, _ in model.named_modules() if name in on), off, doubts, still, moving)


def _candidates(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if not isinstance(m, _NormBase)}


def _trained(model: nn.Module, call: Callable[[], Any], still: Pass) -> tuple[Pass, dict[str, str]]:
    """A pass with all modules in train mode but those that change the form of the outputs by it, and these with the reason."""
    chosen, unfit, best = set[str](), dict[str, str](), still

    def add(group: list[str], first: bool = False) -> None:
        nonlocal chosen, best
        if not group:
            return
        tried = observe(model, call, chosen | set(group))
        if not tried.problem and tried.form == still.form:
            chosen, best = chosen | set(group), tried
        elif len(group) == 1:
            unfit[group[0]] = _why(model, group[0], tried)
        else:
            half = 1 if first else len(group) // 2  # most often it is the model itself
            add(group[:half])
            add(group[half:])

    add([name for name, _ in model.named_modules() if name in _candidates(model)], first=True)
    return best, unfit


def _why(model: nn.Module, name: str, tried: Pass) -> str:
    reason = f"in train mode it fails with {tried.problem}" if tried.problem else _OTHER
    if name in tried.owners:
        raise GoodfitError(
            f"mc_dropout cannot let {_shown(model, name)} drop: {reason}; move its dropout into a layer of its own."
        )
    return reason


def _alike(model: nn.Module, owners: set[str], called: set[str]) -> set[str]:
    """The owners, and the modules of their classes that no pass has met."""
    kinds = {type(m) for name, m in model.named_modules() if name in owners}
    return owners | {name for name, m in model.named_modules() if name not in called and type(m) in kinds}


def _missing(model: nn.Module, call: Callable[[], Any], on: set[str], seed: int, wanted: Pass) -> set[str]:
    """What stands around the modules that drop in training, but not with `on` alone, as within a fused eval path."""
    lost = wanted.owners - observe(model, call, on, seed).owners
    return {name for d in wanted.dropping if d.owner in lost for name in d.stack if name in _candidates(model)}


def _proved(model: nn.Module, call: Callable[[], Any], on: set[str], still: Pass, passes: list[Pass]) -> Pass:
    moving = [observe(model, call, on, seed) for seed in _SEEDS[: len(passes)]]
    first, kind = moving[0], type(model).__name__
    bad = next((p for p in moving if p.problem or p.form != still.form), None)
    if bad is not None:
        shown = bad.problem or "outputs of another form"
        raise GoodfitError(f"mc_dropout cannot run {kind} with dropout on and the rest in eval mode, got {shown}.")
    written = sorted(first.written - still.written)
    if written:
        raise GoodfitError(
            f"mc_dropout must leave buffers alone, but {kind} updates {written[0]!r} in the same module that drops: "
            "move its dropout into a layer of its own."
        )
    lost = set().union(*(p.owners for p in passes)) - set().union(*(p.owners for p in moving))
    if lost:
        raise GoodfitError(
            f"mc_dropout cannot let {_shown(model, min(lost))} drop while the rest of {kind} is in eval mode: "
            "it asks another module than itself whether it trains; let it read its own `training`."
        )
    if not any(p.dropping for p in moving):
        raise GoodfitError(
            f"mc_dropout finds nothing that drops in {kind}, or only rates of 0, so all samples would be equal: put "
            "goodfit.Dropout(p) in and train with it first."
        )
    return first


def _left_off(on: set[str], passes: list[Pass], still: Pass, unfit: dict[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    off, doubts = dict(unfit), {name for name, reason in unfit.items() if reason != _OTHER}
    quiet = {(d.owner, d.op) for d in still.draws.draws}
    for seen in passes:
        for d in seen.draws.draws:
            if d.owner in on or (d.owner, d.op) in quiet:
                continue
            if d.kind == "noise":
                off[d.owner] = f"adds noise ({d.op}), and drops nothing"
            elif d.kind == "asks":
                off[d.owner] = f"decides something by a random number ({d.op})"
                doubts.add(d.owner)
        for name in seen.draws.outside - still.draws.outside - on:
            off[name] = "draws from Python's or NumPy's generator, which cannot be followed"
            doubts.add(name)
    return off, tuple(sorted(doubts))


def _shown(model: nn.Module, name: str) -> str:
    return f"{name} ({type(model.get_submodule(name)).__name__})" if name else type(model).__name__


def _form(value: Any) -> Any:
    """Types, names and shapes of what a model returns."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return type(value), tuple((key, _form(one)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(_form(one) for one in value)
    return type(value)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or (a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()))
