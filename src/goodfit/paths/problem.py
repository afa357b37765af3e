"""What a path trains: a fresh model under a cocktail and one strength of the regularizer that the path is over."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.cocktail import Cocktail, as_cocktail
from goodfit.errors import GoodfitError
from goodfit.fitting.loop import LossFunction
from goodfit.fitting.preparation import MakeOptimizer
from goodfit.hyper import Hyper, hypers
from goodfit.phases import Epoch, Finish, Regularizer, Step
from goodfit.regularizers.early_stopping import EarlyStopping
from goodfit.run import Run
from goodfit.where import kernels

__all__ = ["PATIENCE", "Build", "Problem", "along", "template", "tensors"]

PATIENCE = 20
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Problem:
    """Everything but the data. stopping: how long the dense start goes on. example, targets: a batch."""

    build: Build
    over: Regularizer
    cocktail: Cocktail
    stopping: EarlyStopping
    measure: LossFunction
    kind: str
    optimizer: MakeOptimizer | None
    epochs: int
    batch_size: int
    seed: int
    home: torch.device
    example: Any
    targets: Tensor

    @property
    def switch(self) -> str:
        """The number that the path is over."""
        name = type(self.over).switch()
        assert name is not None
        return name

    @property
    def known(self) -> Hyper:
        """What is known of that number."""
        return dict(hypers(self.over))[self.switch]

    @property
    def selects(self) -> bool:
        """Whether the regularizer makes exact zeros: it acts by a proximal step."""
        return isinstance(self.over, Step) and self.over.moment == "proximal" and getattr(self.over, "ratio", 1.0) > 0

    def at(self, lam: float) -> Regularizer:
        """The regularizer at one strength."""
        return replace(self.over, **{self.switch: lam})

    def fresh(self) -> nn.Module:
        """A model as `build` makes it, from the seed: all folds start alike."""
        with torch.random.fork_rng(devices=[self.home] if self.home.type == "cuda" else []):
            torch.manual_seed(self.seed)
            model = self.build()
        if not isinstance(model, nn.Module):
            raise GoodfitError(f"build() must return a torch.nn.Module, got a {type(model).__name__}.")
        return model.to(self.home)

    def run(self, lam: float | None, *more: Regularizer, turn: int = 0) -> Run:
        """A run of a fresh model; without a λ, of the cocktail alone. turn: of the path, so that its masks differ."""
        mix = [*self.cocktail, *([] if lam is None else [self.at(lam)]), *more]
        return Run(Cocktail(*mix), self.fresh(), loss=self.measure, example=self.example, seed=self.seed + turn)

    def penalised(self, model: nn.Module) -> list[str]:
        """Names of the trainable weights that the regularizer acts on."""
        chosen = getattr(self.over, "where", kernels).select(model)
        placed = getattr(getattr(self.over.on(model), "groups", None), "ids", chosen)  # by groups, only what has one
        return [name for name in chosen if model.get_parameter(name).requires_grad and name in placed]

    def check(self) -> None:
        """Refuse, before anything is trained, a model or regularizer that no path can be made of."""
        one, other = self.fresh(), self.fresh()
        if {id(p) for p in one.parameters()} & {id(p) for p in other.parameters()}:
            raise GoodfitError(
                "build must make a new model at each call, got the same parameters twice; write build=lambda: MyModel(...)."
            )
        model = self.run(self.known.low).model
        if not self.penalised(model):
            raise GoodfitError(f"{self.over} acts on no trainable weight: all that it selects are frozen; unfreeze some.")


def template(over: Any) -> Regularizer:
    """The regularizer that the path is over: a class, or a value as template whose switch number the path sets."""
    if inspect.isclass(over) and issubclass(over, Regularizer):
        over = over()
    if not isinstance(over, Regularizer):
        raise GoodfitError(f"over must be a regularizer such as L1 or GroupLasso(groups=inputs), got {over!r:.60}.")
    name = type(over).switch()
    if name is None or isinstance(over, Epoch | Finish):
        raise GoodfitError(f"{type(over).__name__} has no strength that a path could be over; give over=L1, say.")
    return replace(over, **{name: dict(hypers(over))[name].default}) if over.off or over.scheduled else over


def along(cocktail: Any, over: Regularizer) -> tuple[Cocktail, EarlyStopping]:
    """What acts beside the regularizer of the path, and the patience of the dense start."""
    mix = as_cocktail(cocktail)
    for one in mix:
        if type(one) is type(over) and getattr(one, "where", None) == getattr(over, "where", None):
            raise GoodfitError(f"The path is over {type(over).__name__}, which the cocktail holds too: {one}; leave it out.")
        if one.scheduled:
            raise GoodfitError(f"A cocktail along a path has no schedules, since each λ starts anew, got {one}; give numbers.")
        if isinstance(one, Epoch | Finish) and not isinstance(one, EarlyStopping):
            raise GoodfitError(f"{one} has no part in a path, which stops and keeps by itself; leave it out.")
    stops = list(mix.of(EarlyStopping))
    if any(one.mode == "max" for one in stops):
        raise GoodfitError("A path scores by the validation loss, where lower is better; leave EarlyStopping's mode out.")
    for one in stops:
        unknown = [name for name in one.criterion.needs if name != "seconds"]
        if unknown or one.unit == "steps":
            raise GoodfitError(
                f"A path stops by the validation loss after each epoch, and knows no {(*unknown, 'step')[0]}: {one}."
            )
    rest = Cocktail(*(one for one in mix if not isinstance(one, EarlyStopping)))
    return rest, stops[0] if stops else EarlyStopping(PATIENCE)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state, on the CPU."""
    return {name: t.detach().to("cpu", copy=True) for name, t in model.state_dict().items()}
