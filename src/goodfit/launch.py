"""A command that torchrun has started several times: its processes joined, one of which speaks."""

from __future__ import annotations

import hashlib
import os
import sys
from datetime import timedelta
from typing import NoReturn

__all__ = ["join", "launched", "leave", "once", "own", "speaks"]


def launched() -> bool:
    """Whether torchrun has started several processes of this command."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def speaks() -> bool:
    """Whether this is the process that tells how it goes."""
    return not launched() or os.environ["RANK"] == "0"


def once(line: str) -> bool:
    """Whether no other process has said this line: an error may be one of all, or of any of them."""
    if not launched():
        return True
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=2))
        said: int = store.add(f"goodfit/{hashlib.sha256(line.encode()).hexdigest()}", 1)
    except (DistError, RuntimeError, OSError):  # the first process, which may keep the store, has gone
        return True
    return said == 1


def join() -> None:
    """Make the processes of this command one group."""
    if launched():
        import torch

        torch.distributed.init_process_group(None if torch.cuda.is_available() else "gloo")


def own(device: str) -> str:
    """The device of this process among those of its machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if launched() and device == "cuda" else device


def leave(code: int) -> NoReturn:
    """End the process; one of several at once, since an interpreter that ends by itself may wait for threads of its group."""
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
