"""The parametrization of a weight by its spectral norm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.parametrizations import _SpectralNorm

__all__ = ["SpectralNormed"]


class SpectralNormed(_SpectralNorm):
    """torch's spectral norm, number for number, that also runs under vmap: it copies where torch writes by `out=`."""

    @torch.no_grad()
    def _power_method(self, weight_mat: Tensor, n_power_iterations: int) -> None:
        for _ in range(n_power_iterations):
            self._u.copy_(F.normalize(torch.mv(weight_mat, self._v), dim=0, eps=self.eps))
            self._v.copy_(F.normalize(torch.mv(weight_mat.H, self._u), dim=0, eps=self.eps))
