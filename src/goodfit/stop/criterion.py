"""A criterion: when enough is enough. Criteria are values, joined by `&` and `|`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from goodfit.errors import GoodfitError
from goodfit.hyper import lifted, validate
from goodfit.phases import Report, State
from goodfit.tensors import below, under

__all__ = ["AllOf", "AnyOf", "Criterion", "Reason", "refuse_missing"]


class Reason(Enum):
    """Why a training was stopped."""

    PATIENCE = "no improvement"
    GENERALIZATION_LOSS = "generalization loss"
    PROGRESS = "generalization loss beside training progress"
    RISE = "rising scores"
    TARGET = "target reached"
    DIVERGENCE = "divergence"
    BUDGET = "no time left"
    EVIDENCE = "gradients that are noise"
    NONFINITE = "a score that is not finite"
    INTERRUPTED = "Ctrl-C"
    FAILED = "an error"
    OTHER = "another criterion"


INPUTS = {
    "train_loss": "the training loss",
    "stderr": "the standard error of the score",
    "evidence": "the evidence of the gradients, gf.stop.evidence",
    "step": "the optimizer step",
    "seconds": "the seconds of training",
}


@dataclass(frozen=True, repr=False)
class Criterion(ABC):
    """A state machine over reports: it says stop or not at each check, and remembers tensors.

    Scores that it hears are lower for better, whatever the user's sign is. It decides without branching on tensors, so that
    it can be lifted over many members at once.
    """

    kind: ClassVar[Reason] = Reason.OTHER
    scored: ClassVar[bool] = True
    """Whether it judges scores: then a check whose score does not count is one that it has not heard."""

    def __post_init__(self) -> None:
        validate(self)

    @property
    def needs(self) -> tuple[str, ...]:
        """What a report must tell beside the score."""
        return ()

    def init(self) -> State:
        """The state before the first check."""
        return {}

    @abstractmethod
    def check(self, report: Report, state: State) -> tuple[Tensor, State]:
        """Whether to stop, a boolean tensor, and the new state."""

    @abstractmethod
    def reason(self, state: State, sign: float = 1.0, unit: str = "checks") -> str:
        """Why it asked to stop, with its numbers; sign: −1 where the user's scores are higher for better."""

    def why(self, state: State) -> Reason:
        """The same in one word."""
        return self.kind

    def hear(self, report: Report, state: State, counts: Tensor) -> tuple[Tensor, State]:
        """Check, or leave the state as it is where the score does not count."""
        stop, new = self.check(report, state)
        return (stop & counts, kept(counts, new, state)) if self.scored else (stop, new)

    def mirrored(self) -> Criterion:
        """The same criterion for scores that were negated, since the user's are higher for better."""
        return self

    def leaves(self) -> Iterator[Criterion]:
        """The criteria that it is made of."""
        yield self

    def patience_left(self, state: State) -> float | None:
        """How much longer it goes on without an improvement, None where it does not count that."""
        return None

    def __and__(self, other: Criterion) -> Criterion:
        return AllOf.of(self, other) if isinstance(other, Criterion) else NotImplemented

    def __or__(self, other: Criterion) -> Criterion:
        return AnyOf.of(self, other) if isinstance(other, Criterion) else NotImplemented

    def __repr__(self) -> str:
        shown = [(i, f.name, getattr(self, f.name), f.default) for i, f in enumerate(fields(self))]
        told = [(i, name, value) for i, name, value, usual in shown if i == 0 or usual is MISSING or value != usual]
        return f"{type(self).__name__}({', '.join(repr(v) if i == 0 else f'{name}={v!r}' for i, name, v in told)})"


