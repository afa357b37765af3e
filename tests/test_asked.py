"""A saved training goes on only with what it was asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import goodfit as gf

MIX = "L2(1e-3), EarlyStopping(9)"


def rows(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, x[:, :1].sin()


TRAIN, VALID = rows(0), rows(1)


def net(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), activation(), nn.Linear(8, 1)).double()


class Ended(Exception):
    pass


def ends(step: int) -> Callable[[Any, Tensor], Tensor]:
    """A loss that ends its training."""
    left = iter(range(step))

    def mse_loss(outputs: Any, y: Tensor) -> Tensor:
        if outputs.requires_grad and next(left, None) is None:
            raise Ended
        return F.mse_loss(outputs, y)

    return mse_loss


def train(folder: Path, model: nn.Module | None = None, valid: Any = VALID, mix: str = MIX, **settings: Any) -> gf.Fit:
    given: dict[str, Any] = {"epochs": 6, "batch_size": 8, "loss": F.mse_loss, "optimizer": lambda p: SGD(p, lr=1e-2)}
    saves = gf.Checkpoints(folder, every=1)
    return gf.fit(model or net(), TRAIN, valid, mix, checkpoints=saves, progress=False, **(given | settings))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Where a training was ended in the middle of its fourth epoch, of five steps each."""
    with pytest.raises(Ended):
        train(tmp_path, loss=ends(17))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": F.l1_loss}, "saved with the loss mse_loss, and this is l1_loss"),
        ({"optimizer": lambda p: SGD(p, lr=1e-1)}, r"saved with the optimizer SGD\(lr=0.01, .*, and this is SGD\(lr=0.1, "),
        ({"model": net(nn.Tanh)}, "saved with a model of other layers"),
        ({"valid": (VALID[0], 100 * VALID[1])}, "saved with other validation data"),
        ({"epochs": 3}, "saved in epoch 4, beyond epochs=3; ask for as many"),
    ],
)
def test_what_was_asked_otherwise_is_refused_and_nothing_is_lost(saved: Path, change: dict[str, Any], message: str) -> None:
    there = sorted(path.name for path in saved.iterdir())
    with pytest.raises(gf.GoodfitError, match=message):
        train(saved, **change)
    assert sorted(path.name for path in saved.iterdir()) == there
    assert train(saved).resumed == 17


def test_another_cocktail_goes_on_and_is_told(saved: Path) -> None:
    text = "The training was saved with L2(0.001), and goes on with L2(0.1)."
    with pytest.warns(gf.GoodfitWarning, match=re.escape(text)):
        found = train(saved, mix="L2(1e-1), EarlyStopping(9)")
    assert found.resumed == 17


def test_more_epochs_go_on(saved: Path) -> None:
    assert len(train(saved, epochs=9).history) == 9


def test_a_shuffled_validation_is_known_again_wherever_its_generator_is(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(*VALID), 8, shuffle=True, generator=torch.Generator().manual_seed(2))
    whole = train(tmp_path / "whole", valid=loader)
    loader.generator.manual_seed(2)
    with pytest.raises(Ended):
        train(tmp_path / "saved", valid=loader, loss=ends(17))
    again = train(tmp_path / "saved", valid=loader)
    assert [row["valid_loss"] for row in again.history] == [row["valid_loss"] for row in whole.history]


def test_a_look_at_the_validation_moves_no_generator(tmp_path: Path) -> None:
    """What is saved is trained to the bits of what is not."""
    loader = DataLoader(TensorDataset(*VALID), 8, shuffle=True)
    drop = nn.Sequential(net(), nn.Dropout(0.3))
    start = {name: value.clone() for name, value in drop.state_dict().items()}
    one = train(tmp_path, drop, valid=loader)
    drop.load_state_dict(start)
    other = gf.fit(
        drop, TRAIN, loader, MIX, loss=F.mse_loss, optimizer=lambda p: SGD(p, lr=1e-2), epochs=6, batch_size=8, progress=False
    )
    assert [row["valid_loss"] for row in one.history] == [row["valid_loss"] for row in other.history]
