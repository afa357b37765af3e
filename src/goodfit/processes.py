"""The processes that train together."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from goodfit.errors import GoodfitError

__all__ = ["OutOfReach", "alike", "first_told", "gathered", "most", "rank", "refuse_apart", "summed", "together", "world"]


class OutOfReach(GoodfitError):
    """One of the processes that train together has ended, or cannot be reached."""


def rank() -> int:
    """This process among those that train together."""
    return torch.distributed.get_rank() if _together() else 0


def world() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if _together() else 1


def gathered(row: Tensor) -> Tensor:
    """The rows of all processes, (world, numbers), alike on each of them."""
    home = torch.device("cuda", torch.cuda.current_device()) if torch.distributed.get_backend() == "nccl" else row.device
    own = row.to(home)
    parts = [torch.empty_like(own) for _ in range(world())]
    torch.distributed.all_gather(parts, own)
    return torch.stack(parts).to(row.device)


def summed(*numbers: float | Tensor) -> Tensor:
    """Each number summed over all processes, in double precision."""
    home = next((n.device for n in numbers if isinstance(n, Tensor)), None)
    row = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=home) for n in numbers])
    return row if world() == 1 else gathered(row).sum(0)


def most(number: int) -> int:
    """The largest that a process has."""
    return number if world() == 1 else int(gathered(torch.tensor([number])).max())


def first_told(text: str) -> str:
    """What the first process that has something to tell says, with its number where there are several."""
    if world() == 1:
        return text
    who = int(gathered(torch.tensor([rank() if text else world()])).min())
    if who == world():
        return ""
    own = torch.tensor(list(text.encode()[:500].ljust(500)), dtype=torch.uint8)
    return f"in process {who} " + bytes(gathered(own)[who].tolist()).decode(errors="replace").rstrip()


@torch.no_grad()
def alike(tensors: Iterable[Tensor]) -> None:
    """Give all processes the numbers of the first, in place."""
    if world() > 1:
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            torch.distributed.broadcast(whole, 0)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)


def refuse_apart() -> None:
    """Refuse to train in several processes that torchrun has started and nobody has joined: each would train by itself."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and count != "1" and not _together():
        raise GoodfitError(
            f"torchrun has started {count} processes, and each would train a model of its own; join them first: "
            "torch.distributed.init_process_group()."
        )


@contextmanager
def together() -> Iterator[None]:
    """Say it in one line where another process has ended within."""
    try:
        yield
    except RuntimeError as wrong:
        if world() == 1 or (not isinstance(wrong, torch.distributed.DistError) and "gloo" not in str(wrong)):
            raise
        known = re.search("Connection [a-z ]+ by peer|[Tt]imed out", str(wrong))
        why = known[0] if known else str(wrong).strip().splitlines()[0][:100]
        raise OutOfReach(
            f"Another of the {world()} processes that train together has ended or is out of reach ({why}); look at "
            "what it said, and start all of them again."
        ) from None


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
