"""How a training step is computed: in which precision, from how many batches, compiled or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from goodfit.errors import GoodfitError
from goodfit.processes import world
from goodfit.rows import mapped

__all__ = ["Compute", "as_compute"]

PRECISIONS: dict[str, torch.dtype | None] = {"full": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """How `fit` computes its steps.

    Numbers: precision, "full" as the model is, "bf16" or "fp16" by torch's autocast, the latter with a scaled loss;
        accumulate, batches in one step, an integer >= 1, off at 1: the gradient is that of all their rows, and penalties count
        once; compile, whether steps run through torch.compile; channels_last, the memory format of models of images;
        deterministic, whether torch is held to operations that give the same bits each time.
    Errors: numbers outside their range; a precision that the device has not.

    >>> Compute(precision="bf16", accumulate=4)
    Compute(precision='bf16', accumulate=4, compile=False, channels_last=False, deterministic=False)
    """

    precision: str = "full"
    accumulate: int = 1
    compile: bool = False
    channels_last: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            known = ", ".join(map(repr, PRECISIONS))
            raise GoodfitError(f"Compute.precision must be one of {known}, got precision={self.precision!r}.")
        if type(self.accumulate) is not int or self.accumulate < 1:
            raise GoodfitError(f"Compute.accumulate must be an integer >= 1, got accumulate={self.accumulate!r}.")
        for name in ("compile", "channels_last", "deterministic"):
            if type(getattr(self, name)) is not bool:
                raise GoodfitError(f"Compute.{name} must be True or False, got {name}={getattr(self, name)!r}.")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Torch held to deterministic operations within, where that was asked."""
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        if self.deterministic:
            torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    def autocast(self, home: torch.device) -> AbstractContextManager[Any]:
        """What forwards run in."""
        kind = PRECISIONS[self.precision]
        return nullcontext() if kind is None else torch.autocast(home.type, kind)

    def scaler(self, home: torch.device) -> torch.amp.GradScaler | None:
        """What scales losses of half precision, None where none is needed."""
        return torch.amp.GradScaler(home.type) if self.precision == "fp16" else None

    def placed(self, model: nn.Module) -> nn.Module | None:
        """The model in its memory format; and wrapped, where gradients are exchanged with other processes or it is compiled."""
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        through = _exchanging(model) if world() > 1 else None
        return torch.compile(model if through is None else through) if self.compile else through  # type: ignore[return-value]

    def laid(self, x: Any) -> Any:
        """An input batch in the memory format of the model."""
        if not self.channels_last:
            return x

        def images(leaf: Any) -> Any:
            return leaf.contiguous(memory_format=torch.channels_last) if isinstance(leaf, Tensor) and leaf.ndim == 4 else leaf

        return mapped(x, images)


def as_compute(given: Any) -> Compute:
    """How steps are computed, plainly where nothing is said."""
    if given is None or isinstance(given, Compute):
        return given or Compute()
    raise GoodfitError(f"compute must be gf.Compute(...), got {given!r:.40}; for half precision gf.Compute(precision='bf16').")


def _exchanging(model: nn.Module) -> nn.Module:
    """A model whose gradients are the means of those of all processes."""
    home = next(model.parameters()).device
    lame = [name for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm) and home.type == "cpu"]
    if lame:
        raise GoodfitError(
            f"torch's SyncBatchNorm {lame[0]!r} is none for the CPU; gf.convert_batchnorm(model, 'sync') makes one."
        )
    return DistributedDataParallel(model)
