"""`gf.convert_batchnorm`: batch norms into others, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm

from goodfit.batchnorms.batches import inputs
from goodfit.batchnorms.followers import followers_of
from goodfit.batchnorms.freeze import owns_statistics
from goodfit.batchnorms.groupnorm import to_groupnorm
from goodfit.batchnorms.resting import settle_biases
from goodfit.errors import GoodfitError, GoodfitWarning, nearest
from goodfit.layers.ghost import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from goodfit.layers.synchronized import FollowedSyncBatchNorm, FollowedTorchSyncBatchNorm, SyncBatchNorm, synchronized
from goodfit.rows import joined
from goodfit.surgery.insert import refuse_wrappers

__all__ = ["Converted", "convert_batchnorm"]

_GHOSTS = {nn.BatchNorm1d: GhostBatchNorm1d, nn.BatchNorm2d: GhostBatchNorm2d, nn.BatchNorm3d: GhostBatchNorm3d}

Norms = dict[_BatchNorm, tuple[str, ...]]


@dataclass(frozen=True)
class Converted:
    """What `gf.convert_batchnorm` returns. Errors are root mean squares of differences over those of what was said before."""

    model: nn.Module
    layers: tuple[tuple[str, str, float | None], ...]  # name, what it is now, error of its outputs (group norms that ran)
    left: tuple[str, ...]  # modules with running statistics of their own, which are no batch norms of torch
    error: float | None  # of the model's outputs, for group norms

    def __str__(self) -> str:
        width = max((len(name) for name, _, _ in self.layers), default=0)
        grouped = self.error is not None
        told = [("not reached" if e is None else f"error {e:.1%}") if grouped else "" for _, _, e in self.layers]
        lines = [
            f"{name or 'the model':{width}}  {now}  {e}".rstrip() for (name, now, _), e in zip(self.layers, told, strict=True)
        ]
        lines += [f"{name}: left as it is" for name in self.left]
        lines += [f"error of the outputs, to be trained away: {self.error:.1%}"] if self.error is not None else []
        return "\n".join(lines or ["nothing to convert"])


def convert_batchnorm(
    model: nn.Module,
    to: str,
    batches: Iterable[Any] | None = None,
    *,
    groups: int = 32,
    size: int = 32,
    samples: int = 256,
) -> Converted:
    """Turn all batch norms of a model into synchronized, ghost or group norms, in place, without renaming anything.

    Formula:  "sync": statistics over all processes, by torch's SyncBatchNorm, or on the CPU, for which that is not made, by one
              of the same formula. "ghost": in training, statistics of each `size` consecutive rows of what the norm gets
              (tokens, where the model folds them into rows); eval is a batch norm's.
              "group": per row, y = γ · z + β with z = (x − mean) / √(var + eps) over groups of channels, and with the γ and β
              per channel that least squares find: min Σ (γz + β − t)², where t is what the batch norm said in eval mode, and z
              stands behind converted norms.
    Shapes:   unchanged. Modules stay the same objects of another class: modes, hooks, sharing, frozen parameters and what the
              optimizer knows stay. `state_dict` keys stay for "sync" and "ghost"; a group norm has no running statistics. A
              subclass that goes on to layers of its own, such as a norm with an activation in it, does so afterwards.
    Ranges:   batches, for "group" alone, is a DataLoader or list of x, (x, y) or dicts of keywords; about `samples` rows of it
              are held in memory. groups, >= 1, the most groups: a layer gets the largest divisor of its channels up to it that
              leaves a group 8 values of a row; the fewer, the nearer the start. size, >= 2, rows.
    Errors:   GoodfitError, with the model untouched, for a model without batch norms; wrapped, compiled, scripted or lazy ones;
              a subclass that does something else; SyncBatchNorm to "ghost"; for "group" rows that depend on one another in
              eval mode, data with nan or inf, a norm with one value per row, and outputs that hold no tensors. A module that
              keeps running statistics by itself is left, with a warning.
    Source:   Wu and He 2018, Group normalization, arXiv 1803.08494; Hoffer, Hubara and Soudry 2017, Train longer, generalize
              better, arXiv 1705.08741, for ghost batch norm.

    The running statistics of a ghost norm move once per batch, toward the mean over the chunks.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> print(convert_batchnorm(model, "ghost", size=16))
    1  GhostBatchNorm2d(8, size=16)
    """
    targets = ("sync", "ghost", "group")
    if to not in targets:
        raise GoodfitError(f"convert_batchnorm converts to 'sync', 'ghost' or 'group', got {to!r}; {nearest(str(to), targets)}")
    for name, number, least in (("groups", groups, 1), ("size", size, 2)):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise GoodfitError(f"convert_batchnorm.{name} must be an integer >= {least}, got {name}={number!r}.")
    if (batches is None) is (to == "group"):
        need = "needs batches to begin from, as in [x]" if to == "group" else "takes no batches: nothing is fitted"
        raise GoodfitError(f"convert_batchnorm(model, {to!r}) {need}.")
    names, norms = _chosen(model, to)
    errors: dict[nn.Module, float | None] = {}
    error = None
    if batches is not None:
        found, error = to_groupnorm(model, joined(list(inputs(model, batches, samples, "convert_batchnorm"))), norms, groups)
        errors = {one.norm: one.error for one in found}
    for norm, followers in norms.items():
        if to == "sync":
            _to_sync(norm, followers)
        elif to == "ghost":
            _to_ghost(norm, followers, size)
    settle_biases(model)
    left = _left(model)
    if left:
        shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        warnings.warn(f"convert_batchnorm leaves {shown}: no batch norm of torch.", GoodfitWarning, stacklevel=2)
    return Converted(model, tuple((n, _told(m), errors.get(m)) for m, n in names.items()), left, error)


def _chosen(model: nn.Module, to: str) -> tuple[dict[_BatchNorm, str], Norms]:
    """The batch norms with their names and followers, all of them convertible."""
    if not isinstance(model, nn.Module):
        raise GoodfitError(f"convert_batchnorm takes a torch.nn.Module and a target, got a {type(model).__name__}.")
    if any(True for _ in model.children()):
        refuse_wrappers(model, "convert_batchnorm")
    elif isinstance(model, ScriptModule):
        raise GoodfitError("convert_batchnorm cannot reach into a scripted batch norm: convert before scripting.")
    names = {m: name for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not names:
        raise GoodfitError(f"convert_batchnorm found no batch norm in {type(model).__name__}; nothing to convert.")
    if to == "sync":
        names = {m: name for m, name in names.items() if not isinstance(m, _sync_of(m))}
    norms = {m: followers_of(name, m) for m, name in names.items()}
    for norm, name in names.items():
        if to == "ghost" and not isinstance(norm, tuple(_GHOSTS)):
            raise GoodfitError(
                f"convert_batchnorm makes ghosts of BatchNorm1d, 2d and 3d, but {name!r} is a {type(norm).__name__}, whose "
                "statistics are those of more rows, not of fewer."
            )
    return names, norms


def _to_sync(norm: _BatchNorm, followers: tuple[str, ...]) -> None:
    kind = _sync_of(norm)
    followed = FollowedSyncBatchNorm if kind is SyncBatchNorm else FollowedTorchSyncBatchNorm
    norm.__class__ = followed if followers else kind
    vars(norm).update({"followers": followers} if followers else {}, process_group=None)


def _sync_of(norm: _BatchNorm) -> type[_BatchNorm]:
    """The synchronized batch norm that it is to be."""
    return synchronized(next((t.device for t in (*norm.parameters(), *norm.buffers())), torch.device("cpu")))


def _to_ghost(norm: _BatchNorm, followers: tuple[str, ...], size: int) -> None:
    norm.__class__ = next(ghost for kind, ghost in _GHOSTS.items() if isinstance(norm, kind))
    vars(norm).update(followers=followers, size=size)


def _told(norm: nn.Module) -> str:
    if isinstance(norm, nn.GroupNorm):
        return f"GroupNorm({norm.num_groups}, {norm.num_channels})"
    size = f", size={norm.size}" if isinstance(norm, GhostBatchNorm) else ""
    return f"{type(norm).__name__.removeprefix('Followed').removeprefix('Torch')}({norm.num_features}{size})"


def _left(model: nn.Module) -> tuple[str, ...]:
    return tuple(n for n, m in model.named_modules() if owns_statistics(m) and not isinstance(m, _BatchNorm))