@dataclass(frozen=True, repr=False)
class _Joined(Criterion):
    """Criteria asked side by side; each has heard every check."""

    criteria: tuple[Criterion, ...]
    operator: ClassVar[str]
    word: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.criteria) is not tuple or not self.criteria or not all(isinstance(c, Criterion) for c in self.criteria):
            raise GoodfitError(
                f"{type(self).__name__} joins criteria, as in Patience(10){self.operator}GL(5), got {self.criteria!r}."
            )

    @abstractmethod
    def decide(self, asked: Tensor) -> Tensor:
        """Whether to stop, where these asked to."""

    @abstractmethod
    def left(self, each: list[float]) -> float:
        """The patience that is left, where each has so much."""

    @classmethod
    def of(cls, *criteria: Criterion) -> Criterion:
        """Joined, with those of the same kind in one row."""
        return cls(tuple(one for c in criteria for one in (c.criteria if isinstance(c, cls) else (c,))))

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for one in self.criteria for name in one.needs))

    def init(self) -> State:
        state = {"asked": torch.zeros(len(self.criteria), dtype=torch.bool)}
        for i, one in enumerate(self.criteria):
            state |= under(f"{i}.", one.init())
        return state

    def check(self, report: Report, state: State) -> tuple[Tensor, State]:
        return self.hear(report, state, torch.tensor(True))

    def hear(self, report: Report, state: State, counts: Tensor) -> tuple[Tensor, State]:
        asked: list[Tensor] = []
        new: State = {}
        for i, one in enumerate(self.criteria):
            stop, inner = one.hear(report, below(f"{i}.", state), counts)
            asked.append(stop)
            new |= under(f"{i}.", inner)
        new["asked"] = torch.stack(asked)
        return self.decide(new["asked"]), new

    def reason(self, state: State, sign: float = 1.0, unit: str = "checks") -> str:
        return self.word.join(one.reason(inner, sign, unit) for one, inner in self._asked(state))

    def why(self, state: State) -> Reason:
        one, inner = self._asked(state)[0]
        return one.why(inner)

    def _asked(self, state: State) -> list[tuple[Criterion, State]]:
        """Those that asked to stop at the last check, all where none did."""
        each = [(one, below(f"{i}.", state)) for i, one in enumerate(self.criteria)]
        return [pair for pair, asked in zip(each, state["asked"].tolist(), strict=True) if asked] or each

    def mirrored(self) -> Criterion:
        return lifted(self, criteria=tuple(one.mirrored() for one in self.criteria))

    def leaves(self) -> Iterator[Criterion]:
        for one in self.criteria:
            yield from one.leaves()

    def patience_left(self, state: State) -> float | None:
        each = [one.patience_left(below(f"{i}.", state)) for i, one in enumerate(self.criteria)]
        counted = [n for n in each if n is not None]
        return self.left(counted) if counted else None

    def __repr__(self) -> str:
        return self.operator.join(f"({one!r})" if isinstance(one, _Joined) else repr(one) for one in self.criteria)


@dataclass(frozen=True, repr=False)
class AllOf(_Joined):
    """Stop at a check at which all of them say stop: `Patience(10) & GL(5)`.

    >>> from goodfit.stop import GL, Patience
    >>> Patience(10) & (GL(5) | Patience(50))
    Patience(10) & (GL(5) | Patience(50))
    """

    operator = " & "
    word = " and "

    def decide(self, asked: Tensor) -> Tensor:
        return asked.all()

    def left(self, each: list[float]) -> float:
        return max(each)


@dataclass(frozen=True, repr=False)
class AnyOf(_Joined):
    """Stop as soon as one of them says stop: `Patience(10) | GL(5)`.

    >>> from goodfit.stop import GL, Patience
    >>> Patience(10) | GL(5)
    Patience(10) | GL(5)
    """

    operator = " | "
    word = "; "

    def decide(self, asked: Tensor) -> Tensor:
        return asked.any()

    def left(self, each: list[float]) -> float:
        return min(each)


def refuse_missing(criterion: Criterion, report: Report, call: str) -> None:
    """Refuse a report that lacks what a criterion needs, and say how the `call` tells it."""
    for one in criterion.leaves():
        for name in one.needs:
            if getattr(report, name) is None:
                raise GoodfitError(f"{type(one).__name__} needs {INPUTS[name]}; say {call}(score, {name}=...).")


def kept(counts: Tensor, new: State, old: State) -> State:
    """The new state where a check counts, else the old one."""
    return {name: torch.where(counts, t, old[name]) for name, t in new.items()}
