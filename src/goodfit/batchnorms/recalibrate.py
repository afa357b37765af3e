"""`gf.recalibrate`: the running statistics of batch norms, exact over data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from goodfit.batchnorms.batches import inputs
from goodfit.batchnorms.compensate import affine_changes
from goodfit.batchnorms.freeze import owns_statistics
from goodfit.batchnorms.norm import Norm
from goodfit.batchnorms.still import is_frozen
from goodfit.batchnorms.watch import Watch
from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.processes import world
from goodfit.surgery.refusals import refuse_lazy
from goodfit.surgery.running import call_model, evaluating, must_run
from goodfit.tensors import put

__all__ = ["recalibrate", "to_recalibrate"]


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    exact: bool = True,
    samples: int | None = None,
    keep_function: bool = False,
) -> dict[str, float]:
    """Set the running statistics of all batch norms to those of the data, as after averaging weights or on new data.

    Formula:  μ = Σ x / n and σ² = Σ (x − μ)² / n per channel over all rows, in eval mode, where the norms before use their own
              new statistics: then eval mode says of the data what train mode, without dropout, says of it as one batch. With
              keep_function, γ' = γ · √(σ'² + eps) / √(σ² + eps) and β' = β + γ · (μ' − μ) / √(σ² + eps): eval mode says what
              it said.
    Shapes:   batches is a DataLoader, or a list, of x, [x], (x, y) or dicts of keywords. A model under DataParallel, DDP or
              torch.compile is recalibrated inside.
    Ranges:   exact takes as many passes over the data as norms lie behind one another, after the first only as deep as it must
              where all batches call the same norms; one where all the data is one batch. exact=False takes one, in which each
              norm sees the norms before normalize by their batch, as in training: what small batches add to the spread stays
              in. keep_function takes one. samples ends a pass after about so many rows.
    Errors:   GoodfitError, with the model untouched, for a model that fails on a batch, data with NaN or inf, a stream that
              more than one pass would have to read, scripted and lazy models, norms inside torch.func.vmap. A norm that does
              not run in eval mode, or not by torch's batch_norm, is left out, with a warning.
    Source:   Wu and Johnson 2021, Rethinking "Batch" in BatchNorm, arXiv 2105.07576, for population statistics.

    Returns how far each norm moved: the largest change of a mean or standard deviation, in standard deviations. Frozen norms
    and instance norms stay as they are, and so does momentum; num_batches_tracked is the number of batches. A norm that is
    called several times has the statistics of all its calls; a call behind another call of it sees that one normalize by its
    batch. Each pass starts from the same random numbers of torch; data that a loader draws elsewhere differ from pass to
    pass. Where several processes train together, each gives its share of the data, and all get the statistics of the whole.

    >>> norm = nn.BatchNorm1d(1)
    >>> _ = recalibrate(norm, [torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0]])])
    >>> norm.running_mean
    tensor([4.])
    """
    if not isinstance(model, nn.Module):
        raise GoodfitError(f"recalibrate takes a torch.nn.Module and batches, in this order, got a {type(model).__name__}.")
    model = _unwrapped(model)
    left = [m for m in model.modules() if is_frozen(m)]
    return _Recalibration(model, left, keep_function).run(batches, samples, exact and not keep_function)


def to_recalibrate(model: nn.Module) -> bool:
    """Whether there is a batch norm whose running statistics follow the weights."""
    return any(owns_statistics(m) and not is_frozen(m) for m in model.modules())


class _Recalibration:
    """The passes over the data; what they find is written at the very end."""

    def __init__(self, model: nn.Module, left: list[nn.Module], still: bool) -> None:
        _refuse(model)
        self.model, self.left = model, left
        self.names = {id(b): name.rpartition(".")[0] or type(model).__name__ for name, b in model.named_buffers()}
        self.watch = Watch({id(b) for m in left for b in m.buffers(recurse=False)}, {id(b): b for b in model.buffers()}, still)

    def run(self, batches: Iterable[Any], samples: int | None, exact: bool) -> dict[str, float]:
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._pass(batches, samples, exact)
            while self.watch.pending():
                if isinstance(batches, Iterator):
                    raise GoodfitError(
                        "recalibrate must read the data once for each norm behind another, got a stream that can be read once: "
                        "give a list or a DataLoader, or say exact=False."
                    )
                self._pass(batches, samples, exact)
            found = self.watch.norms
            self._warn_of_left_out(found)
            changes = affine_changes(self.model, found, self.names) if self.watch.still else []
            moved = {self.names[key]: norm.write() for key, norm in found.items()}
            for parameter, value in changes:
                put(parameter, value)
            for module in self.model.modules():
                norm, batches_tracked = found.get(id(getattr(module, "running_mean", None))), _counter(module)
                if norm is not None and batches_tracked is not None:
                    put(batches_tracked, torch.full_like(batches_tracked, norm.calls))
        return moved

    def _pass(self, batches: Iterable[Any], samples: int | None, exact: bool) -> None:
        """One pass over the data, and the statistics that it tells."""
        count = 0
        self.watch.begin()
        for x in inputs(self.model, batches, samples, "recalibrate"):
            self._forward(x)
            count += 1
        told, pending = self.watch.end(), self.watch.pending()
        whole = count == 1 and world() == 1 and all(norm.calls == 1 for norm in pending)  # a batch that is all the data
        for norm in pending if whole or not exact else told:
            norm.settle(self.names[id(norm.mean)])

    def _forward(self, x: Any) -> None:
        try:
            self.watch.run(partial(call_model, self.model, x))
        except GoodfitError:
            raise
        except Exception as error:
            raise must_run(self.model, error) from error

    def _warn_of_left_out(self, found: dict[int, Norm]) -> None:
        told = {id(m.running_mean) for m in self.left if owns_statistics(m)} | found.keys()
        names = [
            n or type(m).__name__
            for n, m in self.model.named_modules()
            if owns_statistics(m) and id(m.running_mean) not in told
        ]
        if names:
            warnings.warn(
                f"recalibrate leaves {', '.join(names)} as it is: in eval mode it does not run by torch's batch_norm.",
                GoodfitWarning,
                stacklevel=4,
            )


def _counter(module: nn.Module) -> Tensor | None:
    found = getattr(module, "num_batches_tracked", None)
    return found if isinstance(found, Tensor) else None


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model itself: a wrapper may run copies of it."""
    while isinstance(model, DataParallel | DistributedDataParallel):
        model = model.module
    return model


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, ScriptModule):
            raise GoodfitError(
                f"recalibrate cannot look into the scripted {name or type(model).__name__!r}: give it unscripted."
            )
    refuse_lazy(model, "recalibrate")
