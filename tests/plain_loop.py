"""The plain loop that every host must equal: data, model, cocktail, and the epochs until early stopping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import goodfit as gf

DRAW = torch.Generator().manual_seed(5)
X, Y = torch.randn(32, 3, generator=DRAW), torch.randn(32, 1, generator=DRAW)
VALID_X, VALID_Y = torch.randn(32, 3, generator=DRAW), torch.randn(32, 1, generator=DRAW)
STOPPING = gf.EarlyStopping(3)
COCKTAIL = gf.Cocktail(gf.L2(0.01), gf.L1(1e-3), gf.WeightDecay(0.05), gf.Dropout(0.3), gf.BatchNorm(), STOPPING)
EPOCHS = 12
BEST, STOP = 5, 8
"""The epochs that COCKTAIL keeps, and stops at, in the plain loop."""


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))


def adam(model: nn.Module) -> optim.Optimizer:
    return optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)


def training() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=8)


def validation() -> DataLoader[Any]:
    return DataLoader(TensorDataset(VALID_X, VALID_Y), batch_size=32)


@torch.no_grad()
def validated(model: nn.Module) -> float:
    model.eval()
    return F.mse_loss(model(VALID_X), VALID_Y).item()


def plain_loop(
    cocktail: Any,
    *,
    epochs: int = EPOCHS,
    every: int = 1,
    score: Callable[[nn.Module], float] = validated,
    parts: int = 1,
    by_run: bool = False,
) -> tuple[nn.Module, gf.Run, list[float]]:
    """The model, its run, and the score of each check; validated every `every` epochs, `parts` batches in a step."""
    model = net()
    run = gf.Run(cocktail, model, example=X[:8], loss=F.mse_loss, seed=4)
    optimizer = adam(model)
    run.attach(optimizer)
    scores = []
    for epoch in range(1, epochs + 1):
        model.train()
        for i, (x, y) in enumerate(training()):
            loss = run.loss(*run.batch(x, y)) if by_run else F.mse_loss(model(x), y)
            (loss / parts).backward()
            if (i + 1) % parts == 0:
                optimizer.step()
                optimizer.zero_grad()
        if epoch % every == 0:
            scores.append(score(model))
            if not run.epoch(scores[-1]):
                break
    return run.finish(), run, scores


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Equal bits, by name."""
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert torch.equal(value, other[name]), name


def differ(a: nn.Module, b: nn.Module) -> bool:
    weights = dict(b.named_parameters())
    return any(not torch.equal(p, weights[n]) for n, p in a.named_parameters() if n in weights)


def with_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}
