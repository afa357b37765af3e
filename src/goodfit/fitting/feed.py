"""The batches of a training, epoch by epoch, found again where it was saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from goodfit.checkpoints.randomness import Randomness
from goodfit.errors import GoodfitError
from goodfit.fitting.data import order_of
from goodfit.processes import summed, world
from goodfit.rows import rows_of

__all__ = ["Feed", "digest", "generators", "in_step", "persistent"]


class Feed:
    """Iterate for the batches of an epoch; `state_dict` between two of them says where it is. over: whether it has ended.

    An epoch is found again by beginning it with the generators as they were, and drawing its batches up to there once more:
    this serves every loader whose order and augmentation come from generators. number: of the epoch, from 1.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.number, self.done, self.over = 0, 0, True
        self._randomness = Randomness(*generators(batches))
        self._began: dict[str, Any] = {}
        self._last: Any = None
        self._saved: Mapping[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        saved, self._saved = self._saved, None
        if saved is None:
            self.number, self.done, self.over = self.number + 1, 0, False
        batches = self._beginning() if saved is None else self._rest(saved)
        for batch in batches:
            self.done, self._last = self.done + 1, batch
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Which epoch this is, how it began, and how many of its batches are over."""
        if self._saved is not None:  # no batch has been asked for yet
            return dict(self._saved)
        last = digest(self._last) if self.done and not self.over else ""
        return {"number": self.number, "done": self.done, "over": self.over, "last": last, **self._began}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on there when the next batch is asked for."""
        self.number, self.done, self.over = saved["number"], saved["done"], saved["over"]
        order = order_of(self.batches)
        if order is not None and "order" in saved:
            order.epoch = saved["order"] + 1
        self._began = {name: saved[name] for name in ("order", "generators") if name in saved}
        self._saved = None if self.over else saved
        self._last = None

    def adopt(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where other processes than there are now were: all batches are shared anew."""
        if order_of(self.batches) is None and not states[0]["over"]:
            raise GoodfitError(
                f"The training was saved in the middle of an epoch by {len(states)} processes, and its loader gives "
                f"others to {world()}; start {len(states)}."
            )
        self.load_state_dict({**states[0], "last": "", "generators": self._randomness.state_dict()})

    def _beginning(self) -> Iterator[Any]:
        order = order_of(self.batches)
        self._began = {"order": 0 if order is None else order.epoch, "generators": self._randomness.state_dict()}
        for sampler in _samplers(self.batches):
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(self.number - 1)
        return iter(self.batches)

    def _rest(self, saved: Mapping[str, Any]) -> Iterator[Any]:
        now, order = self._randomness.state_dict(), order_of(self.batches)
        self._randomness.load_state_dict(saved["generators"])
        if order is not None:
            order.epoch = saved["order"]
        batches = self._beginning()
        last = next(islice(batches, self.done - 1, None), None)
        if last is None or digest(last) != (saved["last"] or digest(last)):
            raise GoodfitError(
                f"The training was saved behind batch {self.done} of epoch {self.number}, and train gives another one there: "
                "give the same data, in an order that comes from a generator (a sampler that has a state of its own cannot be "
                "resumed; targets that are drawn anew can be where workers draw them)."
            )
        self._randomness.load_state_dict(now)
        self._last = last
        return batches


def in_step(batches: Iterable[Any]) -> Iterator[tuple[Any, int]]:
    """The batches of an epoch with their rows, of all processes together; they must come to an end together."""
    for batch in batches:
        rows = rows_of(batch[1]) or 1
        if world() > 1:
            total, there = summed(rows, 1).tolist()
            _refuse_alone(there)
            rows = int(total)
        yield batch, rows
    if world() > 1:
        _refuse_alone(float(summed(0, 0)[1]))


def _refuse_alone(there: float) -> None:
    if 0 < there < world():
        raise GoodfitError(
            f"train ends before its batch for some of the {world()} processes; give each as many (DistributedSampler does)."
        )


def persistent(batches: Any) -> bool:
    """Whether its workers stay from one epoch to the next, and cannot begin one anew."""
    return bool(getattr(_loader(batches), "persistent_workers", False))


def generators(*loaders: Any) -> list[torch.Generator]:
    """The generators that loaders have of their own, each once."""
    found = (getattr(owner, "generator", None) for one in loaders for owner in (_loader(one), *_samplers(one)))
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def _loader(batches: Any) -> Any:
    """The loader behind batches that were merged."""
    return getattr(batches, "loader", batches)


def _samplers(batches: Any) -> list[Any]:
    """All that may decide on an order."""
    ones = [getattr(_loader(batches), name, None) for name in ("sampler", "batch_sampler")]
    return [one for one in (*ones, *(getattr(one, "sampler", None) for one in ones)) if one is not None]


def digest(batch: Any) -> str:
    """What tells the targets of one batch from those of another."""
    y = torch.as_tensor(batch[1]).detach().cpu().contiguous()
    return hashlib.sha256(_bytes(y)).hexdigest()


def _bytes(y: Tensor) -> bytes:
    return f"{y.dtype} {tuple(y.shape)}".encode() + y.reshape(-1).view(torch.uint8).numpy().tobytes()
