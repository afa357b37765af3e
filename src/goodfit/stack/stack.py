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
from torch.utils._pytree import tree_map

from goodfit.cocktail import as_cocktail
from goodfit.errors import GoodfitError, GoodfitWarning, listed
from goodfit.losses import loss_of
from goodfit.run import Run
from goodfit.stack.apart import Apart
from goodfit.stack.given import Each, one_each, refuse_members
from goodfit.stack.groups import How, grouped
from goodfit.stack.optimizers import MakeOptimizer, Rate, lr_at, plain_optimizer
from goodfit.stack.saved import going_in, into_optimizer, load_stack, optimizer_state, stack_state

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
        made = [models() for _ in mixes] if callable(models) else list(models)
        refuse_members(mixes, made, optimizer, lr, example)
        self.models, self.members = made, list(range(len(made)))
        self.stopped: dict[int, str] = {}
        measure = loss if loss is not None else loss_of(task or "")
        each = one_each(seeds, len(made), "seeds")
        given = zip(mixes, made, each, strict=True)
        self.runs = [Run(mix, model, loss=measure, example=example, seed=seed) for mix, model, seed in given]
        self._measure, self._make, self._lrs = measure, optimizer, one_each(lr, len(made), "lr")
        self._parts = grouped(self.runs, each, self._lrs, optimizer, How(example, together, memory))
        logging.getLogger(__name__).info("%s", self)
        for part in self._parts:
            if isinstance(part.work, Apart) and part.why:
                told = f"{len(part.members)} members are trained one after the other: {part.why}"
                warnings.warn(told, GoodfitWarning, stacklevel=2)

    def batch(self, x: Any, y: Any, *, own: bool = False) -> tuple[Each, Each]:
        """Batch regularizers on one batch, the same for all members; own: or (K, rows, ...), one for each that goes on."""
        found = [part.work.batch(*self._of(part, x, y, own), own) for part in self._parts]
        flags = tuple(own for _, _, own in found)
        return Each(tuple(x for x, _, _ in found), flags), Each(tuple(y for _, y, _ in found), flags)

    def loss(self, x: Any, y: Any) -> Tensor:
        """The loss of each member that goes on, (K,), without penalties; call `.sum().backward()` on it."""
        xs, ys = (one if isinstance(one, Each) else Each.shared(one, len(self._parts)) for one in (x, y))
        return self._joined([self._loss_of(i, xs, ys) for i in range(len(self._parts))])

    def zero_grad(self) -> None:
        """No gradients, for all members."""
        for part in self._parts:
            part.work.zero_grad()

    def gradient(self) -> None:
        """Penalties and Gradient regularizers, then decoupled decay: between backward and the step."""
        for part in self._parts:
            part.work.before_step()

    def move(self) -> None:
        """The optimizer's step of all members."""
        for part in self._parts:
            part.work.move()

    def step(self) -> None:
        """Proximal and other steps, behind the optimizer's; then time passes."""
        for part in self._parts:
            part.work.after_step()

    def learn(self, x: Any, y: Any, *, own: bool = False) -> Tensor:
        """All calls of one step: batch, loss, backward, gradient, move, step. The losses, as they were before it."""
        xs, ys = self.batch(x, y, own=own)
        self.zero_grad()
        found = []
        for i in range(len(self._parts)):  # one backward at a time, so that one part is in memory
            found.append(self._loss_of(i, xs, ys))
            torch.autograd.backward(found[-1].sum())
        losses = self._joined(found)
        self.gradient()
        self.move()
        self.step()
        return losses.detach()

    @torch.no_grad()
    def outputs(self, x: Any) -> Any:
        """What the members that go on give in eval mode, (K, rows, ...)."""
        found = [part.work.outputs(x) for part in self._parts]
        return found[0] if len(found) == 1 else tree_map(lambda *t: self._joined(t), *found)

    @torch.no_grad()
    def score(self, batches: Iterable[tuple[Any, Tensor]]) -> Tensor:
        """The mean loss over the rows of all batches, (K,), in eval mode."""
        total, rows = torch.zeros(len(self.members), dtype=torch.float64), 0
        for x, y in batches:
            found = [part.losses_of(x, y, self._measure) for part in self._parts]
            total += self._joined(found).double().cpu() * len(y)
            rows += len(y)
        return total / rows

    @contextmanager
    def view(self, batches: Any = None) -> Iterator[None]:
        """The models as a training gives them, to be scored within: averaged ones, with statistics of `batches`."""
        self._hand_over()
        with ExitStack() as within:
            for k in self.members:
                try:
                    within.enter_context(self.runs[k].view(batches))
                except GoodfitError as wrong:  # of one member, which the others need not feel
                    self.stopped[k] = str(wrong)
            yield

    def epoch(self, scores: Any, *, train_loss: Any = None, stderr: Any = None) -> bool:
        """Tell the validation score of each member that goes on; whether any still does. Those that stop leave."""
        told = [None if t is None else torch.as_tensor(t).tolist() for t in (scores, train_loss, stderr)]
        if told[0] is None or any(t is not None and len(t) != len(self.members) for t in told):
            raise GoodfitError(f"stack.epoch takes one score for each of the {len(self.members)} members that go on.")
        self._hand_over()
        for i, k in enumerate(self.members):
            others = {name: t[i] for name, t in zip(("train_loss", "stderr"), told[1:], strict=True) if t is not None}
            if k not in self.stopped and not self.runs[k].epoch(told[0][i], **others):
                self.stopped[k] = self.runs[k].stopped
        self._leave([k for k in self.members if k in self.stopped])
        return bool(self.members)

    def stop(self, members: Iterable[int]) -> None:
        """Let these members leave, as losers of a search do: they are finished with what they have."""
        self._hand_over()
        self._leave(list(members))

    def finish(self, batches: Any = None) -> list[nn.Module]:
        """The models to keep, all K: averages, then the best that was scored, in place."""
        self._hand_over()
        self._leave(list(self.members))
        for k, run in enumerate(self.runs):
            try:
                run.finish(batches)
            except GoodfitError as wrong:
                if len(self.runs) == 1:
                    raise
                warnings.warn(f"Member {k} stays as it is: {wrong}", GoodfitWarning, stacklevel=2)
        return self.models

    def alone(self, k: int) -> tuple[Run, Optimizer]:
        """Let one member leave, to go on in a loop of its own: its run, and an optimizer that remembers what it did."""
        part = next((part for part in self._parts if k in part.members), None)
        if part is None:
            raise GoodfitError(f"Member {k} does not go on in this stack; those that do: {listed(map(str, self.members))}.")
        self._hand_over()
        remembered = optimizer_state(part, part.members.index(k))
        self._leave([k])
        trained = [p for p in self.models[k].parameters() if p.requires_grad]
        lr = lr_at(self._lrs[k], self.runs[k]._plan.clock.step)
        optimizer = self._make(trained) if self._make else plain_optimizer(trained, lr)
        into_optimizer(optimizer, self.models[k], remembered)
        return self.runs[k], optimizer

    def state_dict(self) -> dict[str, Tensor]:
        """All that must be remembered between two steps, weights included; `load_state_dict` takes it back."""
        self._hand_over()
        return stack_state(self.runs, self._parts)

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken, in a stack of the same cocktails and models of the same kinds."""
        going = going_in(saved, self.runs, self.members)
        self._hand_over()
        self._leave([k for k in self.members if k not in going])
        load_stack(self.runs, self._parts, saved)

    def __repr__(self) -> str:
        parts = "; ".join(map(str, self._parts)) or "all have left"
        return f"Stack of {len(self.runs)} members, {len(self.members)} going on: {parts}"

    def _loss_of(self, i: int, xs: Each, ys: Each) -> Tensor:
        return self._parts[i].work.loss(xs.parts[i], ys.parts[i], xs.own[i], ys.own[i])

    def _leave(self, members: Sequence[int]) -> None:
        if not members:
            return
        gone = set(members)
        for part in self._parts:
            rows = [i for i, k in enumerate(part.members) if k not in gone]
            if len(rows) < len(part.members):
                part.keep(rows)
        self._parts = [part for part in self._parts if part.members]
        self.members = [k for k in self.members if k not in gone]

    def _hand_over(self) -> None:
        for part in self._parts:
            part.work.hand_over()

    def _of(self, part: Any, x: Any, y: Any, own: bool) -> tuple[Any, Any]:
        """The rows of an own batch that belong to the members of one part."""
        if not own or len(self._parts) == 1:
            return x, y
        at = torch.tensor([self.members.index(k) for k in part.members])
        return tree_map(lambda t: t[at.to(t.device)], x), y[at.to(y.device)]

    def _joined(self, found: Sequence[Tensor]) -> Tensor:
        """What the parts have found, in the order of the members."""
        if len(found) == 1:
            return found[0]
        places = {k: i for i, k in enumerate(k for part in self._parts for k in part.members)}
        return torch.cat(list(found))[torch.tensor([places[k] for k in self.members], device=found[0].device)]
