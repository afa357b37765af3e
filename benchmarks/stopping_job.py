"""What is asked of an early stopping, what came of it, and the model that shows whose weights are left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from stopping_spec import Rule
from torch import Tensor, nn

Scores = Sequence[float | None]


class NoOption(Exception):
    """This package cannot be asked for that."""


@dataclass(frozen=True)
class Job:
    """What is asked of a package: a rule, and how it is used.

    keep: whether the best weights shall come back. also: patience of a second early stopping on the same score. least: a
    least number of checks. resume: after so many checks save, load into fresh objects, and go on, with the patience `then`
    unless that is 0. told: whether the direction is said; else it is left to the package, which hears the name of the score.
    """

    rule: Rule
    keep: bool = False
    also: int = 0
    least: int = 0
    resume: int = 0
    then: int = 0
    told: bool = True
    name: str = "loss"

    @property
    def patiences(self) -> tuple[int, ...]:
        return (self.rule.patience, *([self.also] if self.also else []))

    @property
    def resumed(self) -> Job:
        """What is asked for after the resumption."""
        return replace(self, rule=replace(self.rule, patience=self.then or self.rule.patience))


@dataclass(frozen=True)
class Outcome:
    """stop: index of the check after which training ended, None: it ran on. kept: index of the check of the weights left."""

    stop: int | None
    best: float | None = None
    kept: int | None = None


def needs_no(job: Job, *options: str, policies: tuple[str, ...] = ("bad",)) -> None:
    """Refuse what the package has no setting for: options, and policies for scores that are not finite."""
    for option in options:
        if getattr(job if hasattr(job, option) else job.rule, option):
            raise NoOption(option)
    if job.rule.nonfinite not in policies:
        raise NoOption(job.rule.nonfinite)


class Marked(nn.Module):
    """A weight and a buffer, which both are the index of the check."""

    at: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.float32))
        self.register_buffer("at", torch.zeros(1, dtype=torch.float32))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = x @ self.weight
        return out if labels is None else {"loss": out.sum() * 0.0, "out": out}

    def mark(self, index: int) -> None:
        with torch.no_grad():
            self.weight.fill_(index)
            self.at.fill_(index)

    @property
    def marked(self) -> int | None:
        """The index, None where weight and buffer are of different checks."""
        return int(self.at) if float(self.weight) == float(self.at) else None


def number(best: Any, rule: Rule) -> float | None:
    """What a package calls its best; the infinity at the bad end is its word for none."""
    return None if best is None or best == (math.inf if rule.mode == "min" else -math.inf) else float(best)


def parts(scores: Scores, job: Job) -> Iterator[tuple[int, Scores, Job]]:
    """What is heard in one go: its first index, the scores, and what is asked for."""
    if not job.resume:
        yield 0, scores, job
        return
    yield 0, scores[: job.resume], job
    yield job.resume, scores[job.resume :], job.resumed
