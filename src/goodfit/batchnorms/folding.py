"""Fold pairs into the weights of their layers, as far as a proof holds, and take it back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.axes import oriented
from goodfit.batchnorms.chains import Pair
from goodfit.surgery.insert import take_out
from goodfit.surgery.proof import Proof
from goodfit.surgery.snapshot import Snapshot

__all__ = ["Folding"]


class Folding:
    """The folds of one model. All are computed in float64 from the weights at the start, and rounded once."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example, self.start = model, example, Snapshot(model)
        self.proof: Proof | None = None  # made when there is something to prove
        self.weights: dict[nn.Parameter, Tensor] = {}  # as they were, of those that were written
        self.folded: list[Pair] = []
        self.spoiled: dict[nn.Module, str] = {}
        self.error, self.trials = 0.0, 0

    def restore(self) -> None:
        """Put everything back, bit by bit."""
        self.start.restore()
        for parameter, before in self.weights.items():
            _write(parameter, before)

    def apply(self, pairs: Iterable[Pair]) -> None:
        """Fold these, into the model as it was at the start."""
        self.restore()
        pairs = list(pairs)
        values: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for pair in pairs:
            values[pair.layer.module] = _folded(pair, *values.get(pair.layer.module, _numbers(pair.layer.module)))
        for layer, (weight, bias) in values.items():
            self._put(layer, weight, bias)
        for pair in pairs:
            pair.rest.training = pair.norm.training
            for parent in list(self.model.modules()):
                for name in [n for n, child in parent._modules.items() if child is pair.norm]:
                    if not take_out(parent, name):
                        parent._modules[name] = pair.rest

    def grow(self, pairs: list[Pair]) -> None:
        """Fold those of the pairs that the proof accepts, beside what is folded already: all, or by halves."""
        self.trials += 1
        self.proof = self.proof or Proof(self.model, self.example)
        try:
            self.apply([*self.folded, *pairs])
            over, error = self.proof.gap()
        except Exception:
            over = error = float("inf")
        if over <= 1:
            self.folded, self.error = [*self.folded, *pairs], error
            return
        self.apply(self.folded)
        if len(pairs) == 1 or self.trials > 64:
            shown = f"outputs would differ by {error:.1e} of the largest" if error < float("inf") else "outputs would be others"
            self.spoiled |= {pair.norm: f"fails the proof: {shown}" for pair in pairs}
            return
        half = len(pairs) // 2
        self.grow(pairs[:half])
        self.grow(pairs[half:])

    def _put(self, layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
        own: dict[str, nn.Parameter | None] = layer._parameters
        for name, value in (("weight", weight), ("bias", bias)):
            old, template = own[name], own["weight"]
            if old is not None:
                self.weights.setdefault(old, old.detach().clone())
                _write(old, value)
            elif bool(value.any()) and template is not None:
                with torch.inference_mode(False):  # else it could not be trained
                    made = value.to(template.device, template.dtype, copy=True)
                    layer.register_parameter(name, nn.Parameter(made, requires_grad=template.requires_grad))


def _write(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        parameter.copy_(value)


def _numbers(layer: Any) -> tuple[Tensor, Tensor]:
    weight, bias = layer.weight.detach().double().cpu(), layer.bias
    return weight, torch.zeros(0, dtype=torch.float64) if bias is None else bias.detach().double().cpu()


def _folded(pair: Pair, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and bias of a layer with scale and shift of its rows or columns."""
    weight = weight.clone(memory_format=torch.contiguous_format)
    view = oriented(weight, pair.layer.groups, pair.layer.transposed)
    groups, rows, columns = view.shape[:3]
    tail = [1] * (view.ndim - 3)
    bias = bias if bias.numel() else torch.zeros(groups * rows, dtype=torch.float64)
    if pair.before:
        view *= pair.scale.view(groups, rows, 1, *tail)
        return weight, bias * pair.scale + pair.shift
    gain = view.flatten(3).sum(3) if tail else view
    bias = bias + (gain * pair.shift.view(groups, 1, columns)).sum(2).flatten()
    view *= pair.scale.view(groups, 1, columns, *tail)
    return weight, bias
