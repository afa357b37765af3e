"""Whether outputs differ by rounding alone: told by a copy of the model in float64.

A deep network in float32 can lose more than 1e-5 of its largest output by itself, and then so can any two ways to compute it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from goodfit.folding.chains import Pair
from goodfit.folding.weights import fold_into
from goodfit.surgery.proof import answers, largest_error, mapped

__all__ = ["MOST", "in_double", "rounding_alone"]

MOST = 1e-3  # beyond that outputs are others, whatever the cause


def rounding_alone(folded: nn.Module, precise: nn.Module, pairs: list[Pair], truth: list[tuple[Any, list[Tensor]]]) -> bool:
    """Whether the fold is exact in float64, and the folded model at most twice as far from that as the model was.

    `precise` is the model before the fold in float64 with its pairs, `truth` what the model said before on each test.
    """
    try:
        tests = [mapped(test, lambda t: t.double() if t.is_floating_point() else t) for test, _ in truth]
        exact = [answers(precise, test) for test in tests]
        own = max(largest_error(e, known)[1] for e, (_, known) in zip(exact, truth, strict=True))
        now = max(largest_error(e, answers(folded, test))[1] for e, (test, _) in zip(exact, truth, strict=True))
        fold_into(precise, pairs)
        error = max(largest_error(e, answers(precise, test))[0] for e, test in zip(exact, tests, strict=True))
    except Exception:
        return False
    return error <= 1 and now <= 2 * own < float("inf")


def in_double(model: nn.Module, pairs: list[Pair]) -> tuple[nn.Module, list[Pair]]:
    """A copy of the model in float64, and the same pairs there."""
    precise, names = copy.deepcopy(model).double(), {module: name for name, module in model.named_modules()}
    twins = []
    for pair in pairs:
        norm, layer = (precise.get_submodule(names[module]) for module in (pair.norm, pair.layer))
        plain = isinstance(pair.rest, nn.Identity)
        rest = nn.Identity() if plain else nn.Sequential(OrderedDict(norm.named_children()))
        twins.append(replace(pair, norm=norm, layer=layer, rest=rest))
    return precise, twins
