"""A stack: many cocktails on many models, trained at once. It answers the calls of a run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from goodfit.cocktail import as_cocktail
from goodfit.errors import GoodfitError, GoodfitWarning, listed
from goodfit.losses import loss_of
from goodfit.run import Run
from goodfit.stack.apart import Apart
from goodfit.stack.calls import Calls
from goodfit.stack.given import Each, rates_of, refuse_members, scores_of, seeds_of
from goodfit.stack.groups import How, grouped
from goodfit.stack.optimizers import MakeOptimizer, Rate, about
from goodfit.stack.parts import Parts
from goodfit.stack.saved import going_in, load_stack, optimizer_alone, stack_state

__all__ = ["Stack"]


class Stack:
    """K members, each a cocktail on a model, with its own numbers, learning rate, patience and noise.

        stack = Stack(cocktails, models, task="classes", example=x, lr=[1e-3, 3e-3])
        x, y = stack.batch(x, y)
        stack.zero_grad()
        stack.loss(x, y).sum().backward()           # (K,), one loss for each member that goes on
        stack.gradient(); stack.move(); stack.step()
        with stack.view(loader):
            scores = stack.score(valid)
        if not stack.epoch(scores): break
        models = stack.finish(loader)

    Member k gives what Run(cocktails[k], models[k]) gives alone. Models of one kind (as their cocktails have built them) lie in
    one set of tensors and are computed at once; those that cannot be, one after the other. A member that stops leaves.

    cocktails: of the members. models: as many, or one function that makes them. loss, task, example: as for Run. lr: of AdamW,
    one for all, or one for each, numbers or schedules; optimizer: a function from parameters to another optimizer of torch, in
    which each number counts by itself. seeds: of the noise, one for all, or one for each. together: True computes at once what
    can be, False nothing, None what is faster so. memory: bytes for all that a step needs, None for half of those that are
    free; members that do not fit at a time, as one has run on the example, are parts of their own. `print(stack)` tells them.
    members: those that go on. stopped: why the others do not.
    """

    def __init__(
        self,
        cocktails: Sequence[Any],
        models: Sequence[nn.Module] | Callable[[], nn.Module],
        *,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        task: str | None = None,
        example: Any = None,
        lr: Rate | Sequence[Rate] = 1e-3,
        optimizer: MakeOptimizer | None = None,
        seeds: int | Sequence[int] = 0,
        together: bool | None = None,
        memory: float | None = None,
    ) -> None:
        mixes = [as_cocktail(one) for one in cocktails]
        made = [models() for _ in mixes] if callable(models) and not isinstance(models, nn.Module) else list(models)  # type: ignore[arg-type]
        refuse_members(mixes, made, optimizer, lr, example, loss, memory)
        self.models, self.stopped = made, dict[int, str]()
        each, self._lrs = seeds_of(seeds, len(made)), rates_of(lr, len(made))
        self._measure, self._make = loss if loss is not None else loss_of(task or ""), optimizer
        given = zip(mixes, made, each, strict=True)
        self.runs = [Run(mix, model, loss=self._measure, example=example, seed=seed) for mix, model, seed in given]
        self._parts = Parts(grouped(self.runs, each, self._lrs, optimizer, How(example, together, memory)))
        self._calls = Calls()
        logging.getLogger(__name__).info("%s", self)
        for part in self._parts.all:
            if isinstance(part.work, Apart) and part.why:
                told = f"{len(part.members)} members are trained one after the other: {part.why}"
                warnings.warn(told, GoodfitWarning, stacklevel=2)

    @property
    def members(self) -> list[int]:
        """Those that go on."""
        return list(self._parts.members)

    def batch(self, x: Any, y: Any, *, own: bool = False) -> tuple[Each, Each]:
        """Batch regularizers on one batch, the same for all members; own: or (K, rows, ...), one for each that goes on."""
        return self._parts.batch(x, y, own)

    def loss(self, x: Any, y: Any) -> Tensor:
        """The loss of each member that goes on, (K,), without penalties; call `.sum().backward()` on it."""
        xs, ys = self._parts.given(x, y)
        with self._calls.making("loss"):
            return self._parts.joined([self._parts.loss(i, xs, ys) for i in range(len(self._parts.all))])

    def zero_grad(self) -> None:
        """No gradients, for all members."""
        self._calls.drop()
        for part in self._parts.all:
            part.work.zero_grad()

    def gradient(self) -> None:
        """Penalties and Gradient regularizers, then decoupled decay: between backward and the step."""
        with self._calls.making("gradient"):
            for part in self._parts.all:
                part.work.before_step()

    def move(self) -> None:
        """The optimizer's step of all members."""
        with self._calls.making("move"):
            for part in self._parts.all:
                part.work.move()

    def step(self) -> None:
        """Proximal and other steps, behind the optimizer's; then time passes."""
        with self._calls.making("step"):
            for part in self._parts.all:
                part.work.after_step()

    def learn(self, x: Any, y: Any, *, own: bool = False) -> Tensor:
        """All calls of one step: batch, loss, backward, gradient, move, step. The losses, as they were before it."""
        xs, ys = self.batch(x, y, own=own)
        self.zero_grad()
        found = []
        with self._calls.making("loss"):
            for i in range(len(self._parts.all)):  # one backward at a time, so that one part is in memory
                found.append(self._parts.loss(i, xs, ys))
                torch.autograd.backward(found[-1].sum())
        losses = self._parts.joined(found)
        self.gradient()
        self.move()
        self.step()
        return losses.detach()

    @torch.no_grad()
    def outputs(self, x: Any) -> Any:
        """What the members that go on give in eval mode, (K, rows, ...); a list where their shapes differ."""
        return self._parts.outputs(x)

    @torch.no_grad()
    def score(self, batches: Iterable[tuple[Any, Tensor]]) -> Tensor:
        """The mean loss over the rows of all batches, (K,), in eval mode."""
        total, rows = torch.zeros(len(self.members), dtype=torch.float64), 0
        for x, y in batches:
            total += self._parts.losses(x, y, self._measure).double().cpu() * len(y)
            rows += len(y)
        if not rows:
            raise GoodfitError("stack.score takes batches of rows, as in stack.score([(x, y)]), got none.")
        return total / rows

    @contextmanager
    def view(self, batches: Any = None) -> Iterator[None]:
        """The models as a training gives them, to be scored within: averaged ones, with statistics of `batches`."""
        self._calls.between("stack.view", self._parts.gradients)
        self._parts.hand_over()
        failed: dict[int, GoodfitError] = {}
        with ExitStack() as within:
            for k in self.members:
                try:
                    within.enter_context(self.runs[k].view(batches))
                except GoodfitError as wrong:  # of one member, which the others need not feel
                    failed[k] = wrong
            if len(failed) == len(self.members):
                raise next(iter(failed.values()))
            self.stopped |= {k: str(wrong) for k, wrong in failed.items()}
            with self._calls.within_view():
                yield

    def epoch(self, scores: Any, *, train_loss: Any = None, stderr: Any = None, evidence: Any = None) -> bool:
        """Tell the validation score of each member that goes on; whether any still does. Those that stop leave."""
        self._calls.between("stack.epoch", self._parts.gradients)
        given = {"score": scores, "train_loss": train_loss, "stderr": stderr, "evidence": evidence}
        told = {name: scores_of(one, len(self.members), name) for name, one in given.items()}
        own = [{name: one[i] for name, one in told.items() if one is not None} for i in range(len(self.members))]
        self._parts.hand_over()
        hearing = [(k, own[i]) for i, k in enumerate(self.members) if k not in self.stopped]
        for k, report in hearing:
            self.runs[k]._checks.refuse_report(call="stack.epoch", **report)
        for k, report in hearing:
            if not self.runs[k].epoch(**report):
                self.stopped[k] = self.runs[k].stopped
        self._parts.leave([k for k in self.members if k in self.stopped])
        return bool(self.members)

    def stop(self, members: Iterable[int] | int) -> None:
        """Let these members leave, as losers of a search do: they are finished with what they have."""
        chosen = [members] if isinstance(members, int) else list(members)
        self._leave(chosen, "stopped by stack.stop", "stack.stop")

    def finish(self, batches: Any = None) -> list[nn.Module]:
        """The models to keep, all K: averages, then the best that was scored, in place."""
        self._leave(self.members, "", "stack.finish")
        failed: dict[int, GoodfitError] = {}
        for k, run in enumerate(self.runs):
            try:
                run.finish(batches)
            except GoodfitError as wrong:
                failed[k] = wrong
        if len(failed) == len(self.runs):
            raise next(iter(failed.values()))
        if failed:
            told = f"Members {listed(map(str, failed), 5)} stay as they are: {next(iter(failed.values()))}"
            warnings.warn(told, GoodfitWarning, stacklevel=2)
        return self.models

    def alone(self, k: int) -> tuple[Run, Optimizer]:
        """Let one member leave, to go on in a loop of its own: its run, and an optimizer that remembers what it did."""
        part = self._parts.of(k)
        if part is None:
            raise GoodfitError(f"Member {k} does not go on in this stack; those that do: {listed(map(str, self.members))}.")
        made = optimizer_alone(part, k, self._make, self._lrs[k])
        self._leave([k], "goes on alone", "stack.alone")
        return self.runs[k], made()

    def state_dict(self) -> dict[str, Tensor]:
        """All that must be remembered between two steps, weights included; `load_state_dict` takes it back."""
        self._calls.between("stack.state_dict", self._parts.gradients)
        self._parts.hand_over()
        return stack_state(self.runs, self._parts.all, about(self._make, self._lrs))

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken, in a stack of the same cocktails, optimizer and models of the same kinds."""
        self._calls.between("stack.load_state_dict", self._parts.gradients)
        going, models = going_in(saved, self.runs, self.members, about(self._make, self._lrs))
        self._leave([k for k in self.members if k not in going], "had left when it was saved", "stack.load_state_dict")
        load_stack(self.runs, self._parts.all, saved, models)
        self.stopped |= {k: run.stopped for k, run in enumerate(self.runs) if k not in going and run.stopped}

    def __repr__(self) -> str:
        parts = "; ".join(map(str, self._parts.all)) or "all have left"
        return f"Stack of {len(self.runs)} members, {len(self.members)} going on: {parts}"

    def __deepcopy__(self, memo: Any) -> Stack:
        raise GoodfitError("A stack cannot be copied: make another, and let it load_state_dict what state_dict gives.")

    def _leave(self, members: Sequence[int], why: str, call: str) -> None:
        self._calls.between(call, self._parts.gradients)
        unknown = [k for k in members if k not in self.members]
        if unknown:
            raise GoodfitError(
                f"{call} got {unknown[0]!r}, which does not go on; those that do: {listed(map(str, self.members))}."
            )
        self._parts.hand_over()
        self.stopped |= dict.fromkeys(members, why) if why else {}
        self._parts.leave(members)
