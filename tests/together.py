"""Real processes that train together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def in_two_processes(work: Callable[..., None], folder: Path) -> None:
    """Run work(rank, folder) in two processes, each on one thread in float64, joined by gloo."""
    in_processes(2, work, folder)


def in_processes(count: int, work: Callable[..., None], folder: Path) -> None:
    """The same in so many."""
    torch.multiprocessing.spawn(_member, (count, work, str(folder)), nprocs=count)


def _member(rank: int, count: int, work: Callable[..., Any], folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    store = torch.distributed.FileStore(f"{folder}/store{count}", count)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    work(rank, folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # an interpreter that ends by itself may meet threads of gloo still running, and aborts
