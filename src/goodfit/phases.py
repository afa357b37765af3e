"""The eight phases: a regularizer transforms one value of training, at one phase.

Each phase is an abstract class with one abstract method; a regularizer is a frozen dataclass whose header names its
phases: `class EarlyStopping(Epoch, Finish)`. A phase takes a value and returns a value of the same kind; what it must
remember is a dict of tensors, made by `init`, handed in and returned. Nothing receives "the trainer".

Weights are dicts from parameter name to tensor: the selected ones for Penalty and Step, all for Epoch and Finish.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from goodfit.errors import GoodfitError
from goodfit.hyper import hypers, lifted, validate
from goodfit.noise import Noise
from goodfit.schedules.schedule import Schedule
from goodfit.where import Where

__all__ = ["PHASES", "Batch", "Build", "Epoch", "Finish", "Gradient", "Loss", "Penalty", "Regularizer", "Report", "Step"]
__all__ += ["Again", "phases_of"]

Weights = Mapping[str, Tensor]
State = dict[str, Tensor]
Again = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Report:
    """What is known at one check, each a tensor of one number, None where nobody told.

    score: of the validation; lower is better unless a regularizer says mode="max". train_loss: since the check before.
    stderr: the standard error of the score. evidence: `gf.stop.evidence`. step: completed optimizer steps. seconds: of
    training so far.
    """

    score: Tensor
    train_loss: Tensor | None = None
    stderr: Tensor | None = None
    evidence: Tensor | None = None
    step: Tensor | None = None
    seconds: Tensor | None = None


@dataclass(frozen=True)
class Regularizer(ABC):
    """What all regularizers share: checked numbers, a switch, a state, a text."""

    def __post_init__(self) -> None:
        validate(self)
        for f in fields(self):
            if isinstance(f.default, bool) and not isinstance(getattr(self, f.name), bool):
                got = f"{f.name}={getattr(self, f.name)!r}"
                raise GoodfitError(f"{type(self).__name__}.{f.name} must be True or False, got {got}.")
        where = getattr(self, "where", None)
        if where is not None and not isinstance(where, Where):
            raise GoodfitError(
                f"{type(self).__name__}.where must be a selector such as kernels or named('*.weight'), got where={where!r}."
            )

    @classmethod
    def switch(cls) -> str | None:
        """The number whose off value makes this regularizer the identity, None for true structure."""
        return next((name for name, known in hypers(cls) if known.off is not None), None)

    @property
    def off(self) -> bool:
        """Whether the switch stands at its off value."""
        return any(known.off is not None and getattr(self, name) == known.off for name, known in hypers(self))

    @property
    def scheduled(self) -> bool:
        """Whether a number depends on the step."""
        return any(isinstance(getattr(self, name), Schedule) for name, _ in hypers(self))

    def at(self, step: int) -> Any:
        """This regularizer with the numbers that its schedules have after `step` optimizer steps."""
        if not self.scheduled:
            return self
        moving = {name: getattr(self, name) for name, _ in hypers(self)}
        return lifted(self, **{name: n.at(step) for name, n in moving.items() if isinstance(n, Schedule)})

    def on(self, model: nn.Module) -> Any:
        """This regularizer as it acts on one model, after building: what only the modules can tell is looked up once."""
        return self

    def init(self, weights: Weights, buffers: Weights) -> State:
        """The state before the first step."""
        return {}

    def __str__(self) -> str:
        shown = [
            (f.name, getattr(self, f.name)) for i, f in enumerate(fields(self)) if i == 0 or getattr(self, f.name) != f.default
        ]
        first = fields(self)[0].name if fields(self) else None
        return f"{type(self).__name__}({', '.join(repr(v) if k == first else f'{k}={v!r}' for k, v in shown)})"


class Build(Regularizer):
    """Model → model, in place, once. Its `where` picks places by the name of the module, not weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        where = getattr(self, "where", None)
        if where is not None and where.by_role:
            raise GoodfitError(
                f"{type(self).__name__}.where picks places by their name, and a place has no role as a weight has: write "
                f"where=named('encoder.*'), got where={where!r}."
            )

    @abstractmethod
    def build(self, model: nn.Module, example: Any) -> nn.Module:
        """Edit `model` in place; `example` is one input batch."""

    def tune(self, model: nn.Module) -> None:
        """Push the numbers of this regularizer into the model it has built: called when a schedule moves."""


