"""Reproducible randomness: noise as a pure function of (seed, name, step, call, rank).

Nothing here touches torch's global generator. So a member's masks do not depend on its stack-mates, a resumed run draws
what the uninterrupted one would have drawn, and two ranks draw apart where they should.

A generator of (name, step, call, rank) draws 32 bits a number, the same for every seed; a seed multiplies them by an odd number
of its own, modulo 2³². That is a bijection, so the numbers of one seed are as independent and as uniform as what was drawn; and
K members cost one draw and K products, which take a fiftieth of the time of a draw. Two seeds with odd factors a and b see
(u, u·b/a), points of a lattice: only where b/a is nearly a ratio of small numbers would their masks be alike, and the factors
are spread so that this is no more likely than by chance.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from goodfit.errors import GoodfitError

__all__ = ["Clock", "Noise", "Noisy", "factors", "polar", "shared_words"]

_MASK = (1 << 63) - 1
_ALL = (1 << 64) - 1


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
    draw within that step, rank the process (0 where all ranks must agree). Under vmap the seed is that of each member.
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
        text = int(self.seed).to_bytes(8, "big", signed=True) + self.salt.to_bytes(8, "big")
        return _generator(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") & _MASK, torch.device(device))

    def uniform(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Float32 numbers in [0, 1)."""
        return _uniform_of(words(self.seed, self.salt, shape, torch.device(device)))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Numbers of mean 0 and variance 1, two from each two uniform ones (Box and Muller 1958)."""
        count = math.prod(shape)
        length, angle = polar(self.uniform(2, (count + 1) // 2, device=device).to(dtype))
        return torch.cat([length * angle.cos(), length * angle.sin()])[:count].reshape(shape)

    def part(self, name: str) -> Noise:
        """Other noise for the same moment: of the second thing that one regularizer draws."""
        return replace(self, name=f"{self.name}.{name}")


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
        self.forget()

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
        return _uniform_of(words(self.seed, self._salt(), shape, device))

    def shared_words(self, shape: torch.Size, device: torch.device) -> Tensor:
        """What the next `draw` would multiply by the factor of each seed, in its place."""
        return shared_words(self._salt(), shape, device)

    def _salt(self) -> int:
        return Noise(0, self.name, self.clock.step, self._call(), self.rank).salt

    def forget(self) -> None:
        """Go on as if nothing had been drawn in this step."""
        self._begin((-1, 0))

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


def words(seed: int | Tensor, salt: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """32 random bits for each place, as int32."""
    if not torch.compiler.is_compiling():
        try:
            return shared_words(salt, shape, device) * _signed(_factor(int(seed)))
        except RuntimeError:  # under vmap a seed has no one value, and torch's own draws are refused
            pass
    return _words(torch.as_tensor(seed), salt, list(shape), device)


def shared_words(salt: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """What all seeds have in common; `factors` tell them apart."""
    count = math.prod(shape)
    drawn = torch.empty((count + 1) // 2, dtype=torch.int64, device=device)
    return drawn.random_(-(2**63), None, generator=_generator(salt, device)).view(torch.int32)[:count].view(tuple(shape))


def factors(seeds: Tensor) -> Tensor:
    """The odd number that each of these seeds multiplies the shared words by, as int32."""
    return torch.tensor([_signed(_factor(int(seed))) for seed in seeds.tolist()], dtype=torch.int32, device=seeds.device)


def polar(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Length and angle of points of two normal numbers each, from pairs in [0, 1) on the first axis (Box and Muller 1958)."""
    return (-2 * (1 - pairs[0]).log()).sqrt(), 2 * math.pi * pairs[1]  # 1 minus it is never 0


def _uniform_of(drawn: Tensor) -> Tensor:
    return (drawn.bitwise_right_shift(8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def _factor(seed: int) -> int:
    """An odd number below 2³², spread by the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    z = (seed + 0x9E3779B97F4A7C15) & _ALL
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _ALL
    return (z >> 32) | 1


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _generator(seed: int, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    return generator


@torch.library.custom_op("goodfit::shared_words", mutates_args=())
def _shared(seeds: Tensor, salt: int, shape: list[int], device: torch.device) -> Tensor:
    return shared_words(salt, shape, device)  # as an op, since torch refuses its own draws under vmap


@torch.library.custom_op("goodfit::words", mutates_args=())
def _words(seed: Tensor, salt: int, shape: list[int], device: torch.device) -> Tensor:
    return shared_words(salt, shape, device) * _signed(_factor(int(seed)))


@_words.register_fake
def _(seed: Tensor, salt: int, shape: list[int], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=device)


@_words.register_vmap
def _(
    info: object, in_dims: tuple[int | None, ...], seed: Tensor, salt: int, shape: list[int], device: torch.device
) -> tuple[Tensor, int | None]:
    if in_dims[0] is None:
        return _words(seed, salt, shape, device), None
    seeds = seed.movedim(in_dims[0], 0)
    shared, each = _shared(seeds, salt, shape, device), factors(seeds).to(device)
    return shared * each.view(-1, *(1 for _ in shape)), 0
