"""`gf.spaces`: which cocktails are worth trying, as values to draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from goodfit.cocktail import Cocktail
from goodfit.hyper import Hyper, hypers
from goodfit.phases import Regularizer
from goodfit.regularizers.averaging import SWA, Lookahead
from goodfit.regularizers.batchnorm import BatchNorm
from goodfit.regularizers.cut_out import CutOut
from goodfit.regularizers.dropout import Dropout
from goodfit.regularizers.mixing import CutMix, MixUp
from goodfit.regularizers.shake_drop import ShakeDrop
from goodfit.regularizers.shake_shake import ShakeShake
from goodfit.regularizers.sharpness import FGSM
from goodfit.regularizers.shrinkage import WeightDecay
from goodfit.regularizers.skip_connections import SkipConnections
from goodfit.schedules import late

__all__ = ["COCKTAIL", "Choice", "Option", "Space"]


class Trial(Protocol):
    """What is asked for each value: a trial of Optuna is one."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...


@dataclass(frozen=True)
class Option:
    """One regularizer to be tried. ranges: (low, high) of its numbers to search, or the words to choose from; others: fixed."""

    kind: type[Regularizer]
    ranges: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    others: tuple[tuple[str, Any], ...] = ()

    def made(self, trial: Trial) -> Regularizer:
        """The regularizer, with what the trial says."""
        known = dict(hypers(self.kind))
        asked = {name: _asked(trial, f"{self.kind.__name__}.{name}", known.get(name), among) for name, among in self.ranges}
        return self.kind(**asked, **dict(self.others))


@dataclass(frozen=True)
class Choice:
    """One of several mixes of options. name: of the question; mixes: by the answer."""

    name: str
    mixes: tuple[tuple[str, tuple[Option, ...]], ...]

    def made(self, trial: Trial) -> Iterator[Regularizer]:
        """The regularizers of the mix that the trial chooses."""
        chosen = trial.suggest_categorical(self.name, [name for name, _ in self.mixes])
        yield from (option.made(trial) for option in dict(self.mixes)[chosen])


@dataclass(frozen=True)
class Space:
    """Cocktails: of each choice one mix, in this order.

    >>> print(COCKTAIL.draw(seed=2))
    WeightDecay(0.02197837162834511), CutMix(0.25158329759496567)
    """

    choices: tuple[Choice, ...]

    def suggest(self, trial: Trial) -> Cocktail:
        """The cocktail of a trial of Optuna."""
        return Cocktail(*(one for choice in self.choices for one in choice.made(trial)))

    def draw(self, seed: int) -> Cocktail:
        """A random cocktail: every mix is as likely, numbers are uniform, or uniform in their logarithm."""
        return self.suggest(_Draw(seed))


class _Draw:
    """A trial that answers at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.random.choice(choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return low * (high / low) ** self.random.random() if log else self.random.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return self.random.randint(low, high)


def _asked(trial: Trial, name: str, known: Hyper | None, among: tuple[Any, ...]) -> Any:
    if known is None:
        return trial.suggest_categorical(name, list(among))
    low, high = among
    if known.integer:
        return trial.suggest_int(name, low, high)
    return trial.suggest_float(name, low, high, log=known.log and low > 0)


def _or_not(option: Option) -> Choice:
    return Choice(option.kind.__name__, (("no", ()), ("yes", (option,))))


_SHAPES = ("funnel", "long_funnel", "diamond", "hexagon", "brick", "triangle", "stairs")
_SKIP = Option(SkipConnections)

COCKTAIL = Space(
    (
        _or_not(Option(BatchNorm)),
        Choice(
            "SkipConnections",
            (
                ("no", ()),
                ("plain", (_SKIP,)),
                ("shake-shake", (_SKIP, Option(ShakeShake))),
                ("shake-drop", (_SKIP, Option(ShakeDrop, (("p", (0.0, 1.0)),)))),
            ),
        ),
        _or_not(Option(Dropout, (("p", (0.0, 0.8)), ("shape", _SHAPES)))),
        _or_not(Option(WeightDecay, (("lam", (1e-5, 0.1)),))),
        Choice(
            "augmentation",
            (
                ("no", ()),
                ("mixup", (Option(MixUp, (("alpha", (0.0, 1.0)),)),)),
                ("cutmix", (Option(CutMix, (("p", (0.0, 1.0)),)),)),
                ("cutout", (Option(CutOut, (("p", (0.0, 1.0)), ("ratio", (0.0, 1.0)))),)),
                ("adversarial", (Option(FGSM),)),
            ),
        ),
        _or_not(Option(Lookahead, (("alpha", (0.5, 0.8)), ("k", (5, 10))))),
        _or_not(Option(SWA, others=(("weight", late(1.0, epochs=79)),))),
    )
)
"""The cocktails of Kadra et al. 2021, Well-tuned simple nets excel on tabular datasets, arXiv 2106.11189, table 1, corrected.

Decay is searched on a logarithmic scale, and leaves biases and norms out; dropout never stands before a batch norm; the
average begins with the last quarter of the 105 epochs. Snapshot ensembles are several models, and no part of a cocktail.
"""
