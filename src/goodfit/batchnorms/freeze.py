"""`gf.freeze_batchnorm`: batch norms that no `model.train()` wakes, and `gf.thaw_batchnorm`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from goodfit.errors import GoodfitError
from goodfit.where import Where, everything

__all__ = ["freeze_batchnorm", "is_frozen", "owns_statistics", "thaw_batchnorm"]


def freeze_batchnorm(model: nn.Module, *, affine: bool = True, where: Where = everything) -> None:
    """Hold batch norms still: they normalize by their running statistics, which nothing moves, whatever `model.train()` says.

    Formula:  y = γ · (x − running mean) / √(running var + eps) + β in training as in eval.
    Shapes:   unchanged. The model may be wrapped (DataParallel, DDP, compiled), copied or pickled before or afterwards.
    Ranges:   affine also takes γ and β out of training (requires_grad); where selects norms by the names of their modules, as
              in gf.where.named("backbone.*").
    Errors:   GoodfitError, with the model untouched, if no batch norm is there; for one without running statistics, a lazy or a
              scripted one; for a module that owns running statistics beside other layers, which cannot be held still alone.
    Source:   Ioffe and Szegedy 2015, Batch normalization, arXiv 1502.03167, for inference by fixed statistics.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> freeze_batchnorm(model)
    >>> model.train()[1].training
    False
    """
    if not isinstance(model, nn.Module):
        raise GoodfitError(f"freeze_batchnorm takes a torch.nn.Module, got a {type(model).__name__}.")
    chosen = [(n, m) for n, m in model.named_modules() if _is_batchnorm(m) and where.holds(n, "norm")]
    if not chosen:
        raise GoodfitError(
            f"freeze_batchnorm found no batch norm in {type(model).__name__} (where={where}); nothing to freeze."
        )
    for name, module in chosen:
        _refuse(name, module)
    for _, module in chosen:
        held = _still(module) or _Still(module)
        module.__dict__["train"] = held
        module.training = False
        if affine:
            held.hold_affine()


def thaw_batchnorm(model: nn.Module, *, where: Where = everything) -> None:
    """Let frozen batch norms go: each is in the mode that it would have had, and γ and β train again where they did.

    Formula:  what `freeze_batchnorm` did, undone.
    Shapes:   unchanged.
    Ranges:   where selects norms by the names of their modules; one that is not frozen stays as it is.
    Errors:   none.
    Source:   this package.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> freeze_batchnorm(model)
    >>> thaw_batchnorm(model)
    >>> model[1].training, model[1].weight.requires_grad
    (True, True)
    """
    for name, module in model.named_modules():
        held = _still(module)
        if held is not None and where.holds(name, "norm"):
            held.release()
            del module.__dict__["train"]


def is_frozen(module: nn.Module) -> bool:
    """Whether a norm is held still, by `freeze_batchnorm` or by being a FrozenBatchNorm of another library."""
    return _still(module) is not None or "frozen" in type(module).__name__.lower()


def owns_statistics(module: nn.Module) -> bool:
    """Whether a module keeps running statistics over batches."""
    buffers = dict(module.named_buffers(recurse=False))
    return {"running_mean", "running_var"} <= buffers.keys() and not isinstance(module, _InstanceNorm)


class _Still:
    """Stands in for `train` of one norm: a copied or unpickled norm gets its own, and a compiled graph sees nothing of it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.mode = module, module.training
        self.trained: dict[str, bool] = {}

    def __call__(self, mode: bool = True) -> nn.Module:
        """Note the mode for later, and tell the layers inside."""
        type(self.module).train(self.module, mode)
        self.mode, self.module.training = self.module.training, False
        return self.module

    def hold_affine(self) -> None:
        for name, p in self._affine():
            self.trained.setdefault(name, p.requires_grad)
            p.requires_grad_(False)
            p.grad = None  # momentum would go on by a gradient of zeros

    def release(self) -> None:
        for name, p in self._affine():
            p.requires_grad_(self.trained.get(name, p.requires_grad))
        self.module.training = self.mode

    def _affine(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters(recurse=False)


def _still(module: nn.Module) -> _Still | None:
    held = module.__dict__.get("train")
    return held if isinstance(held, _Still) else None


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
