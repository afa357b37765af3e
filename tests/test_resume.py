"""A fit that is saved goes on, wherever it was ended, with the bits of one that was not."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, TensorDataset

import goodfit as gf

COCKTAIL = "L2(1e-3), L1(1e-4), Dropout(0.3), MaxNorm(3.0), WeightDecay(0.01), EarlyStopping(4)"


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, (x[:, :1] + 0.5 * torch.randn(n, 1, generator=generator, dtype=torch.float64))


TRAIN, VALID = rows(41, 0), rows(20, 1)


class Augmented(Dataset[Any]):
    """Rows with noise from every global generator there is."""

    def __len__(self) -> int:
        return len(TRAIN[1])

    def __getitem__(self, i: int) -> Any:
        noise = torch.randn(4, dtype=torch.float64) + float(np.random.rand()) + random.random()
        return TRAIN[0][i] + 0.1 * noise, TRAIN[1][i]


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))


def seeded() -> None:
    random.seed(5)
    np.random.seed(5)


LOADERS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: TRAIN,
    "dataset": lambda: TensorDataset(TRAIN[0], TRAIN[1][:, 0].unsqueeze(1)),
    "augmented": lambda: DataLoader(Augmented(), batch_size=8, shuffle=True, drop_last=True),
    "generator": lambda: DataLoader(TensorDataset(*TRAIN), 8, shuffle=True, generator=torch.Generator().manual_seed(7)),
}
WORKERS = {"workers": lambda: DataLoader(Augmented(), batch_size=8, shuffle=True, drop_last=True, num_workers=2)}
SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW, cosine": {
        "optimizer": lambda p: AdamW(p, lr=1e-2, weight_decay=0.0),
        "scheduler": lambda o: CosineAnnealingLR(o, 6),
    },
    "SGD, one cycle": {
        "optimizer": lambda p: SGD(p, lr=1e-2, momentum=0.9),
        "scheduler": lambda o: OneCycleLR(o, 0.05, total_steps=40),
        "scheduler_unit": "steps",
        "check_every": 4,
    },
    "plateau": {"scheduler": lambda o: ReduceLROnPlateau(o, patience=0)},
}


class Killed(Exception):
    """What a test ends a training by, in place of the machine."""


def ended(after: int) -> Callable[[Any, Tensor], Tensor]:
    """A loss function that fails at one training step."""
    steps = itertools.count(1)

    def loss(outputs: Any, y: Tensor) -> Tensor:
        if outputs.requires_grad and next(steps) > after:
            raise Killed
        return F.mse_loss(outputs, y)

    return loss


def trained(folder: Any, data: Any, after: int = 10**9, **settings: Any) -> gf.Fit:
    seeded()
    saves = None if folder is None else gf.Checkpoints(folder, every=1)
    given = {"epochs": 6, "batch_size": 8, "cocktail": COCKTAIL} | settings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "train has 41 rows", gf.GoodfitWarning)
        return gf.fit(net(), data, VALID, loss=ended(after), checkpoints=saves, **given)


def told(found: gf.Fit) -> tuple[Any, ...]:
    """All of a fit but its times."""
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in found.history]
    return history, found.stopped, found.score, found.best_epoch, found.reason, found.refit


def same(one: gf.Fit, other: gf.Fit) -> None:
    assert told(one) == told(other)
    for pair in zip((one.model, one.validated), (other.model, other.validated), strict=True):
        here, there = ({} if m is None else m.state_dict() for m in pair)
        assert here.keys() == there.keys()
        assert [name for name, t in here.items() if not torch.equal(t, there[name])] == []


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_training_that_ended_at_any_step_goes_on_with_the_same_bits(
    loader: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = trained(None, LOADERS[loader](), **settings)
    steps = whole.history[-1]["step"]
    for after in [*range(1, 8), steps - 1]:
        with pytest.raises(Killed):
            trained(tmp_path / str(after), LOADERS[loader](), after, **settings)
        found = trained(tmp_path / str(after), LOADERS[loader](), **settings)
        same(found, whole)
        assert found.resumed == after
