"""Models with zeros in them, and what shrinking must keep."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import goodfit as gf
from goodfit.surgery.proof import answers, largest_error
from goodfit.surgery.running import call_model


def zero(layer: Any, *rows: int, axis: int = 0, bias: float = 0.0) -> Any:
    """The layer with rows of zeros, and this bias there."""
    layer.weight.detach().index_fill_(axis, torch.tensor(rows, dtype=torch.long), 0.0)
    if layer.bias is not None:
        layer.bias.detach()[list(rows)] = bias
    return layer


def shrunk(model: nn.Module, example: Any, fresh: Any = None) -> Any:
    """The result; the outputs are those of before on the example and on a batch that it has not seen."""
    before = copy.deepcopy(model)
    result = gf.shrink(model, example)
    assert result.model is model
    assert result.error <= 1e-10
    for x in (example, fresh if fresh is not None else example):
        over, _ = largest_error(answers(before, x), answers(model, x))
        assert over <= 1
    call_model(model.train(), example)  # and it still trains
    assert result.parameters == (sum(p.numel() for p in before.parameters()), sum(p.numel() for p in model.parameters()))
    return result


def removed(result: Any) -> dict[tuple[str, str], int]:
    return {(layer, what): count for layer, what, count, _ in result.removed}


ROWS, IMAGES = torch.randn(5, 4, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
