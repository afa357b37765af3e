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


class _Held:
    """An open file with the lock, until nothing refers to it."""

    def __init__(self, folder: Path) -> None:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        close = weakref.finalize(self, os.close, descriptor)
        try:
            if _fcntl is not None:
                _fcntl.lockf(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            close()
            raise GoodfitError(
                f"Another process writes checkpoints into {str(folder)!r}; wait for it, end it, or give another folder."
            ) from None


_HELD: weakref.WeakValueDictionary[tuple[int, int, int], _Held] = weakref.WeakValueDictionary()


class Lock:
    """A lock of this process on a folder. Its children, such as loader workers that outlive it, do not hold it."""

    def __init__(self, folder: Path) -> None:
        place = folder.stat()
        key = os.getpid(), place.st_dev, place.st_ino
        held = _HELD.get(key)  # a process that closes any descriptor of the file loses its lock, so it has but one
        if held is None:
            held = _HELD[key] = _Held(folder)
        self._held: _Held | None = held

    def release(self) -> None:
        """Let go; the last one of this process lets others in."""
        self._held = None
