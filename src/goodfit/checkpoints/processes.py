"""Checkpoints of processes that train together: the first one writes and reads, and each has its own generators."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from goodfit.checkpoints.plain import packed, unpacked
from goodfit.errors import GoodfitError
from goodfit.processes import gathered, rank, world

__all__ = ["OfEach", "on_first"]


def on_first(act: Callable[[], Any]) -> Any:
    """What the first process makes of it, plain data, given to all of them; an error there is one of all."""
    if world() == 1:
        return act()
    told: dict[str, Any] = {}
    wrong: Exception | None = None
    if rank() == 0:
        try:
            told = {"value": act()}
        except Exception as error:
            told, wrong = {"error": str(error) or type(error).__name__}, error
    told = _from_first(told)
    if wrong is not None:
        raise wrong
    if "error" in told:
        raise GoodfitError(told["error"])
    return told["value"]


class OfEach:
    """A part whose state differs from process to process. `collect`, in all of them, goes ahead of what the first one saves."""

    def __init__(self, part: Any) -> None:
        self.part = part
        self._collected: list[Any] = []

    def collect(self) -> None:
        """Hand the state of every process to the first, for one save."""
        self._collected = _from_all(self.part.state_dict())

    def forget(self) -> None:
        """Behind that save."""
        self._collected = []

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes, in their order; before `collect` that of this one in the place of each."""
        return {"processes": self._collected or [self.part.state_dict()] * world()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take the own one back; of a training of more processes or fewer the part takes what it can use."""
        states = saved["processes"]
        if len(states) == world():
            self.part.load_state_dict(states[rank()])
        else:
            self.part.adopt(states)


def _from_first(value: Any) -> Any:
    """Plain data of the first process."""
    own = _to_bytes(value)
    length = torch.tensor([len(own)])
    length = gathered(length)[0]
    home = _home()
    whole = own.to(home) if rank() == 0 else torch.empty(int(length), dtype=torch.uint8, device=home)
    torch.distributed.broadcast(whole, 0)
    return value if rank() == 0 else _of_bytes(whole.cpu())


def _from_all(value: Any) -> list[Any]:
    """Plain data of every process."""
    if world() == 1:
        return [value]
    own = _to_bytes(value)
    lengths = gathered(torch.tensor([len(own)]))[:, 0].tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(own)] = own
    return [_of_bytes(row[:length]) for row, length in zip(gathered(padded), lengths, strict=True)]


def _home() -> torch.device:
    nccl = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _to_bytes(value: Any) -> Tensor:
    """Plain data as one row of bytes: how long its tree is, the tree as JSON, its tensors as safetensors."""
    from safetensors.torch import save

    tree, tensors = packed(value, "value")
    text = json.dumps(tree).encode()
    return torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text + save(tensors)), dtype=torch.uint8)


def _of_bytes(row: Tensor) -> Any:
    from safetensors.torch import load

    data = row.numpy().tobytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return unpacked(json.loads(data[8:end]), load(data[end:]))
