"""One run of a model with some modules in train mode, observed; the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.sampling.draws import Draw, Draws
from goodfit.sampling.kept import buffers_kept, elsewhere, modes_kept, noise_kept, seeded

__all__ = ["Pass", "as_it_was", "observe", "observing", "set_modes"]

_OBSERVING: ContextVar[bool] = ContextVar("observing", default=False)


@dataclass
class Pass:
    """One run of the model: its output and form, what it drew, and which buffers and generators it moved."""

    output: Any = None
    form: Any = None
    problem: str = ""
    draws: Draws = field(repr=False, default=None)  # type: ignore[assignment]
    written: frozenset[str] = frozenset()
    moved: bool = False  # Python's or NumPy's generator

    @property
    def dropping(self) -> list[Draw]:
        return [d for d in self.draws.draws if d.drops]

    @property
    def scales(self) -> bool:
        """Whether each draw is a mask whose mean can take its place."""
        return all(d.scales for d in self.draws.draws)

    @property
    def owners(self) -> set[str]:
        return {d.owner for d in self.dropping}


def set_modes(model: nn.Module, on: Iterable[str]) -> None:
    """Train mode for some modules by name, eval mode for all others."""
    chosen = set(on)
    for name, module in model.named_modules():
        module.training = name in chosen


@contextmanager
def as_it_was(model: nn.Module, on: Iterable[str], seed: int = 0) -> Iterator[list[tuple[nn.Module, str, Tensor, Tensor]]]:
    """Some modules in train mode, draws by a seed, no gradients; afterwards all is as before. Yields what buffers were."""
    with ExitStack() as stack:
        stack.callback(_OBSERVING.reset, _OBSERVING.set(True))
        stack.enter_context(modes_kept(model))
        before = stack.enter_context(buffers_kept(model))
        stack.enter_context(noise_kept(model, seed))
        stack.enter_context(seeded(model, seed))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        set_modes(model, on)
        yield before


def observe(model: nn.Module, call: Callable[[], Any], on: Iterable[str], seed: int = 0, **how: bool) -> Pass:
    """Run the model with some modules in train mode; it stays as it was. `how` is for `Draws`."""
    seen = Pass(draws=Draws(model, **how))
    with as_it_was(model, on, seed) as before:
        generators = elsewhere()
        try:
            with seen.draws:
                seen.output = call()
        except Exception as problem:
            seen.problem = f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0]}"
            seen.output = problem
        seen.form, seen.moved = _form(seen.output), generators != elsewhere()
        seen.written = frozenset(n for m, n, _, numbers in before if not _same(m._buffers.get(n), numbers))
    return seen


def observing() -> bool:
    """Whether a model is being observed, so that its modes are not those of a user's call."""
    return _OBSERVING.get()


def _form(value: Any) -> Any:
    """Types, names and shapes of what a model returns."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return type(value), tuple((key, _form(one)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(_form(one) for one in value)
    return type(value)


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and (torch.equal(a, b) or (a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())))