class Batch(Regularizer):
    """(x, y) → (x, y), before the forward pass."""

    mixes: ClassVar[bool] = True  # whether it changes y, which must be probabilities or reals then

    @abstractmethod
    def batch(self, x: Any, y: Tensor, noise: Noise) -> tuple[Any, Tensor]:
        """Change inputs and targets; y holds probabilities (rows, classes) or reals."""


class Loss(Regularizer):
    """Data loss → data loss."""

    @abstractmethod
    def loss(self, loss: Tensor, outputs: Tensor, y: Tensor) -> Tensor:
        """Change the scalar `loss`, which is f(outputs, y)."""


class Penalty(Regularizer):
    """Selected weights → scalar that the objective gains."""

    elementwise: ClassVar[bool] = False
    """Whether each number counts by itself, and the state, entries "part.name" of a weight's shape, does not change: then
    a run hands weights over in blocks, flattened."""

    @abstractmethod
    def penalty(self, weights: Weights, state: State) -> Tensor:
        """The scalar; `state` is what `init` made."""

    def slope(self, weights: Weights, state: State) -> dict[str, Tensor]:
        """Its gradient; in closed form where a regularizer knows one, else by autograd."""
        return dict(torch.func.grad(self.penalty)(dict(weights), state))


class Gradient(Regularizer):
    """Gradients → gradients, between backward and the optimizer's step."""

    twice: ClassVar[bool] = False
    """Whether it asks for a second gradient, once."""

    uphill: ClassVar[bool] = False
    """Whether that one is at inputs moved along their gradient, so that inputs need one."""

    @abstractmethod
    def gradient(
        self, grads: Weights, weights: Weights, state: State, again: Again, noise: Noise
    ) -> tuple[dict[str, Tensor], State]:
        """Change `grads`.

        `again(weights)` is the gradient of the objective on the same batch, with the same noise, at other weights;
        `again(weights, epsilon)` that at inputs, too, that are moved by epsilon along the sign of their gradient.
        """


class Step(Regularizer):
    """Selected weights → weights, beside the optimizer's step."""

    moment: ClassVar[Literal["before", "proximal", "after"]] = "after"
    """Before the optimizer's step, after it, or after it and in need of the optimizer's rate per weight."""

    elementwise: ClassVar[bool] = False
    """As for Penalty."""

    watches: ClassVar[bool] = False
    """Whether it acts behind all others, and on weights without a gradient, too: it follows where weights go."""

    def penalty(self, weights: Weights, state: State) -> Tensor:
        """What the objective gains by the selected weights: zero for a step that no objective knows, such as decay."""
        return torch.zeros((), dtype=torch.float64)

    @abstractmethod
    def step(self, weights: Weights, lr: Weights, rate: Weights, state: State) -> tuple[dict[str, Tensor], State]:
        """Change `weights`; `lr` is the learning rate.

        A proximal step gets the `rate`, the optimizer's step per unit of constant gradient, and as `lr` its reach: the
        optimizer's step under a gradient of the size seen so far, inf for SGD.
        """


class Epoch(Regularizer):
    """What validation said → go on?"""

    @abstractmethod
    def epoch(self, report: Report, weights: Weights, buffers: Weights, state: State) -> tuple[Tensor, State]:
        """A boolean tensor, whether to go on, and the new state."""

    def reason(self, state: State) -> str:
        """Why this regularizer does not want to go on."""
        return f"{self} asked to stop"

    def why(self, state: State) -> Any:
        """The same in one word, a `gf.stop.Reason`."""
        return None

    def refuse(self, report: Report, call: str) -> None:
        """Refuse a report that lacks something, and say how the `call` tells it."""

    def refuse_state(self, saved: State) -> None:
        """Refuse a saved state that means something else under these settings."""

    def rolls_back(self, report: Report) -> bool:
        """Whether the model goes on from what `kept` gives."""
        return False


class Finish(Regularizer):
    """Weights and buffers → weights and buffers, at the end; pure, may be asked at any epoch."""

    averages: ClassVar[bool] = False
    """Whether the weights are ones that no training step has run on, so that batch norms need new statistics."""

    def restores(self, state: State) -> bool:
        """Whether it gives back a model of before, statistics included."""
        return False

    @abstractmethod
    def finish(self, weights: Weights, buffers: Weights, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights and buffers to return."""


PHASES: tuple[type[Regularizer], ...] = (Build, Batch, Loss, Penalty, Gradient, Step, Epoch, Finish)


def phases_of(kind: type[Regularizer]) -> list[str]:
    """Names of the phases of a regularizer class, in the order in which training meets them."""
    return [phase.__name__ for phase in PHASES if issubclass(kind, phase)]
