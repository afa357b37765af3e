"""What was asked of a fit on a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from goodfit.defaults import COCKTAIL

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """How to read the table and how to train.

    reading: what `read` takes. command: what the user typed. logs: files and folders for the rows of the regularized network.
    threads: of torch; one is quick for networks of this size, and two busy processes of two threads each ruin each other.
    """

    cocktail: str = COCKTAIL
    task: str | None = None
    epochs: int = 200
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    reading: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    progress: bool | None = None
    check_every: int | None = None
    refit: str | None = None
    logs: list[str] = field(default_factory=list)
