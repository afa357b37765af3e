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
X, XV = (torch.randn(rows, 3, generator=DRAW).float() for rows in (32, 16))
Y, YV = (torch.randn(rows, 1, generator=DRAW).float() for rows in (32, 16))
COCKTAIL = "L2(0.01), L1(1e-3), WeightDecay(0.05), Dropout(0.3), BatchNorm(), EarlyStopping(3)"
SEED = 4


def net() -> nn.Module:
    """A new model with the weights that all start from."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)).float()


def loader(x: Tensor = X, y: Tensor = Y, size: int = 8) -> Any:
    """Batches in order: no host keeps torch's generator where it resumes."""
    return DataLoader(TensorDataset(x, y), batch_size=size)


def valid_loss(model: nn.Module) -> float:
    """As hosts do: the mean over the rows of all batches."""
    model.eval()
    with torch.no_grad():
        return float(torch.stack([F.mse_loss(model(x), y) for x, y in loader(XV, YV)]).mean())


def adam(parameters: Any) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=0.02, weight_decay=0.0)


def plain(
    cocktail: Any = COCKTAIL,
    *,
    epochs: int = 30,
    through_run: bool = False,
    score: Callable[[nn.Module], float] = valid_loss,
    make: Callable[[Any], optim.Optimizer] = adam,
    every: int = 1,
    size: int = 8,
) -> tuple[nn.Module, gf.Run, int]:
    """Train and restore: the model, its run, and how many epochs it took. `every` batches go into one step."""
    model = net()
    run = gf.Run(cocktail, model, example=X[:8], loss=F.mse_loss, seed=SEED)
    optimizer = make(model.parameters())
    run.attach(optimizer)
    done = 0
    while done < epochs:
        done += 1
        model.train()
        for i, (x, y) in enumerate(loader(size=size)):
            x, y = run.batch(x, y) if through_run else (x, y)
            loss = run.loss(x, y) if through_run else F.mse_loss(model(x), y)
            (loss / every).backward()
            if (i + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()
        if not run.epoch(score(model)):
            break
    return run.finish(), run, done


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    """Equal bits in all weights and buffers."""
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
