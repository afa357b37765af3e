"""The training step of the reference loop, from one batch or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from goodfit.errors import GoodfitError
from goodfit.fitting.compute import Compute
from goodfit.fitting.data import to_device
from goodfit.fitting.feed import in_step
from goodfit.fitting.guard import Guard
from goodfit.fitting.loop import Prepare
from goodfit.processes import summed, world
from goodfit.rows import rows_of
from goodfit.run import Run

__all__ = ["Stepping"]


@dataclass
class Stepping:
    """Steps of one run. scaler: of losses in half precision, None where none is needed. taken: how many steps there were."""

    run: Run
    optimizer: Optimizer
    prepare: Prepare | None = None
    compute: Compute = field(default_factory=Compute)
    guard: Guard | None = None
    scaler: torch.amp.GradScaler | None = field(init=False)

    def __post_init__(self) -> None:
        self._home = next(self.run.model.parameters()).device
        self.scaler = self.compute.scaler(self._home)
        self._through: nn.Module | None = self.compute.placed(self.run.model)
        self.taken, self._looked = 0, False

    def over(self, batches: Iterable[Any]) -> Iterator[tuple[Tensor, int]]:
        """One epoch, step by step: the mean loss over its rows, as it was before the step, and how many they are."""
        window: list[_Micro] = []
        for batch, rows in in_step(batches):
            window.append(self._backward(batch, rows, window[0].rows if window else None))
            if len(window) == self.compute.accumulate:
                yield from self._stepped(window)
                window = []
        if window:
            yield from self._stepped(window)

    def epoch(self, batches: Iterable[Any]) -> float:
        """One epoch; the mean loss over its rows, as it was during the epoch."""
        total, rows = torch.zeros((), dtype=torch.float64, device=self._home), 0
        for loss, count in self.over(batches):
            total += loss * count
            rows += count
        return float(total / rows)

    def autocast(self) -> AbstractContextManager[Any]:
        """What forwards run in, those of a validation too."""
        return self.compute.autocast(self._home)

    def _backward(self, batch: Any, rows: int, first: int | None) -> _Micro:
        """Gradients of one batch; of several, and over processes, they add up in the share of its rows."""
        x, y = to_device(batch, self._home)
        x, y = self.compute.laid(x), y if self.prepare is None else self.prepare(y)
        if first is None:
            self.optimizer.zero_grad()
            if self.guard is not None:
                self.guard.begin()
        x, y = self.run.batch(x, y)
        with self.autocast():
            loss = self.run.loss(x, y, through=self._through)
        own = rows_of(y) or 1
        share = own * world() / (first or rows)  # DDP takes the mean over the processes
        whole = loss if share == 1 else loss * share
        torch.autograd.backward(whole if self.scaler is None else self.scaler.scale(whole))
        return _Micro(x, y, loss.detach(), own, rows)

    def _stepped(self, window: list[_Micro]) -> Iterator[tuple[Tensor, int]]:
        """The step, and what is told of it; nothing where it is left out."""
        rows = sum(one.rows for one in window)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if len(window) > 1:
            for p in self.run.model.parameters():
                if p.grad is not None:
                    p.grad.mul_(window[0].rows / rows)
        if world() > 1 and not self._looked:
            self._refuse_unused()
        self._looked = True
        fine = self.guard is None or self.guard.finite([one.loss for one in window])
        total = torch.stack([one.loss.double() * one.own for one in window]).sum()
        if world() > 1:
            total, spoiled = summed(total, not fine)
            fine = not spoiled
        if fine or not self._left_out(window):
            self.run.gradient(self.optimizer)
            self._move()
            self.run.step(self.optimizer)
            self.taken += 1
            yield total / rows, rows

    def _refuse_unused(self) -> None:
        """DDP waits for the gradient of every weight."""
        unused = next((name for name, p in self.run.model.named_parameters() if p.requires_grad and p.grad is None), None)
        if unused is not None:
            raise GoodfitError(
                f"Processes that train together exchange all gradients, and the weight {unused!r} got none in the first step; "
                "freeze it (requires_grad_(False)), or use it in the model."
            )

    def _left_out(self, window: list[_Micro]) -> bool:
        """A scaled loss may overflow once in a while; everything else is looked into."""
        if self.guard is None:
            return False
        self.guard.restore()
        if self.scaler is not None and self.scaler.get_scale() > 1:
            self._move()
        else:
            odd = next((one for one in window if not one.loss.isfinite()), window[-1])
            self.guard.refuse(self.taken + 1, odd.x, odd.y, odd.loss)
        self.run.skip()
        return True

    def _move(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


@dataclass(frozen=True)
class _Micro:
    """One of the batches of a step. loss: the mean over its own rows; rows: those of all processes."""

    x: Any
    y: Any
    loss: Tensor
    own: int
    rows: int
