"""One training writes into a folder at a time; the lock ends with the process, however that ends."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

from goodfit.errors import GoodfitError

__all__ = ["Lock"]

_fcntl: Any
try:
    import fcntl as _fcntl
except ImportError:  # a system without it
    _fcntl = None


class Lock:
    """A lock of this process on a folder. Its children, such as loader workers that outlive it, do not hold it."""

    def __init__(self, folder: Path) -> None:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            if _fcntl is not None:
                _fcntl.lockf(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise GoodfitError(
                f"Another process writes checkpoints into {str(folder)!r}; wait for it, end it, or give another folder."
            ) from None
