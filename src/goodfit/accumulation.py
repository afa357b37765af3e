"""Gradient accumulation beside batch norms, which normalize each part of a batch alone: seen, and told once."""

from __future__ import annotations

import warnings
import weakref

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from goodfit.errors import GoodfitWarning
from goodfit.plan import Plan

__all__ = ["watch_accumulation"]


def watch_accumulation(plan: Plan) -> None:
    """Warn where the gradient of a step comes from several batches, each normalized by statistics of its own."""
    norms = [(name, m) for name, m in plan.model.named_modules() if isinstance(m, _BatchNorm)]
    for name, norm in sorted(norms, key=lambda pair: not pair[1].training):
        if norm.weight is not None and norm.weight.requires_grad and norm.num_batches_tracked is not None:
            _Watch(plan, name, norm)
            return


class _Watch:
    """A hook on the γ of one batch norm, which runs before a gradient is added to what is there.

    Accumulation is a gradient added to one of the same step, where the norm has counted a batch between the two. So neither
    two losses of one batch, nor a second gradient for which the first was cleared, nor passes without gradients are it.
    """

    def __init__(self, plan: Plan, name: str, norm: _BatchNorm) -> None:
        self.name, self.norm = name, norm
        self.step, self.count = -1, 0
        self.handle = norm.weight.register_hook(self)  # type: ignore[no-untyped-call]
        self.plan = weakref.ref(plan, lambda _: self.handle.remove())

    def __call__(self, grad: Tensor) -> None:
        plan, held, counted = self.plan(), self.norm.weight.grad, getattr(self.norm, "num_batches_tracked", None)
        if plan is None or counted is None:
            return
        count = counted._version  # a device need not be waited for to read it
        if plan.clock.step == self.step and held is not None and count != self.count and bool(held.any()):
            self.handle.remove()
            self._tell()
        self.step, self.count = plan.clock.step, count

    def _tell(self) -> None:
        warnings.warn(
            f"The gradients of several batches go into one step, and the batch norm {self.name!r} normalizes each by its own "
            "statistics, which move its running ones each time: it works as for the small batches, not as for their sum. Hold "
            "it still by gf.freeze_batchnorm(model), do without it by gf.convert_batchnorm(model, 'group', batches), or, where "
            "the small batches are large enough, give it momentum 1 − (1 − momentum)^(1/k) for k batches in a step.",
            GoodfitWarning,
            stacklevel=2,
        )
