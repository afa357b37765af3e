"""The weights that a training gives: averaged ones to score beside those in training, and the ones to keep at the end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from goodfit.batchnorms.recalibrate import recalibrate, to_recalibrate
from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.phases import Epoch, Finish, State
from goodfit.plan import Plan
from goodfit.regularizers.best_file import BestFile
from goodfit.regularizers.spectral_norm import settle
from goodfit.tensors import load_tensors, tensors_of

__all__ = ["Views"]


class Views:
    """Finish regularizers on the model of a plan: averages first, whatever the order of the cocktail, then what restores."""

    def __init__(self, plan: Plan, keep: Any) -> None:
        self.plan = plan
        self._aside: dict[str, Tensor] | None = None
        stopping = [(key, one) for key, one in plan.active.items() if isinstance(one, Epoch)]
        if keep is not None and len(stopping) != 1:
            raise GoodfitError(f"keep= is the file of one EarlyStopping, got {len(stopping)} in the cocktail; leave it out.")
        self.files = {} if keep is None else {key: BestFile(keep, one) for key, one in stopping}  # type: ignore[arg-type]

    @property
    def inside(self) -> bool:
        """Whether the model holds the view to score."""
        return self._aside is not None or not self._averages()

    @contextmanager
    def view(self, batches: Any) -> Iterator[None]:
        """The averaged weights within, the training's own behind it."""
        averages = self._averages()
        if not averages or self._aside is not None:
            yield
            return
        weights, buffers = tensors_of(self.plan.model)
        self._aside = {name: t.clone() for name, t in {**weights, **buffers}.items()}
        try:
            self._apply(averages, batches, "with run.view(train_loader):")
            yield
        finally:
            load_tensors(self.plan.model, self._aside, {})
            self._aside = None

    def finish(self, batches: Any) -> None:
        """The weights and buffers to keep, into the model."""
        for key, _ in self._averages():
            begun = [t for name, t in self.plan.states[key].items() if name.startswith("sum.")]
            if begun and not any(bool(t > 0) for t in begun):
                one, steps = self.plan.active[key], self.plan.clock.step
                told = f"{one} has averaged nothing in {steps} steps, since its weight was 0; let it begin sooner."
                warnings.warn(told, GoodfitWarning, stacklevel=4)
        rest = [(key, one) for key, one in self.plan.of(Finish) if not one.averages]
        self._apply([*self._averages(), *rest], batches, "run.finish(batches=train_loader)")

    def take(self, mark: str) -> None:
        """Go on with the file of the run whose state was loaded."""
        for key, file in self.files.items():
            file.take(mark, *tensors_of(self.plan.model), self.plan.states[key])

    def whole(self, key: str) -> State:
        """The state of one regularizer, with what is kept in a file for it."""
        state = self.plan.states[key]
        return {**state, **self.files[key].read(*tensors_of(self.plan.model), state)} if key in self.files else state

    def roll_back(self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Go on from other weights, also behind a view; what follows the weights begins anew."""
        load_tensors(self.plan.model, weights, buffers)
        now, own = tensors_of(self.plan.model)
        if self._aside is not None:
            self._aside = {name: t.clone() for name, t in {**now, **own}.items()}
        self.plan.begin_watching()

    def _averages(self) -> list[tuple[str, Any]]:
        return [(key, one) for key, one in self.plan.of(Finish) if one.averages]

    def _apply(self, finishes: list[tuple[str, Any]], batches: Any, call: str) -> None:
        """Finishes in this order, in place; statistics of batch norms follow averaged weights, and never restored ones."""
        weights, buffers = tensors_of(self.plan.model)
        now, averager = {**weights, **buffers}, None
        for key, one in finishes:
            before, state = weights, self.whole(key)
            weights, buffers = one.finish(weights, buffers, state)
            if one.restores(state):
                averager = None
            elif not all(torch.equal(w, before[name]) for name, w in weights.items()):
                averager = one if one.averages else None
        renew = averager is not None and to_recalibrate(self.plan.model)
        if renew and batches is None:
            raise GoodfitError(f"{averager} averages weights, for which batch norms need other statistics: {call}.")
        now = {name: t.clone() for name, t in now.items()} if averager is not None else {}
        load_tensors(self.plan.model, weights, buffers)
        try:
            if averager is not None:
                settle(self.plan.model)
            if renew:
                recalibrate(self.plan.model, batches)
        except BaseException:
            load_tensors(self.plan.model, now, {})
            raise
