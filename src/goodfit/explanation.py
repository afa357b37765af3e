"""Who is penalised: a table of a model's parameters, with what a cocktail does to each."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO
from shutil import get_terminal_size
from typing import Any

import torch
from torch import nn

from goodfit.cocktail import Cocktail, as_cocktail
from goodfit.errors import GoodfitError
from goodfit.hyper import hypers
from goodfit.phases import Build, Gradient, Penalty, Regularizer, Step
from goodfit.plan import Plan
from goodfit.where import by_shape, owners, roles

__all__ = ["Explanation", "Line", "explain"]


@dataclass(frozen=True)
class Line:
    """What happens to one parameter. penalties: each regularizer, with what it adds to the objective now, None for nothing."""

    name: str
    shape: tuple[int, ...]
    role: str
    penalties: tuple[tuple[str, float | None], ...]
    note: str = ""

    @property
    def by(self) -> str:
        """What acts on it, with its numbers; "–" where nothing does."""
        return ", ".join(text if now is None else f"{text} = {now:.4g}" for text, now in self.penalties) or "–"


@dataclass(frozen=True)
class Explanation:
    """A line per parameter, tied ones once, and what the cocktail does besides."""

    lines: tuple[Line, ...]
    besides: tuple[str, ...]

    def __repr__(self) -> str:
        penalised = sum(bool(line.penalties) for line in self.lines)
        return f"Explanation({penalised} of {len(self.lines)} parameters penalised)"

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        heads = ("parameter", "shape", "role", "by what, and what that adds to the loss now", "note")
        table = Table(*heads, box=None, pad_edge=False)
        for line in self.lines:
            table.add_row(line.name, "×".join(map(str, line.shape)) or "1", line.role, line.by, line.note)
        text = StringIO()
        console = Console(file=text, width=max(80, get_terminal_size((160, 24)).columns), markup=False, highlight=False)
        console.print(table)
        for line_besides in self.besides:
            console.print(line_besides)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def explain(cocktail: Cocktail | Regularizer | str, model: nn.Module) -> Explanation:
    """Print who is penalised, by what, and how much: a line per parameter of `model`. Returns the lines.

    The role is found by the type of the module that owns a parameter; where goodfit does not know that type, the line says
    that the role follows from the shape. The model stays as it is: what a cocktail would insert is said, not done.

    >>> _ = explain("L2(0.5), Dropout(0.1)", nn.Linear(1, 1, bias=False).requires_grad_(False))
    parameter  shape  role    by what, and what that adds to the loss now  note
    weight     1×1    kernel  –                                            frozen
    Dropout(0.1) acts on the model's structure
    """
    mix = as_cocktail(cocktail)
    if not isinstance(model, nn.Module):
        raise GoodfitError(f"explain takes a cocktail and a torch.nn.Module, in this order, got a {type(model).__name__}.")
    besides = tuple(f"{one} {_besides(one)}" for one in mix if one.off or not isinstance(one, Penalty | Step | Gradient))
    plan = Plan(Cocktail(*(one for one in mix if isinstance(one, Penalty | Step | Gradient))), model, seed=0)
    plan.prepare(None)
    found = Explanation(tuple(_lines(plan, model)), besides)
    print(found)
    return found


def _lines(plan: Plan, model: nn.Module) -> list[Line]:
    known, parameters = owners(model), dict(model.named_parameters())
    lines = []
    for name, role in roles(model).items():
        p, (module, _) = parameters[name], known[name]
        acting = [(key, one) for key, one in plan.of(Regularizer) if p.requires_grad and _acts(one, name, plan.chosen[key])]
        penalties = tuple((_short(one), _now(one, name, p, plan.states[key])) for key, one in acting)
        shape = f"by its shape: {type(module).__name__} is not known" if by_shape(module) else ""
        note = ", ".join(filter(None, ("" if p.requires_grad else "frozen", shape)))
        lines.append(Line(name, tuple(p.shape), role, penalties, note))
    return lines


def _acts(one: Any, name: str, chosen: list[str]) -> bool:
    """Whether a regularizer has selected a weight and, where it goes by groups, has a group for it."""
    return name in chosen and name in getattr(getattr(one, "groups", None), "ids", chosen)


def _short(one: Regularizer) -> str:
    """The name with its numbers; where it acts is what the table shows."""
    numbers = ", ".join(f"{name}={getattr(one, name):g}" for name, _ in hypers(one))
    return f"{type(one).__name__}({numbers})"


@torch.no_grad()
def _now(one: Any, name: str, p: nn.Parameter, state: dict[str, torch.Tensor]) -> float | None:
    if isinstance(one, Gradient) or (isinstance(one, Step) and type(one).penalty is Step.penalty):
        return None
    return float(one.penalty({name: p.detach()}, state))


def _besides(one: Regularizer) -> str:
    if one.off:
        return "is off"
    return "acts on the model's structure" if isinstance(one, Build) else "acts on no single weight"
