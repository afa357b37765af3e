"""Files and folders that are there whole or not at all, also behind a kill or a loss of power."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["discard", "draft_of", "made_folder", "removed", "synced", "whole_file", "whole_folder"]


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
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to write files into, which becomes `path` at the end, with replace=True also where something is there.

    After an error nothing is left of it, and what was there is there.
    """
    draft = draft_of(path)
    try:
        draft.mkdir()
        yield draft
        for part in draft.iterdir():
            synced(part)
        synced(draft)
        if replace and os.path.lexists(path):
            _put_in_place_of(path, draft)
        else:
            draft.rename(path.absolute())
        synced(draft.parent)
        discard(_old(path))
    finally:
        discard(draft)


def _put_in_place_of(path: Path, draft: Path) -> None:
    old = _old(path)
    path.rename(old)
    try:
        draft.rename(path.absolute())
    except OSError:
        old.rename(path.absolute())
        raise


def _old(path: Path) -> Path:
    return draft_of(path.with_name(f"{path.name}.old"))


def removed(path: Path) -> None:
    """Take away what is there; half gone, it has no longer its name."""
    old = _old(path)
    path.rename(old)
    synced(old.parent)
    discard(old)


def discard(path: Path) -> None:
    """Remove a file, a link or a folder, as far as the disk lets it."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def made_folder(path: Path) -> None:
    """Make a folder, and those that it is in, so that a loss of power does not take them away with all that is in them."""
    whole = path.absolute()
    new = [one for one in (whole, *whole.parents) if not one.exists()]
    whole.mkdir(parents=True, exist_ok=True)
    for one in reversed(new):
        synced(one.parent)


def synced(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # a system on which a folder has no descriptor
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
