"""A run on anybody's optimizer, by torch's public step hooks: nothing in the loop has to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from goodfit.errors import GoodfitError

__all__ = ["hook", "lacking", "unwrapped"]

Closure = Callable[[], Any]


class Steps(Protocol):
    """What the hooks call while it is attached: the two phases beside an optimizer's step."""

    attached: bool

    def before_step(self, optimizer: Optimizer, redo: Closure | None) -> None: ...
    def after_step(self, optimizer: Optimizer) -> None: ...


def hook(run: Steps, optimizer: Optimizer) -> None:
    """Let `run` act before and after each step of `optimizer`; with a closure, after the closure's backward."""

    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not run.attached:
            return None
        _refuse_unscaling(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            run.before_step(optimizer, None)
            return None
        wrapped = _once(run, optimizer, closure)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

    def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if run.attached:
            run.after_step(optimizer)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def lacking(model: nn.Module, optimizers: Iterable[Optimizer]) -> str | None:
    """The first trainable parameter of the model that none of the optimizers holds."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return next((name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held), None)


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer that steps, out of a host's wrapper around it."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise GoodfitError(f"run.attach takes torch optimizers, as in run.attach(a, b), got a {type(optimizer).__name__}.")
    _refuse_shards(optimizer)
    return optimizer


def _once(run: Steps, optimizer: Optimizer, closure: Closure) -> Closure:
    calls = 0

    def wrapped() -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise GoodfitError(
                f"{type(optimizer).__name__} calls its closure several times in one step, and the regularizers would act "
                "at each; use an optimizer that calls it once."
            )
        loss = closure()
        run.before_step(optimizer, closure)
        return loss

    return wrapped


def _refuse_shards(optimizer: Optimizer) -> None:
    """A regularizer would take the norm of a part for the norm of the whole."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if any(hasattr(p, mark) for mark in ("device_mesh", "_is_flat_param", "_fsdp_flattened")):  # both generations of FSDP
            raise GoodfitError(
                f"{type(optimizer).__name__} holds shards of weights (FSDP), and a regularizer needs the whole of a weight; "
                "train under DDP, or by one process."
            )


def _refuse_unscaling(optimizer: Optimizer) -> None:
    """A fused optimizer unscales inside `step`, so a hook before it would see scaled gradients."""
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        raise GoodfitError(
            f"A fused {type(optimizer).__name__} unscales fp16 gradients inside its step, where no regularizer can act; "
            f"make it with fused=False, or train in bfloat16 without a GradScaler."
        )
