"""`gf.variance_shift`: how much dropout changes the variance that each batch norm gets, between training and eval."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from goodfit.batchnorms.batches import device_of, inputs
from goodfit.dataflow.flows import tensors_in
from goodfit.errors import GoodfitError
from goodfit.noise import Clock, Noisy
from goodfit.surgery.refusals import refuse_lazy
from goodfit.surgery.running import call_model, evaluating, training

__all__ = ["Shift", "VarianceShift", "variance_shift"]


@dataclass(frozen=True)
class Shift:
    """One batch norm. ratio: the median over channels of train-mode to eval-mode variance of its input; a mean would be that of
    the few channels that hardly vary. largest: of the channel where the two are farthest apart. running: the median for the
    running variance in place of the train-mode one."""

    name: str
    ratio: float
    largest: float
    running: float | None


@dataclass(frozen=True)
class VarianceShift:
    """What `gf.variance_shift` returns."""

    layers: tuple[Shift, ...]

    @property
    def worst(self) -> float:
        """The ratio farthest from 1, as a factor >= 1; 1 where there is no batch norm."""
        return max((max(s.ratio, 1 / s.ratio) if s.ratio > 0 else math.inf for s in self.layers), default=1.0)

    def __str__(self) -> str:
        width = max((len(s.name) for s in self.layers), default=0)
        lines = [f"{'':{width}}  train/eval  worst channel  running/eval"]
        for s in self.layers:
            running = "" if s.running is None else f"{s.running:.3f}"
            lines.append(f"{s.name:{width}}  {s.ratio:>10.3f}  {s.largest:>13.3f}  {running:>12}".rstrip())
        if not self.layers:
            return "no batch norm ran: no variance to shift"
        if all(s.largest == 1 for s in self.layers):
            return "\n".join([*lines, "no shift: nothing that is on in training alone changes the variances"])
        rule = "dropout behind the last batch norm shifts nothing; before one, 1.05 and more is a reason to move it or lower p"
        return "\n".join([*lines, f"worst {self.worst:.3f}; {rule}"])


def variance_shift(model: nn.Module, batches: Iterable[Any], *, samples: int = 1024, seed: int = 0) -> VarianceShift:
    """Measure, at the input of each batch norm, its variance in training over that in eval mode.

    Formula:  per channel Var_train[x] / Var_eval[x] over all rows; for p before a linear layer of weights w on inputs of mean m
              and variance s², it is Σ w² (s² + p m²) / (1 − p) / Σ w² s², where inputs are independent.
    Shapes:   batches is a DataLoader or a list of x, (x, y) or dicts of keywords. Train mode is the model's own, frozen parts
              and all, where it is in it; dropout of every kind is on, functions among it, and batch norms normalize by
              running statistics in both modes, so that it is dropout alone that is measured. A model under DDP or
              torch.compile is measured inside.
    Ranges:   about `samples` rows are used. seed is that of the masks. 1 is no shift.
    Errors:   GoodfitError for data with nan or inf, or without 2 different rows; for scripted and lazy models, one that does
              not run on a batch, or that cannot be copied. The model stays untouched, and so does torch's generator: a copy is
              measured.
    Source:   Li, Chen, Hu and Yang 2019, Understanding the disharmony between dropout and batch normalization by variance
              shift, arXiv 1801.05134.

    >>> model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 8), nn.BatchNorm1d(8))
    >>> shift = variance_shift(model, [torch.randn(1024, 64)])
    >>> 1.9 < shift.worst < 2.1
    True
    """
    copied = _copy(model)
    for name, layer in copied.named_modules():
        if isinstance(layer, Noisy):
            layer.bind(name, seed, Clock())
    xs = list(inputs(copied, batches, samples, "variance_shift"))
    if not _vary(xs):
        raise GoodfitError("variance_shift needs at least 2 different rows, got one, or equal ones: give more of the data.")
    norms = {name: m for name, m in copied.named_modules() if isinstance(m, _BatchNorm)}
    home = device_of(copied)
    with torch.random.fork_rng(devices=[home] if home.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        try:
            seen = [_variances(copied, xs, norms, mode) for mode in (training, evaluating)]
        except Exception as problem:
            first = (str(problem).strip().splitlines() or [""])[0]
            kind = type(copied).__name__
            raise GoodfitError(
                f"variance_shift runs {kind} on the batches in both modes, got {type(problem).__name__}: {first}"
            ) from problem
    layers = [_shift(n, seen[0][n], seen[1][n], norms[n].running_var) for n in norms if n in seen[0] and n in seen[1]]
    return VarianceShift(tuple(layers))


def _copy(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise GoodfitError(f"variance_shift takes a torch.nn.Module and batches, in this order, got a {type(model).__name__}.")
    inner = getattr(model, "_orig_mod", model)
    inner = inner.module if isinstance(inner, DataParallel | DistributedDataParallel) else inner
    for name, module in inner.named_modules():
        if isinstance(module, ScriptModule):
            raise GoodfitError(
                f"variance_shift cannot look into the scripted {name or 'model'}: give the model as it was before."
            )
    refuse_lazy(inner, "variance_shift")
    try:
        return copy.deepcopy(inner)
    except Exception as problem:
        first = (str(problem).splitlines() or [""])[0]
        raise GoodfitError(f"variance_shift measures a copy, but {type(inner).__name__} cannot be copied: {first}") from problem


def _vary(xs: list[Any]) -> bool:
    """Whether some row differs from the first one of its kind."""
    first: dict[int, Tensor] = {}
    for x in xs:
        for place, t in enumerate(tensors_in(x)):
            if t.ndim and len(t):
                one = first.setdefault(place, t[:1])
                if one.shape[1:] != t.shape[1:] or not torch.equal(one.expand_as(t), t):
                    return True
    return False


def _variances(model: nn.Module, xs: list[Any], norms: dict[str, _BatchNorm], mode: Any) -> dict[str, Tensor]:
    """The variance per channel of what each norm gets in one mode, over all batches and calls."""
    sums: dict[str, tuple[int, Tensor, Tensor, Tensor]] = {}

    def note(name: str) -> Any:
        def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)).double().movedim(1, -1).flatten(0, -2)
            count, shift, total, squares = sums.get(name, (0, x.mean(0), 0 * x[0], 0 * x[0]))
            sums[name] = count + len(x), shift, total + (x - shift).sum(0), squares + (x - shift).square().sum(0)

        return hook

    handles = [m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in norms.items()]
    try:
        with mode(model):
            for norm in norms.values():
                norm.training = False
            for x in xs:
                call_model(model, copy.deepcopy(x))
    finally:
        for handle in handles:
            handle.remove()
    return {name: squares / n - (total / n) ** 2 for name, (n, _, total, squares) in sums.items()}


def _shift(name: str, train: Tensor, still: Tensor, running: Tensor | None) -> Shift:
    """A channel that is constant in eval mode has no ratio."""
    if not bool((train.isfinite() & still.isfinite()).all()):
        raise GoodfitError(
            f"variance_shift needs finite numbers, but the batch norm {name!r} gets nan or inf; look at the data."
        )
    alive = still > 1e-12 * still.max()
    ratios = (train / still)[alive] if bool(alive.any()) else torch.ones(1)
    far = int(ratios.log().abs().argmax())
    moved = None if running is None else _median((running.double() / still)[alive])
    return Shift(name, _median(ratios), float(ratios[far]), moved)


def _median(values: Tensor) -> float:
    """Of an even number the mean of the two in the middle."""
    return float(values.quantile(0.5)) if len(values) else 1.0
