"""A run: one cocktail on one model. It owns the states and answers the eight calls of the training loop.

    run = Run(cocktail, model, loss=f)          # f(outputs, y) → mean over the rows
    x, y = run.batch(x, y)
    run.loss(x, y).backward()                   # never with a penalty in it
    run.gradient(optimizer)                     # penalties as slopes, then Gradient phases, then decay
    optimizer.step(); run.step(optimizer)
    if not run.epoch(score): break
    model = run.finish()

`run.attach(optimizer)` does `gradient` and `step` by hooks, in anybody's loop.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from goodfit.again import StepBatches, watched
from goodfit.beside import Beside
from goodfit.checks import Checks
from goodfit.cocktail import Cocktail, as_cocktail
from goodfit.errors import GoodfitError
from goodfit.hooks import hook, unwrapped
from goodfit.losses import loss_of, refuse_whole
from goodfit.noise import Noise
from goodfit.phases import Batch, Gradient, Loss, Regularizer, State
from goodfit.plan import Plan
from goodfit.processes import rank, world
from goodfit.stop.criterion import Reason
from goodfit.surgery.running import call_model
from goodfit.tensors import refuse_no_state
from goodfit.views import Views

__all__ = ["Run"]


class Run:
    """One cocktail on one model.

    cocktail: the mix, one regularizer, or its text. model: edited in place by Build regularizers, `run.model is model`.
    loss: f(outputs, y) → mean over the rows, needed for `run.loss` alone; task ("classes" or "numbers") names the usual one.
    example: an input batch for insertion, else the first batch that the model sees. seed: of all noise. keep: a file for
    the best weights, in place of memory.
    """

    def __init__(
        self,
        cocktail: Cocktail | Regularizer | str,
        model: nn.Module,
        *,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        example: Any = None,
        task: str | None = None,
        seed: int = 0,
        keep: str | Path | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise GoodfitError(f"Run takes a cocktail and a torch.nn.Module, in this order, got a {type(model).__name__}.")
        self.cocktail = as_cocktail(cocktail)
        self.model = model
        self._loss = loss if loss is not None or task is None else loss_of(task)
        self._plan = Plan(self.cocktail, model, seed, apart=keep is not None)
        self._views = Views(self._plan, keep)
        self._checks = Checks(self._plan, self._views)
        self._plan.prepare(example)
        self._beside = Beside(self._plan)
        self.attached = False
        self._seen: set[str] = set()
        self._draws = (-1, 0, 0)
        self._micro = StepBatches()

    def batch(self, x: Any, y: Tensor) -> tuple[Any, Tensor]:
        """Batch regularizers on one batch; y must hold probabilities or reals where there is one."""
        self._plan.build_if_waiting(x)
        call = self._micro_batch()
        for key, one in self._plan.of(Batch):
            if one.mixes:
                refuse_whole(y, type(one).__name__)
            x, y = one.batch(x, y, Noise(self._plan.seed, self._plan.names[key], self._plan.clock.step, call, rank()))
        self._seen.add("batch")
        return x, y

    def loss(self, x: Any, y: Tensor, *, through: nn.Module | None = None) -> Tensor:
        """Model, loss function and Loss regularizers on one batch: a scalar without penalties, to call `backward` on.

        through: the model as it was wrapped after building (DDP, torch.compile), to be run in the model's place.
        """
        if through is None and world() > 1:
            raise GoodfitError("run.loss would pass by the gradient exchange of DDP; call run.loss(x, y, through=ddp_model).")
        if self._loss is None:
            raise GoodfitError("run.loss needs a loss function: Run(cocktail, model, loss=f) or task='classes' or 'numbers'.")
        self._plan.build_if_waiting(x)
        if self.model.training and self._plan.uphill:
            x = watched(x)
        outputs = call_model(self.model if through is None else through, x)
        loss = self._loss(outputs, y)
        for _, one in self._plan.of(Loss):
            loss = one.loss(loss, outputs, y)
        self._seen.add("loss")
        if self.model.training:
            self._micro.note(self.model.parameters(), loss, x, y=y, through=through)
        return loss

    def gradient(self, optimizer: Optimizer) -> None:
        """Penalties and Gradient regularizers on `.grad`, then decoupled decay: call it between backward and step.

        With a GradScaler call `scaler.unscale_(optimizer)` before it, and neither it nor `step` where the scaler skips its
        step; `attach` sees to both.
        """
        self._refuse_attached("gradient")
        if "gradient" in self._seen and "step" not in self._seen:
            raise GoodfitError("run.step was not called in the step before; call run.step(optimizer) behind optimizer.step().")
        self.before_step(optimizer, None)
        self._seen.add("gradient")

    def step(self, optimizer: Optimizer) -> None:
        """Proximal and other steps after the optimizer's: call it behind `optimizer.step()`."""
        self._refuse_attached("step")
        if not self._beside.awaits(optimizer):
            raise GoodfitError("run.step needs run.gradient before it; call run.gradient(optimizer) ahead of optimizer.step().")
        self.after_step(optimizer)
        self._seen.add("step")

    @property
    def stopped(self) -> str:
        """Why the run does not want to go on, with numbers; "" while it does."""
        return self._checks.stopped

    @property
    def reason(self) -> Reason | None:
        """The same in one word, None while it goes on."""
        return self._checks.reason

    def view(self, batches: Any = None) -> AbstractContextManager[None]:
        """The model as a training gives it, to be scored within: averaged, with statistics of `batches`, or as it is."""
        return self._views.view(batches)

    def epoch(self, score: Any, *, train_loss: Any = None, stderr: Any = None, evidence: Any = None) -> bool:
        """Tell the validation score of an epoch, or of any check; whether to go on.

        Lower is better unless mode="max" was said. stderr: of the score; evidence: `gf.stop.evidence`; for the criteria that
        need them. Processes that train together hear one score, the mean of theirs.
        """
        others = {"train_loss": train_loss, "stderr": stderr, "evidence": evidence}
        return self._checks.hear(score, others, self._beside.optimizers)

    def go_on(self) -> None:
        """Ask anew in a training that was stopped and is run again."""
        self._checks.stopped, self._checks.reason = "", None

    def finish(self, batches: Any = None) -> nn.Module:
        """The model to keep: averages, then the best that was scored, on its weights and buffers, in place.

        batches: the training data, from which batch norms get their statistics where weights are averaged.
        """
        self._checks.refuse_end()
        self._views.finish(batches)
        return self.model

    def attach(self, *optimizers: Optimizer) -> Run:
        """Put `gradient` and `step` on the optimizers' hooks, for any loop; refuses what hooks cannot serve."""
        optimizers = tuple(map(unwrapped, optimizers))
        self._beside.join(optimizers)
        for optimizer in optimizers:
            hook(self, optimizer)
        self.attached = True
        return self

    def detach(self) -> None:
        """Act no more in the steps of the optimizers, so that another run can be attached to them."""
        self.attached = False

    def state_dict(self) -> dict[str, Tensor]:
        """All that a run must remember between two steps, as flat tensors; `load_state_dict` takes it back."""
        return {**self._checks.state_dict(), **self._plan.state_dict()}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken, on a run of the same cocktail and a model of the same weights."""
        refuse_no_state(saved)
        own = self._checks.state_dict().keys()
        self._plan.load_state_dict({name: t for name, t in saved.items() if name not in own})
        self._checks.load_state_dict({name: t for name, t in saved.items() if name in own})

    def states(self, kind: type[Any]) -> list[tuple[Any, State]]:
        """The active regularizers of one kind with their states."""
        return [(one, self._plan.states[key]) for key, one in self._plan.of(kind)]

    def penalty(self) -> float:
        """The sum of all penalties at the weights of now: what the objective has beside the loss."""
        return self._plan.penalty()

    def before_step(self, optimizer: Optimizer, redo: Callable[[], Any] | None) -> None:
        """`gradient` for the hooks; `redo` is the loop's closure, where it has one."""
        self._ready(optimizer, redo)
        within = partial(self._micro.again, self.loss)
        self._beside.before_step(optimizer, within if redo is None or self._plan.uphill else redo)

    def after_step(self, optimizer: Optimizer) -> None:
        """`step` for the hooks."""
        self._beside.after_step(optimizer)
        self._micro.forget()

    def begin_watching(self) -> None:
        """Let averages and slow weights begin anew, as behind other weights that were put into the model."""
        self._plan.begin_watching()

    def skip(self) -> None:
        """Forget the batches of a step that is not taken."""
        self._micro.forget()

    def _micro_batch(self) -> int:
        """Which batch of this step this is; a second gradient counts them once more."""
        now = (self._plan.clock.step, self._plan.clock.passes)
        self._draws = (*now, self._draws[2] + 1 if self._draws[:2] == now else 0)
        return self._draws[2]

    def _refuse_attached(self, call: str) -> None:
        if self.attached:
            raise GoodfitError(f"run.{call} acts by itself since run.attach(optimizer); remove the call.")

    def _ready(self, optimizer: Optimizer, redo: Any) -> None:
        """Refuse, at the first step, a cocktail of which a part would be dropped."""
        self._plan.refuse_waiting()
        if not any(optimizer is known for known in self._beside.optimizers):
            self._beside.meet(optimizer)
        elif not self._beside.covered:
            self._beside.cover()
        for _, one in self._plan.of(Gradient):
            if one.twice and (redo is None or one.uphill) and len(self._micro) != 1:
                closure = ("", "") if one.uphill else (" or a closure", ", or optimizer.step(closure)")
                raise GoodfitError(
                    f"{type(one).__name__} needs a second gradient, which takes one run.loss(x, y) per step (seen: "
                    f"{len(self._micro)}){closure[0]}; add: loss = run.loss(x, y){closure[1]}."
                )
        if "ready" not in self._seen:
            for phase, call, line in ((Batch, "batch", "x, y = run.batch(x, y)"), (Loss, "loss", "loss = run.loss(x, y)")):
                for _, one in self._plan.of(phase):
                    if call not in self._seen:
                        raise GoodfitError(f"{type(one).__name__} acts in run.{call}, which was not called; add: {line}")
            self._seen.add("ready")
