"""What the root of a model remembers of its building: whose rate each layer has, and by which share."""

from __future__ import annotations

from torch import nn

__all__ = ["records", "remember", "remember_copy"]


def records(model: nn.Module) -> dict[str, dict[str, float]]:
    """By regularizer, and by the name of the layer: its share of the regularizer's rate. A copied model takes it along."""
    found: dict[str, dict[str, float]] = model.__dict__.setdefault("goodfit_rates", {})
    return found


def remember(model: nn.Module, key: str, shares: dict[str, float]) -> None:
    """Let a regularizer move these rates from now on, and no other."""
    left = {k: {name: share for name, share in names.items() if name not in shares} for k, names in records(model).items()}
    model.__dict__["goodfit_rates"] = left | {key: shares}  # a new dict, so that a snapshot keeps the old one


def remember_copy(model: nn.Module, name: str, twin: str) -> None:
    """Let the rates in a copied module move with those in the one that it is a copy of."""
    for key, shares in records(model).items():
        inside = {n: share for n, share in shares.items() if f"{n}.".startswith(f"{name}.")}
        if inside:
            remember(model, key, shares | {twin + n.removeprefix(name): share for n, share in inside.items()})
