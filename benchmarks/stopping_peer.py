"""What a benchmark of early stopping asks of a system, and how it fills one cell of its table."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar, Self

from stopping_rules import CUT, Asked, Situation
from torch import nn

__all__ = ["NotOffered", "Peer", "Torchs", "ages", "cell"]


class NotOffered(Exception):
    """The system has no such setting."""


def ages(weight: float, buffer: float) -> str:
    """The check at which both were as they are, or of each its own."""
    return f"{weight:g}" if weight == buffer else f"{weight:g}/{buffer:g}"


class Torchs:
    """A model with weights and buffers."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))

    def fill(self, number: int) -> None:
        for tensor in self.model.state_dict().values():
            tensor.fill_(number)

    def ages(self) -> str:
        state = self.model.state_dict()
        return ages(state["0.weight"].item(), state["1.running_mean"].item())


class Peer(ABC):
    """One early stopping of a system, and what it hears."""

    package: ClassVar[str]
    offers: ClassVar[frozenset[str]] = frozenset()
    host: Torchs | None = None
    own: Any = None
    """The system's own object, where it saves its state."""

    def __init__(self, asked: Asked, heard: int = 0) -> None:
        for name in ("relative", "warmup", "restore"):
            if getattr(asked, name) and name not in self.offers:
                raise NotOffered(name)
        self.asked, self.heard = asked, heard
        self.start()

    @abstractmethod
    def start(self) -> None:
        """Make the system's own object."""

    @abstractmethod
    def check(self, score: float) -> bool:
        """Whether it stops at this score."""

    def resumed(self, asked: Asked) -> Self:
        """Another in its place, which goes on as the system resumes; one without a state to save starts again."""
        new = type(self)(asked, self.heard)
        if self.own is not None:
            new.own.load_state_dict(self.own.state_dict())
        return new

    def train(self, scores: Sequence[float]) -> int | None:
        """Index of the check that stops, over all checks heard."""
        for score in scores:
            self.fill(self.heard)
            self.heard += 1
            if self.check(score):
                return self.heard - 1
        return None

    def fill(self, number: int) -> None:
        """Let the model tell how old it is."""
        if self.host is not None:
            self.host.fill(number)

    def kept(self) -> str:
        """The age of weights and of buffers when training has ended."""
        assert self.host is not None
        return self.host.ages()

    @classmethod
    def pair(cls, one: Asked, other: Asked, scores: Sequence[float]) -> int | None:
        """Two on one score, saved and resumed: the check at which the first of them stops."""
        pair = [cls(one), cls(other)]
        assert [peer.train(scores[:CUT]) for peer in pair] == [None, None]
        stops = [peer.resumed(peer.asked).train(scores[CUT:]) for peer in pair]
        return min((stop for stop in stops if stop is not None), default=None)


def cell(kind: type[Peer], situation: Situation) -> str:
    """What the system does: index of the check that stops, never, error; or the checks of what it kept; or that it cannot."""
    try:
        import_module(kind.package)
    except ImportError:
        return "not installed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _answer(kind, situation)
        except NotOffered:
            return "no"
        except (ValueError, RuntimeError):
            return "error"


def _answer(kind: type[Peer], situation: Situation) -> str:
    if situation.beside is not None:
        stop = kind.pair(situation.asked, situation.beside, situation.scores)
    elif situation.resumed is not None:
        peer = kind(situation.asked)
        assert peer.train(situation.scores[:CUT]) is None
        stop = peer.resumed(situation.resumed).train(situation.scores[CUT:])
    else:
        peer = kind(situation.asked)
        stop = peer.train(situation.scores)
        if situation.asked.restore:
            return peer.kept()
    return "never" if stop is None else str(stop)
