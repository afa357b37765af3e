"""Batch norms into group norms that begin as near to them as least squares can bring them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from goodfit.batchnorms.followers import batch_normalized
from goodfit.dataflow.flows import tensors_in
from goodfit.errors import GoodfitError
from goodfit.layers.followed import FollowedGroupNorm
from goodfit.rows import rows_of
from goodfit.surgery.proof import answers, largest_error, mapped
from goodfit.surgery.running import call_model, must_run, quiet

__all__ = ["Start", "relative_error", "starts", "to_groupnorm"]

_VALUES = 8  # statistics of fewer values than these say little but their order
_LOOSE = 100  # other kernels may take over where there are twice as many rows; rows that mix differ by far more


class Start:
    """Where one group norm begins: γ and β per channel, by a regression of the batch norm's output on the groups'.

    Stands in for the norm's forward, on twice the rows: the first half goes the way of the new model, the second that of the
    old one, so that a norm is fitted to what it will get, with those before it converted. A norm that is called several
    times goes on with what all its calls so far say.
    """

    def __init__(self, norm: _BatchNorm, followers: tuple[str, ...], groups: int) -> None:
        self.norm, self.followers, self.most = norm, followers, groups
        self.groups = _divisor(norm.num_features, groups, 1)
        self.error: float | None = None
        like = next((t for t in (norm.weight, norm.running_mean) if t is not None), torch.empty(0))
        self.like = like.detach()
        self.weight = torch.ones_like(like, dtype=torch.float64) if norm.weight is None else norm.weight.detach().double()
        self.bias = torch.zeros_like(self.weight) if norm.bias is None else norm.bias.detach().double()
        self.count, self.sums = 0, [torch.zeros_like(self.weight) for _ in range(5)]

    def __call__(self, x: Tensor) -> Tensor:
        after, before = x.tensor_split(2)
        if not self.count:
            self.groups = _divisor(x.shape[1], self.most, x[0, 0].numel())
        target = batch_normalized(self.norm, before)
        grouped = F.group_norm(after, self.groups, eps=self.norm.eps)
        self._fit(*(t if t.dtype == torch.float64 else t.float() for t in (grouped, target)))
        weight, bias = (p.to(x.dtype).view(-1, *[1] * (x.ndim - 2)) for p in (self.weight, self.bias))
        y = torch.cat([grouped * weight + bias, target])
        for name in self.followers:
            y = self.norm.get_submodule(name)(y)
        return y

    def _fit(self, z: Tensor, t: Tensor) -> None:
        axes = [axis for axis in range(z.ndim) if axis != 1]
        new = [one.sum(axes, dtype=torch.float64) for one in (z, t, z * z, z * t, t * t)]
        self.count += z.numel() // z.shape[1]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)]
        mean_z, mean_t, zz, zt, tt = (one / self.count for one in self.sums)
        spread = zz - mean_z**2
        alive = spread > 1e-10  # else the channel is constant, to the precision of its group
        self.weight = torch.where(alive, (zt - mean_z * mean_t) / spread, 0.0)
        self.bias = mean_t - self.weight * mean_z
        missed = tt - mean_t**2 - self.weight**2 * torch.where(alive, spread, 0.0)
        self.error = math.sqrt(max(float(missed.sum() / tt.sum()), 0.0)) if float(tt.sum()) else 0.0

    def take(self) -> None:
        """Make the norm a group norm; its parameters stay the objects that an optimizer knows."""
        norm = self.norm
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            known = getattr(norm, name)
            if known is None:
                with torch.inference_mode(False):  # else the model could not be trained
                    norm.register_parameter(name, nn.Parameter(value.to(self.like.dtype, copy=True), requires_grad=False))
            else:
                known.data.copy_(value)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            del norm._buffers[name]
        channels = norm.num_features
        for name in ("num_features", "momentum", "track_running_stats"):
            del norm.__dict__[name]
        norm.__class__ = FollowedGroupNorm if self.followers else nn.GroupNorm  # type: ignore[assignment]
        vars(norm).update(num_groups=self.groups, num_channels=channels, affine=True)
        if self.followers:
            vars(norm)["followers"] = self.followers


def starts(model: nn.Module, x: Any, norms: dict[_BatchNorm, tuple[str, ...]], groups: int) -> list[Start]:
    """The group norms to be, fitted in one pass in the order of the layers; the model stays as it is."""
    found = [Start(norm, followers, groups) for norm, followers in norms.items()]
    rows = rows_of(x)
    with quiet(model), ExitStack() as stack:
        for one in found:
            vars(one.norm)["forward"] = one
            stack.callback(vars(one.norm).pop, "forward")
        twice = list(tensors_in(call_model(model, _doubled(x, rows))))
    bad = next((one.norm for one in found if not bool((one.weight + one.bias).isfinite().all())), None)
    if bad is not None:
        name = next(name for name, module in model.named_modules() if module is bad)
        raise GoodfitError(
            f"convert_batchnorm needs finite numbers, but the batch norm {name!r} gets nan or inf: look at the data."
        )
    halves = [t.tensor_split(2)[1] if t.ndim else t for t in twice]
    if largest_error(answers(model, x), halves)[0] > _LOOSE:
        raise GoodfitError(
            f"convert_batchnorm fits group norms on rows that do not depend on one another, but in {type(model).__name__} the "
            "outputs for some rows change where there are others beside them, or from run to run."
        )
    return found


def to_groupnorm(model: nn.Module, x: Any, norms: dict[_BatchNorm, tuple[str, ...]], groups: int) -> tuple[list[Start], float]:
    """Convert, and say how far the outputs have moved; a model that cannot do without what a batch norm has stays as it was."""
    try:
        truth = answers(model, x)
        found = starts(model, x, norms, groups)
    except GoodfitError:
        raise
    except Exception as problem:
        raise must_run(model, problem) from problem
    before = [_kept(one.norm) for one in found]
    try:
        for one in found:
            one.take()
        return found, relative_error(truth, answers(model, x))
    except BaseException as problem:
        for kept in before:
            _put_back(*kept)
        if not isinstance(problem, Exception):
            raise
        raise GoodfitError(
            f"{type(model).__name__} does not run with group norms, got {type(problem).__name__}: {problem}; something in it "
            "reads what batch norms alone have, such as running_mean."
        ) from problem


def relative_error(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The root mean square of the differences, over that of the numbers before."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(before, after, strict=True) if a.is_floating_point()]
    total = sum(float(a.square().sum()) for a, _ in pairs)
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs) / total) if total else 0.0


def _put_back(norm: _BatchNorm, kind: Any, entries: dict[str, Any], numbers: list[tuple[nn.Parameter, Tensor]]) -> None:
    norm.__class__ = kind
    vars(norm).clear()
    vars(norm).update(entries)
    for p, number in numbers:
        p.data.copy_(number)


def _kept(norm: _BatchNorm) -> tuple[Any, ...]:
    inner = ("_parameters", "_buffers")
    entries = {name: dict(value) if name in inner else value for name, value in vars(norm).items()}
    return norm, type(norm), entries, [(p, p.detach().clone()) for p in norm.parameters(recurse=False)]


def _divisor(channels: int, most: int, values: int) -> int:
    """The largest number of groups, at most so many, that divides the channels and leaves each group enough values."""
    fitting = [g for g in range(1, min(most, channels) + 1) if channels % g == 0 and channels // g * values >= _VALUES]
    return max(fitting, default=1)


def _doubled(x: Any, rows: int | None) -> Any:
    return mapped(x, lambda t: torch.cat([t, t]) if t.ndim and len(t) == rows else t)
