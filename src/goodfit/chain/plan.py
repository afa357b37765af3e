"""Whether a model is a chain, and of which pieces. What is not known is no chain: nothing is guessed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules import module as torch_module

from goodfit.chain.activations import function_of
from goodfit.chain.chain import Chain
from goodfit.chain.drop import Drop
from goodfit.chain.norm import Norm
from goodfit.chain.passes import Piece
from goodfit.chain.pieces import Activation, Linear
from goodfit.chain.skip import Fork, Sum
from goodfit.layers.dropout import SeededDropout, SeededInputDropout
from goodfit.layers.path import SeededDropPath
from goodfit.layers.skip import Branch, Carried, Skip, SkipStart
from goodfit.surgery.arguments import runs_on_input
from goodfit.surgery.insert import hung, runs_after, runs_before

__all__ = ["chain_of"]

_OWN = {
    nn.Linear: {"weight", "bias"},
    nn.BatchNorm1d: {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"},
    SeededDropout: {"rate", "seed"},
    SeededInputDropout: {"rate", "seed"},
    SeededDropPath: {"rate", "seed"},
}
"""The parameters and buffers that a layer may have."""


class _Unknown(Exception):
    """A layer that no piece stands for."""


def chain_of(model: nn.Module) -> Chain | None:
    """The chain that computes what K copies of `model` do, None where the model is not one of those that are known.

    Known are nn.Sequential, also nested, of Linear, BatchNorm1d, activations without parameters, a Flatten before the first
    layer, Identity, and what BatchNorm, Dropout, InputDropout, SkipConnections and DropPath insert; torch's own Dropout as long
    as it does nothing. Not known are subclasses, other hooks, parametrizations, norms held still, and weights that are tied.
    """
    if not model._modules:
        return None
    shared = [p for _, p in model.named_parameters(remove_duplicate=False)]
    modules = [m for _, m in model.named_modules(remove_duplicate=False)]
    tied = len({id(p) for p in shared}) < len(shared) or len({id(m) for m in modules}) < len(modules)
    if tied or torch_module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    try:
        layers = list(_layers(model, ""))
        pieces, forks = list[Piece](), dict[Carried, Fork]()
        for module, name in layers:
            if not _does_nothing(module):
                pieces.append(_piece(module, name, forks))
    except _Unknown:
        return None
    widths = [w for m, _ in layers if isinstance(m, nn.Linear) for w in (m.in_features, m.out_features)]
    if not widths:
        return None
    _join(pieces)
    silent = [m for m, _ in layers if type(m) is nn.Dropout and m.p > 0]
    return Chain(pieces, widths[0], max(widths), _flattens([m for m, _ in layers]), silent)


def _layers(module: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """What runs, in order, with its name: a module, and what was inserted before and after it."""
    if {"forward", "train", "__call__", "_compiled_call_impl"} & {k for k, v in vars(module).items() if v is not None}:
        raise _Unknown
    if module._backward_hooks or module._backward_pre_hooks:
        raise _Unknown
    plain = type(module) is nn.Sequential
    before = [runs_before(h) or (runs_on_input(h, "input") if plain else None) for h in module._forward_pre_hooks.values()]
    after = [runs_after(h) for h in module._forward_hooks.values()]
    inserted = [child for child in (*before, *after) if child is not None]
    own = {"branch"} if type(module) is Skip else set()
    if len(inserted) < len(before) + len(after) or (not plain and {*inserted, *own} != set(module._modules)):
        raise _Unknown
    for child in before:
        yield from _hung(module, str(child), name)
    if plain:
        for child, one in module._modules.items():
            if one is not None and child not in inserted:
                yield from _layers(one, f"{name}.{child}".lstrip("."))
    else:
        for child in own:
            yield from _layers(module.get_submodule(child), f"{name}.{child}")
        yield module, name
    for child in after:
        yield from _hung(module, str(child), name)


def _hung(host: nn.Module, child: str, name: str) -> Iterator[tuple[nn.Module, str]]:
    layer = hung(host, child)
    aside = ".layer" if layer is not host.get_submodule(child) else ""
    return _layers(layer, f"{name}.{child}{aside}".lstrip("."))


def _does_nothing(module: nn.Module) -> bool:
    """As long as features are the last axis."""
    if type(module) is nn.Flatten:
        return (module.start_dim, module.end_dim) == (1, -1)
    return type(module) in (nn.Identity, Branch) or (type(module) is nn.Dropout and (module.p == 0 or not module.training))


def _flattens(layers: list[nn.Module]) -> bool:
    """Whether more axes than one become features before anything looks at features."""
    seen = next((m for m in layers if isinstance(m, nn.Flatten | nn.Linear | nn.BatchNorm1d)), None)
    return isinstance(seen, nn.Flatten)


def _piece(module: nn.Module, name: str, forks: dict[Carried, Fork]) -> Piece:
    """forks: the starts of branches so far, by what carries to their sums."""
    if {*module._parameters, *module._buffers} - _OWN.get(type(module), set()):
        raise _Unknown
    if type(module) is nn.Linear:
        return Linear(module, name)
    if type(module) is nn.BatchNorm1d and module.track_running_stats == (module.running_mean is not None):
        return Norm(module, name)
    if type(module) in (SeededDropout, SeededInputDropout) or (type(module) is SeededDropPath and module.axis == 0):
        assert isinstance(module, SeededDropout | SeededDropPath)
        return Drop(module, name)
    if type(module) is SkipStart:
        return forks.setdefault(module.carried, Fork())
    if type(module) is Skip and module.carried in forks:
        return Sum(forks.pop(module.carried))
    function = function_of(module)
    if function is None:
        raise _Unknown
    return Activation(function)


def _join(pieces: list[Piece]) -> None:
    """Let neighbours share work: a bias before a norm, a dropout behind a gate, and the factor of a dropout in γ and β."""
    own = False
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        own = own or isinstance(piece, Linear)
        if isinstance(piece, Linear) and isinstance(following, Norm):
            piece.norm, following.bias = following, piece.bias
        if (
            own
            and isinstance(piece, Activation)
            and piece.function.gates
            and isinstance(following, Drop)
            and not following.whole_rows
        ):
            piece.drop = following
    for norm, second, third in zip(pieces, [*pieces[1:], None], [*pieces[2:], None, None], strict=False):
        drop = third if isinstance(second, Activation) and second.function.positive else second
        if isinstance(norm, Norm) and isinstance(drop, Drop):
            norm.drop, drop.folded = drop, True
    joined = {id(piece.drop) for piece in pieces if isinstance(piece, Activation)}
    pieces[:] = [piece for piece in pieces if id(piece) not in joined]
