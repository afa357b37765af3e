"""The loop without a host that every host must equal: data, a model, and training with a run by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import goodfit as gf

DRAW = torch.Generator().manual_seed(5)
X, Y, XV, YV = (torch.randn(32, columns, generator=DRAW, dtype=torch.float32) for columns in (3, 1, 3, 1))
REST = (gf.L2(0.01), gf.L1(1e-3), gf.WeightDecay(0.05), gf.Dropout(0.3), gf.BatchNorm())
SEED = 54
EPOCHS = 12
BEST, STOP = 5, 8
"""The epochs that COCKTAIL keeps, and stops at."""


def patience(checks: int) -> gf.Cocktail:
    """All kinds that a host serves by itself, and that much patience."""
    return gf.Cocktail(*REST, gf.EarlyStopping(checks))


COCKTAIL = patience(3)
AVERAGED = gf.Cocktail(*REST, gf.EMA(0.8, warmup=False), gf.EarlyStopping(3))


def net() -> nn.Module:
    """A new model with the weights that all start from."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))


def adam(parameters: Any) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=0.02, weight_decay=0.0)


def loader(x: Tensor = X, y: Tensor = Y, size: int = 8) -> Any:
    """Batches in order: no host keeps torch's generator where it resumes."""
    return DataLoader(TensorDataset(x, y), batch_size=size)


def validation(size: int = 16) -> Any:
    """Two batches, unless said otherwise."""
    return loader(XV, YV, size)


@torch.no_grad()
def valid_loss(model: nn.Module, size: int = 16) -> float:
    """As hosts do: the mean over the rows of all batches."""
    model.eval()
    return torch.stack([F.mse_loss(model(x), y) for x, y in validation(size)]).mean().item()


def whole_loss(model: nn.Module) -> float:
    """In one batch, for hosts that take the mean of several in double precision."""
    return valid_loss(model, len(XV))


def plain(
    cocktail: Any = COCKTAIL,
    *,
    epochs: int = EPOCHS,
    by_run: bool = False,
    score: Callable[[nn.Module], float] = valid_loss,
    every: int = 1,
    parts: int = 1,
    size: int = 8,
) -> tuple[nn.Module, gf.Run, list[float]]:
    """Train and restore: the model, its run, the score of each check. Validated each `every` epochs, `parts` batches a step."""
    model = net()
    run = gf.Run(cocktail, model, example=X[:8], loss=F.mse_loss, seed=SEED)
    optimizer = adam(model.parameters())
    run.attach(optimizer)
    scores = []
    for epoch in range(1, epochs + 1):
        model.train()
        for i, (x, y) in enumerate(loader(size=size)):
            loss = run.loss(*run.batch(x, y)) if by_run else F.mse_loss(model(x), y)
            (loss / parts).backward()
            if (i + 1) % parts == 0:
                optimizer.step()
                optimizer.zero_grad()
        if epoch % every == 0:
            with run.view(loader(size=size)):
                scores.append(score(model))
                go_on = run.epoch(scores[-1])
            if not go_on:
                break
    return run.finish(loader(size=size)), run, scores


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    """Equal bits in all weights and buffers."""
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
