"""Reproducible randomness: noise as a pure function of (seed, name, step, call, rank).

Nothing here touches torch's global generator. So a member's masks do not depend on its stack-mates, a resumed run draws
what the uninterrupted one would have drawn, and two ranks draw apart where they should.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from goodfit.errors import GoodfitError

__all__ = ["Clock", "Noise", "Noisy"]

_MASK = (1 << 63) - 1


@dataclass
class Clock:
    """The time that a run shares with the layers it has inserted.

    step counts completed optimizer steps. A rewind asks for the noise of this step once more (a second gradient).
    """

    step: int = 0
    passes: int = 0

    def rewind(self) -> None:
        """Let every layer start this step's noise again."""
        self.passes += 1


@dataclass(frozen=True)
class Noise:
    """Where a piece of noise comes from; every draw from an equal value is the same.

    seed is the member's, name that of the layer or regularizer, step the completed optimizer steps, call the how-manieth
    draw within that step, rank the process (0 where all ranks must agree). A stack has a seed of shape (K,).
    """

    seed: int | Tensor
    name: str
    step: int = 0
    call: int = 0
    rank: int = 0

    @property
    def salt(self) -> int:
        """63 bits that tell every (name, step, call, rank) from the others."""
        text = f"{self.name}\0{self.step}\0{self.call}\0{self.rank}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") & _MASK

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator for draws that torch makes: `torch.randperm(n, generator=noise.generator())`."""
        return _generator(int(self.seed), self.salt, torch.device(device))

    def uniform(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Float32 numbers in [0, 1)."""
        return _draw(self.seed, self.salt, list(shape), torch.device(device))


class Noisy:
    """Mixin for a layer that draws noise: it takes name, seed and time from a run, and counts its draws within a step.

    The layer registers `seed`, a non-persistent buffer that a stack replaces by one seed per member.
    """

    seed: Tensor
    _now: tuple[int, int]
    _calls: int
    _pending: int
    _kept: int

    def bind(self, name: str, seed: int, clock: Clock, rank: int = 0) -> None:
        """Take name, seed and time from a run."""
        self.name, self.clock, self.rank = name, clock, rank
        self.seed.fill_(seed)
        self._begin((-1, 0))

    @contextmanager
    def aside(self, name: str, seed: int, clock: Clock) -> Iterator[None]:
        """Draw by other numbers for a while, then go on as if nothing had been drawn."""
        own, before = self.seed.clone(), (self.name, self.clock, self.rank, self._now, self._calls, self._pending, self._kept)
        self.bind(name, seed, clock, self.rank)
        try:
            yield
        finally:
            self.seed.copy_(own)
            self.name, self.clock, self.rank, self._now, self._calls, self._pending, self._kept = before

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def draw(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Float32 numbers in [0, 1), new ones at each call of a step; beside a compiled graph, which would hold one step's."""
        salt = Noise(0, self.name, self.clock.step, self._call(), self.rank).salt
        return _draw(self.seed, salt, list(shape), device)

    def _begin(self, now: tuple[int, int]) -> None:
        """At this time, no draw has been made, none waits for its backward, and none is kept for one."""
        self._now, self._calls, self._pending, self._kept = now, 0, 0, -1

    def _call(self) -> int:
        """Which draw of this step this is: micro-batches differ, and activation checkpointing draws again what it drew."""
        now = (self.clock.step, self.clock.passes)
        if now != self._now:
            self._begin(now)
        if torch._C._current_graph_task_id() != -1 and self._kept >= 0:
            if self._pending > 1:
                raise GoodfitError(
                    f"{self.name} ran {self._pending} times since the last backward, under activation checkpointing: its draws "
                    "cannot be told apart on recomputation; run what gets no backward under torch.no_grad(), checkpoint "
                    "another part, or give each use a layer of its own."
                )
            self._pending = 0
            return self._kept
        self._calls += 1
        if torch.is_grad_enabled() or _recomputed():
            self._pending, self._kept = self._pending + 1, self._calls - 1
        return self._calls - 1


def _recomputed() -> bool:
    """Whether code that runs without gradients will run again in backward: reentrant checkpointing, of inputs that have one."""
    frame = None if torch.compiler.is_compiling() else sys._getframe()
    while frame is not None:
        if frame.f_code.co_qualname == "CheckpointFunction.forward":  # of torch, and of others after its example
            function = frame.f_locals[frame.f_code.co_varnames[0]]
            if any(function.needs_input_grad):
                return True
        frame = frame.f_back
    return False


def _draw(seed: int | Tensor, salt: int, shape: list[int], device: torch.device) -> Tensor:
    if not torch.compiler.is_compiling():
        try:
            return torch.rand(shape, generator=_generator(int(seed), salt, device), device=device)
        except RuntimeError:  # under vmap a seed has no one value, and torch's own draws are refused
            pass
    return _uniform(torch.as_tensor(seed), salt, shape, device)


def _generator(seed: int, salt: int, device: torch.device) -> torch.Generator:
    text = seed.to_bytes(8, "big", signed=True) + salt.to_bytes(8, "big")
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") & _MASK)
    return generator


@torch.library.custom_op("goodfit::uniform", mutates_args=())
def _uniform(seed: Tensor, salt: int, shape: list[int], device: torch.device) -> Tensor:
    return torch.rand(shape, generator=_generator(int(seed), salt, device), device=device)


@_uniform.register_fake
def _(seed: Tensor, salt: int, shape: list[int], device: torch.device) -> Tensor:
    return torch.empty(shape, device=device)


@_uniform.register_vmap
def _(
    info: object, in_dims: tuple[int | None, ...], seed: Tensor, salt: int, shape: list[int], device: torch.device
) -> tuple[Tensor, int]:
    return torch.stack([_uniform(one, salt, shape, device) for one in seed.movedim(in_dims[0] or 0, 0)]), 0
