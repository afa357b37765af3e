"""Gradient accumulation beside batch norms, which normalize each part of a batch alone: seen, and told once."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from goodfit.errors import GoodfitWarning
from goodfit.layers.ghost import GhostBatchNorm
from goodfit.plan import Plan

__all__ = ["watch_accumulation"]

_STEPS = 10  # who accumulates does so from the start


def watch_accumulation(plan: Plan) -> None:
    """Warn where the gradient of a step comes from several batches, each normalized by statistics of its own."""
    norms = [(name, m) for name, m in plan.model.named_modules() if isinstance(m, _BatchNorm)]
    for name, norm in sorted(norms, key=lambda pair: not pair[1].training):
        weight = norm.weight
        learned = plan.model.parameters() if weight is None or not weight.requires_grad else [weight]
        _Watch(plan, name, norm, [p for p in learned if p.requires_grad])
        return


class _Batches:
    """A hook on the model that counts the batches it learns from: runs with gradients, but not those within a backward pass."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm, self.count = norm, 0

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        learning = torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1
        alone = isinstance(self.norm, _BatchNorm) and not isinstance(self.norm, GhostBatchNorm)  # a ghost means to be so
        self.count += learning and alone and self.norm.training


class _Watch:
    """Hooks on parameters, of which the first to get a gradient is watched, for the first steps.

    Accumulation is a gradient added to one of the same step, which has not been written since, where two batches or more went
    into the sum. So neither two losses of one batch, nor a second gradient for which the first was cleared, nor gradients that
    are added nowhere are it.
    """

    def __init__(self, plan: Plan, name: str, norm: _BatchNorm, learned: list[nn.Parameter]) -> None:
        self.name, self.batches, self.sum = name, _Batches(norm), 0
        self.first: Tensor | None = None
        self.grad: Any = lambda: None
        self.version, self.step, self.steps = 0, -1, 0
        self.handles: list[Any] = [p.register_post_accumulate_grad_hook(self) for p in learned]  # type: ignore[no-untyped-call]
        self.handles.append(plan.model.register_forward_hook(self.batches))
        self.plan = weakref.ref(plan, lambda _: self.end())

    def end(self) -> None:
        for handle in self.handles:
            handle.remove()

    def __call__(self, parameter: Tensor) -> None:
        plan, grad = self.plan(), parameter.grad
        self.first = parameter if self.first is None else self.first
        if plan is None or grad is None or parameter is not self.first:
            return
        same = plan.clock.step == self.step
        added = same and grad is self.grad() and grad._version == self.version + 1
        self.sum = self.batches.count + (self.sum if added else 0)
        self.steps += not same
        self.batches.count, self.step, self.grad, self.version = 0, plan.clock.step, weakref.ref(grad), grad._version
        if added and self.sum > 1:
            self.end()
            self._tell()
        elif self.steps > _STEPS:
            self.end()

    def _tell(self) -> None:
        warnings.warn(
            f"The gradients of several batches go into one step, and the batch norm {self.name!r} normalizes each by its own "
            "statistics: it works as for the small batches, not as for their sum. Hold it still by "
            "gf.freeze_batchnorm(model), do without it by gf.convert_batchnorm(model, 'group', batches), or, where the small "
            "batches are large enough, give it momentum 1 − (1 − momentum)^(1/k) for k batches in a step.",
            GoodfitWarning,
            stacklevel=2,
        )
