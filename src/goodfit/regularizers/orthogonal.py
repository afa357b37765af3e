"""Weights whose rows stand at right angles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from goodfit.errors import GoodfitError
from goodfit.hyper import hyper, lifted
from goodfit.phases import Penalty, State, Weights
from goodfit.where import Where, kernels

__all__ = ["Orthogonal"]


@dataclass(frozen=True)
class Orthogonal(Penalty):
    """Soft orthogonality: the rows of each kernel, or its columns where it has more rows, come to be orthonormal.

    Formula: J(w) = loss + lam · Σ ‖G − I‖², with G = W Wᵀ or Wᵀ W, whichever is smaller, and W the kernel as a matrix
        (out, in · height · width); the gradient gains 4 lam (W Wᵀ − I) W, or 4 lam W (Wᵀ W − I).
    Phase: Penalty; weights of two axes or more → scalar; those of one axis are left out.
    Numbers: lam, per unit of loss, >= 0, off at 0.
    Errors: lam < 0; a selector that matches no weight, or none of two axes.
    Source: Bansal, Chen and Wang 2018, Can we gain more from orthogonality regularizations in training deep CNNs?, arXiv
        1810.09102, the SO regularizer of the smaller of the two products, since the larger cannot be the identity; Brock et al.
        2017, arXiv 1609.07093. L2 beside it pulls the other way, since rows of length 1 are wanted: leave it out.

    >>> Orthogonal(0.5).penalty({"w": torch.tensor([[2.0, 0.0], [0.0, 1.0]])}, {})  # 0.5 · (2² − 1)²
    tensor(4.5000)
    """

    lam: float = hyper(1e-3, valid="[0, inf)", off=0.0, low=1e-6, high=1e-1, log=True)
    where: Where = kernels

    def on(self, model: nn.Module) -> Any:
        weights = dict(model.named_parameters())
        if all(weights[n].ndim < 2 for n in self.where.select(model)):
            raise GoodfitError(f"Orthogonal needs weights of two axes or more, and where={self.where} picks none.")
        turned = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, _ConvTransposeNd)]
        return lifted(self, turned=frozenset(turned))

    def penalty(self, weights: Weights, state: State) -> Tensor:
        each = [_excess(self._matrix(n, w)).square().sum() for n, w in weights.items() if w.ndim > 1]
        return self.lam * torch.stack(each).sum()

    def slope(self, weights: Weights, state: State) -> dict[str, Tensor]:
        return {n: self._slope(n, w) if w.ndim > 1 else w * 0 for n, w in weights.items()}

    def _slope(self, name: str, w: Tensor) -> Tensor:
        pulled = 4 * self.lam * _pulled(self._matrix(name, w))
        turned = w.transpose(0, 1).shape if name in self._turned else w.shape
        return pulled.view(turned).transpose(0, 1) if name in self._turned else pulled.view(turned)

    def _matrix(self, name: str, w: Tensor) -> Tensor:
        """(out, in · height · width), also of a transposed convolution, whose first axis is in."""
        return (w.transpose(0, 1) if name in self._turned else w).flatten(1)

    @property
    def _turned(self) -> frozenset[str]:
        return getattr(self, "turned", frozenset())


def _excess(matrix: Tensor) -> Tensor:
    """How far the smaller product of a matrix with itself is from the identity."""
    wide = matrix.shape[0] <= matrix.shape[1]
    product = matrix @ matrix.T if wide else matrix.T @ matrix
    return product - torch.eye(len(product), dtype=matrix.dtype, device=matrix.device)


def _pulled(matrix: Tensor) -> Tensor:
    excess = _excess(matrix)
    return excess @ matrix if len(excess) == len(matrix) else matrix @ excess
