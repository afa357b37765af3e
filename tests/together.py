"""Two real processes that train together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def in_two_processes(work: Callable[..., None], folder: Path) -> None:
    """Run work(rank, folder) in two processes, each on one thread in float64, joined by gloo."""
    torch.multiprocessing.spawn(_member, (work, str(folder)), nprocs=2)


def _member(rank: int, work: Callable[..., Any], folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    work(rank, folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # an interpreter that ends by itself may meet threads of gloo still running, and aborts
