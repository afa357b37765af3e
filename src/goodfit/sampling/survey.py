"""Which modules of a model drop, found by running it: once in eval mode, once with all modules in train mode.

A module whose own code draws masks in training is one that drops. Modules that cannot be in train mode without changing the
form of the outputs are found by halving, and stay in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from goodfit.dataflow.flows import tensors_in
from goodfit.errors import GoodfitError
from goodfit.sampling.draws import own_layers
from goodfit.sampling.observe import Pass, observe
from goodfit.sampling.rows import call_with, few
from goodfit.surgery.proof import largest_error
from goodfit.surgery.running import must_run

__all__ = ["Survey", "survey"]

_SEEDS = range(4)  # a layer that its model skips at random is seen in one of these passes, or known by its class

_REASONS = {"noise": "it draws ({}) and drops nothing", "asks": "it decides something by a random number ({})"}
_REASONS[""] = "it draws ({}) and what becomes of that is not seen"
_OTHER = "in train mode it returns outputs of another form"


@dataclass
class Survey:
    """on: the modules to put into train mode. off: those that draw in training, or cannot train, and why they stay in
    eval mode. doubts: what a user must be told. inputs: those of the passes. still: the one in eval mode. moving: one with
    dropout on, each mask at its mean if `means`. apart: whether rows can stand side by side, None if nobody asked yet."""

    on: tuple[str, ...]
    off: dict[str, str]
    doubts: list[str]
    inputs: Any
    still: Pass
    moving: Pass
    means: bool
    apart: bool | None = None


def survey(model: nn.Module, inputs: Any) -> Survey:
    """Find what must be in train mode for everything to drop that drops in training, and prove that it does.

    A few rows show it; a model that they do not suit sees all.
    """
    some = few(inputs)
    if some is not inputs:
        with suppress(GoodfitError):
            return _survey(model, some)
    return _survey(model, inputs)


def _survey(model: nn.Module, inputs: Any) -> Survey:
    run = partial(call_with, model, inputs)
    still = observe(model, run, ())
    if still.problem:
        raise must_run(model, still.output)
    trained, unfit = _trained(model, run, still)
    owners, passes = set(trained.owners), [trained]
    for seed in _SEEDS[1:]:
        if not any(d.kind == "decides" for d in trained.dropping):
            break
        passes.append(observe(model, run, _candidates(model) - unfit.keys(), seed))
        owners |= passes[-1].owners
    called = set().union(*(p.draws.called for p in passes))
    on = (_alike(model, owners, called) | own_layers(model)) - unfit.keys()
    means = all(d.scales for p in passes for d in p.draws.draws if d.owner in on)
    seeds = _SEEDS[: len(passes)]
    moving = [observe(model, run, on, seed, means=means) for seed in seeds]
    around = _around(model, passes, moving) - unfit.keys() - on
    if around:
        on |= around
        moving = [observe(model, run, on, seed, means=means) for seed in seeds]
    if means and not moving[0].scales:
        means, moving = False, [observe(model, run, on, seed) for seed in seeds]
    _prove(model, still, passes, moving)
    off, might = _left_off(on, passes, still, unfit)
    might |= _outside(model, run, on, passes, off)
    doubts = [f"leaves {_shown(model, name)} in eval mode: {off[name]}" for name in sorted(might)]
    doubts += _beside(model, still, moving[0], means)
    ordered = tuple(name for name, _ in model.named_modules() if name in on)
    return Survey(ordered, off, doubts, inputs, still, moving[0], means)


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

    able = _candidates(model)
    add([name for name, _ in model.named_modules() if name in able], first=True)
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


def _around(model: nn.Module, passes: list[Pass], moving: list[Pass]) -> set[str]:
    """What stands around modules that drop in training, but not when they train alone, as within a fused eval path."""
    pairs, able = zip(passes, moving, strict=True), _candidates(model)
    lost = [d for then, now in pairs for d in then.dropping if d.owner not in now.owners]
    return {name for d in lost for name in d.stack if name in able}


def _prove(model: nn.Module, still: Pass, passes: list[Pass], moving: list[Pass]) -> None:
    """Refuse a model that cannot be sampled from so."""
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


def _left_off(on: set[str], passes: list[Pass], still: Pass, unfit: dict[str, str]) -> tuple[dict[str, str], set[str]]:
    """Modules in eval mode that draw in training, with the reason; and those of them that might drop."""
    off, doubts = dict(unfit), {name for name, reason in unfit.items() if reason != _OTHER}
    quiet = {(d.owner, d.op) for d in still.draws.draws}
    for seen in passes:
        for d in seen.draws.draws:
            if d.owner in on or (d.owner, d.op) in quiet or d.kind == "idle":
                continue
            off[d.owner] = _REASONS[d.kind].format(d.op)
            doubts |= set() if d.kind == "noise" else {d.owner}
    return off, doubts


def _outside(model: nn.Module, call: Callable[[], Any], on: set[str], passes: list[Pass], off: dict[str, str]) -> set[str]:
    """Modules that draw from Python's or NumPy's generator in training alone; `off` gets them."""
    if not any(p.moved for p in passes):
        return set()
    chosen = _candidates(model) - off.keys() | on
    found = observe(model, call, chosen, watch=True).draws.outside - observe(model, call, (), watch=True).draws.outside - on
    off.update(dict.fromkeys(found, "it draws from Python's or NumPy's generator, which cannot be followed"))
    return found


def _beside(model: nn.Module, still: Pass, moving: Pass, means: bool) -> list[str]:
    """What modules that drop do besides: noise, and, where each mask is its mean, anything that changes the outputs."""
    quiet = {(d.owner, d.op) for d in still.draws.draws}
    noisy = {d.owner: d.op for d in moving.draws.draws if d.kind == "noise" and (d.owner, d.op) not in quiet}
    told = [f"lets {_shown(model, name)} drop, which also adds noise ({op})" for name, op in sorted(noisy.items())]
    if told or quiet or not means:
        return told
    if largest_error(*[list(tensors_in(one.output)) for one in (still, moving)])[0] <= 1:
        return []
    return [f"finds that {type(model).__name__} computes more than dropout in the modules that drop in training"]


def _shown(model: nn.Module, name: str) -> str:
    return f"{name} ({type(model.get_submodule(name)).__name__})" if name else type(model).__name__
