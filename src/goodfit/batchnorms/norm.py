"""One batch norm of a model that runs over data: what it gets, what that depends on, and the statistics that it will have."""

from __future__ import annotations

from collections.abc import Mapping, Set
from itertools import compress

import torch
from torch import Tensor

from goodfit.batchnorms.moments import Moments
from goodfit.errors import GoodfitError
from goodfit.processes import world
from goodfit.tensors import put

__all__ = ["Norm", "agree"]


class Norm:
    """One pair of running statistics, called once or several times in a forward pass.

    known: the statistics that it will have. depends: the norms that what it gets was computed from. affines: the (γ, β) of its
    calls.
    """

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        self.mean, self.var, self.eps = mean, var, 0.0
        self.known: tuple[Tensor, Tensor] | None = None
        self.depends = frozenset[Norm]()
        self.affines: dict[tuple[int, int], tuple[Tensor | None, Tensor | None]] = {}
        self.forget()

    @property
    def waits(self) -> frozenset[Norm]:
        """The norms without known statistics among those that it depends on."""
        return frozenset(norm for norm in self.depends if norm.known is None)

    def forget(self) -> None:
        """Before a pass over the data; what is known stays."""
        if self.known is None:
            self.moments, self.calls = Moments(self.mean), 0

    def settle(self, name: str) -> None:
        """Take what was seen, in all processes, as the statistics."""
        if world() > 1:
            self.moments.over_processes()
        mean, var = self.moments.mean.to(self.mean.dtype), self.moments.var.to(self.var.dtype)
        if not bool((mean.isfinite() & var.isfinite()).all()):
            raise GoodfitError(
                f"recalibrate met NaN, inf or numbers beyond {self.mean.dtype} in what {name} gets; all statistics are as they "
                "were. Look for such rows in the data, or such weights before it."
            )
        self.known = mean, var

    def write(self) -> float:
        """Put the statistics in; how far they moved, in standard deviations."""
        assert self.known is not None
        (mean, var), (new_mean, new_var) = [(m.double(), v.double()) for m, v in ((self.mean, self.var), self.known)]
        spread = (new_var + self.eps).sqrt()
        moved = ((new_mean - mean).abs() / spread).maximum(((var + self.eps).sqrt() / spread - 1).abs())
        put(self.mean, self.known[0])
        put(self.var, self.known[1])
        return float(moved.max())


def agree(
    norms: Mapping[int, Norm], called: Set[int], cut: bool, owned: Mapping[int, Tensor]
) -> tuple[dict[int, Norm], set[int], bool]:
    """What all processes together have seen, in the same order in each: norms, which of them were called, whether one cut."""
    keys, device = list(owned), next(iter(owned.values())).device
    table = torch.zeros(len(keys) + 1, 3, dtype=torch.float64, device=device)
    for key, norm in norms.items():
        table[keys.index(key)] = torch.tensor([keys.index(id(norm.var)) + 1, norm.eps, key in called])
    table[-1, 0] = cut
    torch.distributed.all_reduce(table, torch.distributed.ReduceOp.MAX)
    *rows, (some_cut, _, _) = table.tolist()
    whole = {}
    for key, (var, eps, _) in zip(keys, rows, strict=True):
        if var:
            whole[key] = norms.get(key) or Norm(owned[key], owned[keys[int(var) - 1]])
            whole[key].eps = eps
    every = list(whole.values())
    depends = torch.tensor([[b in a.depends for b in every] for a in every], dtype=torch.uint8, device=device)
    torch.distributed.all_reduce(depends, torch.distributed.ReduceOp.MAX)
    for norm, row in zip(every, depends.tolist(), strict=True):
        norm.depends = frozenset(compress(every, row))
    return whole, {key for key, (_, _, ran) in zip(keys, rows, strict=True) if ran}, bool(some_cut)
