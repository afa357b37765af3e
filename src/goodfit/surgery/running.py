"""Run a model on an example and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from goodfit.errors import GoodfitError

__all__ = ["call_model", "evaluating", "must_run", "quiet", "seeded", "training"]


def call_model(model: nn.Module, x: Any) -> Any:
    """Run a model on one input batch: a dict goes in as keywords, a tuple as positions, else as it is."""
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; every submodule gets its own mode back, whatever happens."""
    with _modes_kept(model):
        model.eval()
        yield


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Put a model that is in eval mode into train mode, and leave one in train mode as it is, frozen parts and all."""
    with _modes_kept(model):
        if not model.training:
            model.train()
        yield


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Random generators that begin by this seed, where the model is, and are put back."""
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in cuda)):
            generator.manual_seed(seed)  # torch.manual_seed notes where it was called from for devices that are not there
        yield


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and a random generator that starts the same each time and is put back."""
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(seeded(model, 0))
        kept = [(b, b.clone()) for b in model.buffers()]  # a forward may count in them
        try:
            yield
        finally:
            for buffer, before in kept:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def must_run(model: nn.Module, error: Exception) -> GoodfitError:
    """What to say of a model that failed on its example."""
    first = (str(error).strip().splitlines() or [""])[0]
    return GoodfitError(
        f"{type(model).__name__} must run on the example in eval mode, got {type(error).__name__}: {first}; give one "
        "input batch as the model takes it: a tensor, a tuple of positions or a dict of keywords."
    )
