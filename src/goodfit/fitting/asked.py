"""What a training was asked for, as text: what goes on with it, and what trains beside it, must be asked for the same."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from goodfit.checkpoints.randomness import Randomness
from goodfit.cocktail import Cocktail
from goodfit.errors import GoodfitError
from goodfit.fitting.data import peek
from goodfit.fitting.feed import digest, generators
from goodfit.processes import gathered, world
from goodfit.regularizers.early_stopping import EarlyStopping

__all__ = ["asked", "compare", "first_targets", "refuse_different"]


def asked(model: nn.Module, cocktail: Cocktail, loss: Any, optimizer: Optimizer) -> dict[str, str]:
    """The kinds of all layers, what acts on the weights, the loss, and the settings that the optimizer was made with."""
    layers = " ".join(type(module).__qualname__ for module in model.modules())
    settings = ", ".join(f"{name}={value}" for name, value in optimizer.defaults.items())
    return {
        "model": hashlib.sha256(layers.encode()).hexdigest(),
        "cocktail": _fixed(", ".join(str(one) for one in cocktail if not isinstance(one, EarlyStopping))),
        "loss": _fixed(getattr(loss, "__name__", None) or repr(loss)),
        "optimizer": _fixed(f"{type(optimizer).__name__}({settings})"),
    }


def first_targets(batches: Any) -> str:
    """What tells the first batch from another, in whatever state its generators are; they are left as they were."""
    own = generators(batches)
    randomness = Randomness(*own)
    before = randomness.state_dict()
    torch.manual_seed(0)
    for one in own:
        one.manual_seed(0)
    try:
        return digest(peek(batches))
    finally:
        randomness.load_state_dict(before)


def compare(saved: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Refuse to go on with a training that was asked for otherwise; what to tell of another cocktail that fits."""
    cure = "ask for the same, or save in another folder"
    for name in ("loss", "optimizer"):
        if saved[name] != now[name]:
            raise GoodfitError(f"The training was saved with the {name} {saved[name]}, and this is {now[name]}; {cure}.")
    if saved["model"] != now["model"]:
        raise GoodfitError(f"The training was saved with a model of other layers, as an activation of another kind; {cure}.")
    if saved["valid"] != now["valid"]:
        raise GoodfitError(
            f"The training was saved with other validation data, whose scores do not compare with those of valid; {cure}."
        )
    if saved["cocktail"] != now["cocktail"]:
        return (
            f"The training was saved with {saved['cocktail'] or 'no cocktail'}, and goes on with {now['cocktail'] or 'none'}."
        )
    return ""


def refuse_different(settings: Mapping[str, Any]) -> None:
    """Refuse processes that train together and were not asked for the same."""
    if world() == 1:
        return
    row = torch.tensor([int(hashlib.sha256(_fixed(repr(v)).encode()).hexdigest()[:15], 16) for v in settings.values()])
    rows = gathered(row)
    odd = [name for name, differs in zip(settings, (rows != rows[0]).any(0).tolist(), strict=True) if differs]
    if odd:
        raise GoodfitError(
            f"The {world()} processes that train together were asked for different trainings, in {', '.join(odd)}; run the "
            "same line in each."
        )


def _fixed(text: str) -> str:
    """Without addresses, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
