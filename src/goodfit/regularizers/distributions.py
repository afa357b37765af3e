"""Draws from distributions, made of uniform ones without a branch on any number: so they lift over members."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from goodfit.noise import Noise

__all__ = ["beta", "blended", "number", "permutation"]

_PROPOSALS = 8


def number(value: float | Tensor) -> Tensor:
    """A number of a regularizer in double precision, on the CPU, where all that is drawn once per batch is drawn.

    So every device mixes the same rows in the same shares, and one without double precision does too.
    """
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


def permutation(rows: int, noise: Noise) -> Tensor:
    """A random order of so many rows."""
    return noise.uniform(rows).argsort(stable=True)


def beta(alpha: float | Tensor, noise: Noise) -> Tensor:
    """One draw from Beta(alpha, alpha), in double precision; 1 where alpha is 0.

    It is G / (G + G') of two Gamma(alpha) variates. Each is a Gamma(alpha + 1) variate d · v times U^(1/alpha), so that the
    method of Marsaglia and Tsang 2000 serves every alpha, and stays a logarithm, since a small alpha takes it below the
    smallest float. They accept a proposal with probability 0.95 or more: of eight the first that is accepted counts, and none
    is once in 10^10 times.
    """
    a = number(alpha).clamp(min=1e-300)
    u = noise.uniform(2, 3 * _PROPOSALS + 1).double()
    first, second, threshold, boost = torch.split(u, [_PROPOSALS, _PROPOSALS, _PROPOSALS, 1], dim=1)
    z = (-2 * torch.log1p(-first)).sqrt() * (2 * math.pi * second).cos()
    d = a + 2 / 3
    v = (1 + z / (9 * d).sqrt()) ** 3
    accepted = (v > 0) & (torch.log1p(-threshold) < z.square() / 2 + d - d * v + d * v.log())
    chosen = v.gather(1, accepted.int().argmax(1, keepdim=True))
    log_gamma = chosen.clamp(min=1e-300).log() + torch.log1p(-boost) / a  # but for log d, which both have
    return torch.where(number(alpha) > 0, (log_gamma[0, 0] - log_gamma[1, 0]).sigmoid(), 1.0)


def blended(own: Tensor, share: Tensor, order: Tensor) -> Tensor:
    """share · row + (1 − share) · the row that `order` puts in its place; in float32 at least, so that x and y agree."""
    wide = torch.promote_types(own.dtype, torch.float32)
    share = share.to(wide).to(own.device)
    other = own[order.to(own.device)].to(wide)
    return (share * own.to(wide) + (1 - share) * other).to(own.dtype)
