"""Dropout of what goes into a model."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.hyper import hyper
from goodfit.layers.dropout import SeededInputDropout
from goodfit.phases import Build
from goodfit.surgery.arguments import insert_on_input, named_inputs
from goodfit.surgery.insert import refuse_wrappers
from goodfit.surgery.trace import flow
from goodfit.where import Where, everything, named

__all__ = ["InputDropout"]


@dataclass(frozen=True)
class InputDropout(Build):
    """Dropout of input features: in training each number of an input is zero with probability p, the others are scaled up.

    Formula: x · mask / (1 − p) with mask ~ Bernoulli(1 − p) for each number, so for each feature of each row by itself; in
        eval inputs pass as they are.
    Phase: Build. It acts on every input of floating point, of any rank; never on integers and booleans, such as tokens and
        masks. Masks of floating point are left out, with a warning: what holds inf or NaN in the example, and what is called
        mask, as attn_mask is, unless where is named("attn_mask") itself. where picks inputs by the name of the parameter of
        `forward` that takes them, whether handed over by position or by keyword: where=named("x"), within a dict or tuple
        named("x.0"). Shapes stay.
    Numbers: p, the probability of a zero, in [0, 1), off at 0.
    Errors: p outside [0, 1); a model without inputs of floating point, or none but masks that where picks, or that drops its
        inputs itself; a bare leaf, a DDP or compiled wrapper.
    Source: Srivastava et al. 2014, Dropout: a simple way to prevent neural networks from overfitting, which keeps 0.8 of the
        visible units; Maaten et al. 2013, Learning with marginalized corrupted features.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> InputDropout(0.1).build(model, torch.zeros(2, 4)).inputdropout_input.layer
    SeededInputDropout(p=0.1)
    """

    p: float = hyper(0.1, valid="[0, 1)", off=0.0, low=0.0, high=0.5)
    where: Where = everything

    def build(self, model: nn.Module, example: Any) -> nn.Module:
        refuse_wrappers(model, "InputDropout")
        there = {layer.source for layer in _layers(model)}
        for name in self._names(model, example):
            if name not in there:
                insert_on_input(model, name, f"inputdropout_{name.replace('.', '_')}", SeededInputDropout(source=name))
        self.tune(model)
        return model

    def tune(self, model: nn.Module) -> None:
        for layer in _layers(model):
            if self.where.holds(layer.source, "place"):
                layer.p = self.at(0).p

    def _names(self, model: nn.Module, example: Any) -> list[str]:
        inputs, kind = named_inputs(model, example), type(model).__name__
        floats = {name: t for name, t in inputs.items() if t.is_floating_point()}
        if not floats:
            raise GoodfitError(
                f"InputDropout drops numbers of floating point, and {kind} takes none: leave it out of the cocktail."
            )
        chosen = {name: t for name, t in floats.items() if self.where.holds(name, "place")}
        if not chosen:
            raise GoodfitError(f"InputDropout matched no input (where={self.where}); {kind} takes: {', '.join(floats)}.")
        masks = {name: reason for name, t in chosen.items() if (reason := self._mask(name, t))}
        chosen = {name: t for name, t in chosen.items() if name not in masks}
        told = "; ".join(f"{name}, {reason}" for name, reason in masks.items())
        if not chosen:
            raise GoodfitError(f"InputDropout drops no masks, and {kind} takes {told}: leave it out of the cocktail.")
        for call in flow(model, example):
            if call.kind == "dropout" and any(call.source is t for t in chosen.values()):
                by = f"Dropout(p, where=named({call.name!r})) sets its rate" if call.name else "set its rate"
                raise GoodfitError(f"InputDropout finds that {kind} drops its inputs itself: {by}.")
        if masks:
            warnings.warn(f"InputDropout leaves out {told}.", GoodfitWarning, stacklevel=4)
        return list(chosen)

    def _mask(self, name: str, t: Tensor) -> str:
        """Why an input is taken for a mask, "" where it is not."""
        if not bool(t.isfinite().all()):
            return "which is not finite in the example"
        called = {"mask", "masks"} & set(re.split("[^a-z]+", name.lower()))
        return f"a mask by its name (where=named({name!r}) takes it)" if called and self.where != named(name) else ""


def _layers(model: nn.Module) -> list[SeededInputDropout]:
    return [layer for layer in model.modules() if isinstance(layer, SeededInputDropout)]
