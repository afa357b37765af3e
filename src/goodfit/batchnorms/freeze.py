"""`gf.freeze_batchnorm`: batch norms that no `model.train()` wakes, and `gf.thaw_batchnorm`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from goodfit.batchnorms.resting import biases
from goodfit.batchnorms.still import Still, still_of
from goodfit.errors import GoodfitError
from goodfit.where import Where, everything

__all__ = ["freeze_batchnorm", "owns_statistics", "thaw_batchnorm"]


def freeze_batchnorm(model: nn.Module, *, affine: bool = True, where: Where = everything) -> None:
    """Hold batch norms still: they normalize by their running statistics, which nothing moves, whatever `model.train()` says.

    Formula:  y = γ · (x − running mean) / √(running var + eps) + β in training as in eval.
    Shapes:   unchanged. The model may be wrapped (DataParallel, compiled), copied or pickled before or afterwards. DDP knows
              which weights train from when it was made: freeze γ and β before wrapping. A DDP around the model, where what is
              inside is given, is not seen.
    Ranges:   affine also takes γ and β out of training (requires_grad), and lets the redundant bias before a norm that
              BatchNorm inserted train; where selects norms by the names of their modules, as in gf.where.named("backbone.*").
    Errors:   GoodfitError, with the model untouched, if no batch norm is there; for one without running statistics, a lazy or a
              scripted one; for a module that owns running statistics beside other layers, which cannot be held still alone; if
              what trains would change within DDP.
    Source:   Ioffe and Szegedy 2015, Batch normalization, arXiv 1502.03167, for inference by fixed statistics.

    A later model.requires_grad_(True) trains γ and β again, with the statistics still fixed: freeze afterwards. Torch's
    convert_sync_batchnorm makes new norms, which are not frozen: convert first, or by gf.convert_batchnorm.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> freeze_batchnorm(model)
    >>> model.train()[1].training
    False
    """
    _refuse_others(model, where, "freeze_batchnorm")
    chosen = [(n, m) for n, m in model.named_modules() if _is_batchnorm(m) and where.holds(n, "norm")]
    if not chosen:
        raise GoodfitError(
            f"freeze_batchnorm found no batch norm in {type(model).__name__} (where={where}); nothing to freeze."
        )
    for name, module in chosen:
        _refuse(name, module)
    norms, held = {module for _, module in chosen}, _held(model)
    trained = {p: False for m in norms for p in m.parameters(recurse=False)} if affine else {}
    trained |= biases(model, norms | held.keys(), trained)
    _refuse_in_ddp(model, trained, "freeze_batchnorm", "freeze before wrapping, or say affine=False")
    known = {p: note for still in held.values() for p, note in still.notes.items()}
    for module in norms:
        still = held.get(module) or Still(module)
        if affine:
            still.note(known)
        module.__dict__["train"] = still
        module.training = False
    _train(trained)


def thaw_batchnorm(model: nn.Module, *, where: Where = everything) -> None:
    """Let frozen batch norms go: each is in the mode that it would have had, and γ and β train again where they did.

    Formula:  what `freeze_batchnorm` did, undone. A γ or β that norms share trains again when the last of them is let go.
    Shapes:   unchanged. DDP would not average what trains again: thaw the model inside, and wrap it anew.
    Ranges:   where selects norms by the names of their modules; one that is not frozen stays as it is.
    Errors:   GoodfitError, with the model untouched, if what trains would change within DDP.
    Source:   this package.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> freeze_batchnorm(model)
    >>> thaw_batchnorm(model)
    >>> model[1].training, model[1].weight.requires_grad
    (True, True)
    """
    _refuse_others(model, where, "thaw_batchnorm")
    held = _held(model)
    free = {m for name, m in model.named_modules() if m in held and where.holds(name, "norm")}
    kept = {p for m, still in held.items() if m not in free for p in still.notes}
    trained: dict[nn.Parameter, bool] = {}
    for p, note in ((p, note) for m in free for p, note in held[m].notes.items()):
        if p not in kept:
            trained[p] = note or trained.get(p, False)
    trained |= biases(model, held.keys() - free, trained)
    _refuse_in_ddp(model, trained, "thaw_batchnorm", "thaw the model inside, and wrap it anew")
    for module in free:
        module.training = held[module].mode
        del module.__dict__["train"]
    _train(trained)


def owns_statistics(module: nn.Module) -> bool:
    """Whether a module keeps running statistics over batches."""
    buffers = dict(module.named_buffers(recurse=False))
    return {"running_mean", "running_var"} <= buffers.keys() and not isinstance(module, _InstanceNorm)


def _held(model: nn.Module) -> dict[nn.Module, Still]:
    return {m: still for m in model.modules() if (still := still_of(m)) is not None}


def _train(trained: Mapping[nn.Parameter, bool]) -> None:
    for p, trains in trained.items():
        p.requires_grad_(trains)
        if not trains:
            p.grad = None  # momentum would go on by a gradient of zeros


def _refuse_others(model: nn.Module, where: Where, who: str) -> None:
    if not isinstance(model, nn.Module):
        raise GoodfitError(f"{who} takes a torch.nn.Module, got a {type(model).__name__}.")
    if not isinstance(where, Where):
        raise GoodfitError(f"{who} takes where as a selector, got where={where!r}: say where=gf.where.named({str(where)!r}).")


def _refuse_in_ddp(model: nn.Module, trained: Mapping[nn.Parameter, bool], who: str, instead: str) -> None:
    within = {p for m in model.modules() if isinstance(m, DistributedDataParallel) for p in m.parameters()}
    if any(p in within and p.requires_grad != trains for p, trains in trained.items()):
        raise GoodfitError(
            f"{who} cannot change which weights train within DistributedDataParallel, which keeps to those from when it was "
            f"made: {instead}."
        )


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or owns_statistics(module)


def _refuse(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if isinstance(module, ScriptModule):
        raise GoodfitError(
            f"freeze_batchnorm cannot reach into the scripted {name or kind!r}: give the model as it was before."
        )
    if any(is_lazy(t) for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)]):
        raise GoodfitError(
            f"freeze_batchnorm needs statistics that are there, but {name!r} is lazy: run the model on a batch once."
        )
    if not owns_statistics(module):
        raise GoodfitError(
            f"freeze_batchnorm holds running statistics, but the {kind} {name!r} has none and normalizes by its batch in eval "
            f"too; leave it out: where=~gf.where.named({name!r})."
        )
    if not isinstance(module, _BatchNorm) and any(True for _ in module.children()):
        raise GoodfitError(
            f"freeze_batchnorm cannot hold still the statistics of {name or kind!r} alone: the {kind} has layers beside them; "
            f"put its norm into a module of its own, or leave it out: where=~gf.where.named({name!r})."
        )
