"""AdamW for members with a learning rate each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["AdamW"]


class AdamW(Optimizer):
    """torch's AdamW without decay, on tensors of K members along the first axis, with `lr` a tensor of shape (K,)."""

    def __init__(
        self, params: Iterable[Tensor], lr: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["step"] += 1
                t = float(state["step"])
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(p.grad, 1 - first)
                square.mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                size = square.sqrt().div_((1 - second**t) ** 0.5).add_(group["eps"])
                lr = (group["lr"] / (1 - first**t)).to(p).view(-1, *(1 for _ in p.shape[1:]))
                p.sub_(torch.div(mean, size, out=size).mul_(lr))
