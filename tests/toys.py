"""A penalty that leaves its slope to autograd, as a user's own may."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from goodfit.hyper import hyper
from goodfit.phases import Penalty


@dataclass(frozen=True)
class Quartic(Penalty):
    """A penalty that leaves its slope to autograd.

    Formula: lam/4 · Σ w⁴. Phase: Penalty. Numbers: lam >= 0, off at 0. Errors: none. Source: this test.

    >>> Quartic(1.0).slope({"w": torch.tensor([2.0])}, {})["w"]
    tensor([8.])
    """

    lam: float = hyper(0.1, valid="[0, inf)", off=0.0, low=1e-3, high=1.0, log=True)

    def penalty(self, weights: Any, state: Any) -> Tensor:
        return self.lam / 4 * torch.stack([w.pow(4).sum() for w in weights.values()]).sum()
