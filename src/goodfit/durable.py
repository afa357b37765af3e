"""Files and folders that are there whole or not at all, also behind a kill or a loss of power."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["draft_of", "synced", "whole_file", "whole_folder"]


def draft_of(path: Path) -> Path:
    """Where something is written that will be at `path`: beside it, for a rename within one file system."""
    whole = path.absolute()
    return whole.parent / f".{whole.name}.{os.getpid()}.draft"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` at the end; after an error nothing is left of it."""
    draft = draft_of(path)
    try:
        yield draft
        synced(draft)
        os.replace(draft, path.absolute())
        synced(draft.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write files into, which becomes `path` at the end; after an error nothing is left of it."""
    draft = draft_of(path)
    try:
        draft.mkdir()
        yield draft
        for part in draft.iterdir():
            synced(part)
        synced(draft)
        draft.rename(path.absolute())
        synced(draft.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def synced(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # a system on which a folder has no descriptor
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
