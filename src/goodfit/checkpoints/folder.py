"""One checkpoint on the disk: a folder of tensors and JSON, whose manifest has the SHA-256 of every file.

step-000001200/
  model.safetensors  optimizer.safetensors  ...   the tensors of each part
  state.json                                      what is no tensor
  manifest.json                                   format, size and SHA-256 of the others, SHA-256 of what it says itself
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from goodfit.checkpoints.plain import packed, unpacked
from goodfit.durable import whole_folder
from goodfit.errors import GoodfitError

__all__ = ["FORMAT", "Damaged", "read", "write"]

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"


class Damaged(Exception):
    """A checkpoint that is not what was written: the file, and what is wrong with it."""


def write(path: Path, states: Mapping[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the states of all parts, whole or not at all, in the place of what is at `path`.

    Raises: OSError, where the disk does not take them, and GoodfitError for what no checkpoint can hold.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    parts = {name: packed(state, name) for name, state in states.items()}
    with whole_folder(path, replace=True) as folder:
        for name, (_, tensors) in parts.items():
            if tensors:
                try:
                    save_file({key.removeprefix(f"{name}."): t for key, t in tensors.items()}, folder / f"{name}.safetensors")
                except SafetensorError as wrong:  # what its writer makes of a full disk
                    raise OSError(str(wrong)) from None
        said = {"about": about, "parts": {name: tree for name, (tree, _) in parts.items()}}
        (folder / STATE).write_text(json.dumps(said, allow_nan=False) + "\n")
        sizes = {one.name: one.stat().st_size for one in sorted(folder.iterdir())}
        files = {name: {"sha256": _sum(folder / name), "size": size} for name, size in sizes.items()}
        (folder / MANIFEST).write_text(_signed({"files": files, "format": FORMAT}))


def read(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The states of all parts, and what was said about them, after every byte was compared.

    Raises: Damaged; GoodfitError for a format that this version cannot read.
    """
    if path.is_symlink() or not path.is_dir():
        raise Damaged(f"{path} is no folder")
    files = _files(path)
    for name, told in files.items():
        _verify(path / name, told)
    try:
        said = json.loads((path / STATE).read_text(encoding="utf-8"))
        states = {}
        for part, tree in said["parts"].items():
            name = f"{part}.safetensors"
            if not _known(name):
                raise ValueError("a part without a name")
            states[part] = unpacked(tree, _tensors(path / name, part) if name in files else {})
            if not isinstance(states[part], dict):
                raise ValueError(f"{part} is no dict")
        return states, dict(said["about"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, MemoryError) as wrong:
        raise Damaged(f"{path / STATE} was not written by goodfit ({_line(wrong)})") from None


def _tensors(file: Path, part: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {f"{part}.{key}": t.clone() for key, t in load_file(file).items()}  # views of the file, which may go or change
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, MemoryError, SafetensorError) as wrong:
        raise Damaged(f"{file} was not written by goodfit ({_line(wrong)})") from None


def _files(path: Path) -> dict[str, Any]:
    """What the manifest says of every file; it must be, byte for byte, what would be written."""
    manifest = path / MANIFEST
    try:
        if not stat.S_ISREG(manifest.lstat().st_mode) or manifest.stat().st_size > 2**20:
            raise ValueError("no regular file, or too long")
        text = manifest.read_bytes().decode()
        said = json.loads(text)
        del said["sha256"]
        if _signed(said) != text:  # of every format, so that damage to its number is told from another format
            raise ValueError("altered")
        number = said["format"]
        if type(number) is int and number != FORMAT:
            raise GoodfitError(
                f"{path} is a checkpoint of format {number!s:.20}, and this goodfit reads {FORMAT}; resume it with the goodfit "
                "that wrote it."
            )
        files = dict(said["files"])
        if type(number) is not int or STATE not in files or not all(map(_known, files)):
            raise ValueError("altered")
        return files
    except GoodfitError:
        raise
    except FileNotFoundError:
        raise Damaged(f"{manifest} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as wrong:
        raise Damaged(f"{manifest} cannot be read ({_line(wrong)})") from None


def _verify(file: Path, told: Any) -> None:
    try:
        found = file.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise Damaged(f"{file} is no regular file")
        if found.st_size != told["size"]:
            raise Damaged(f"{file} has {found.st_size} bytes of {told['size']!r:.20}")
        if _sum(file) != told["sha256"]:
            raise Damaged(f"{file} is not what was written (SHA-256 differs)")
    except FileNotFoundError:
        raise Damaged(f"{file} is missing") from None
    except (OSError, TypeError, KeyError) as wrong:
        raise Damaged(f"{file} cannot be read ({_line(wrong)})") from None


def _known(name: str) -> bool:
    """Whether it is the name of a file that is written here, which no other place can have."""
    part, _, kind = name.partition(".")
    return name == STATE or (part.isidentifier() and kind == "safetensors" and len(name) < 256)


def _signed(said: dict[str, Any]) -> str:
    own = hashlib.sha256(json.dumps(said, allow_nan=False).encode()).hexdigest()
    return json.dumps({**said, "sha256": own}, indent=1, allow_nan=False) + "\n"


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(wrong: Exception) -> str:
    return (str(wrong).strip().splitlines() or [type(wrong).__name__])[0][:200]
