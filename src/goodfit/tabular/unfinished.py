"""A run folder whose training has not ended: what was asked, and its checkpoints, in RUN/training."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path

from goodfit.durable import whole_file
from goodfit.errors import GoodfitError
from goodfit.tabular.folder import RUN, TRAINING, read_json, refused
from goodfit.tabular.settings import Settings

__all__ = ["asked", "begin", "checkpoints_of", "forget"]

ASKED = "asked.json"


def begin(out: Path, table: Path, target: str, settings: Settings) -> None:
    """Make the run folder, and write down what was asked."""
    said = {"table": str(table.absolute()), "sha256": _sum(table), "target": target, "settings": asdict(settings)}
    try:
        (out / TRAINING).mkdir(parents=True)
        with whole_file(out / TRAINING / ASKED) as draft:
            draft.write_text(json.dumps(said, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as wrong:
        forget(out)
        raise refused(out, wrong) from None


def asked(out: Path) -> tuple[Path, str, Settings]:
    """The table, the target and the settings of a training that goes on; the table must be as it was."""
    if not out.is_dir():
        raise GoodfitError(f"There is no run folder {str(out)!r} to resume; fit a table first.")
    if not (out / TRAINING).is_dir() and not (out / RUN).is_file():
        raise GoodfitError(f"{str(out)!r} is no run folder; fit a table first.")
    if not (out / TRAINING).is_dir():
        raise GoodfitError(f"The training of {str(out)!r} has ended, and there is nothing to resume; fit into another --out.")
    said = read_json(out / TRAINING / ASKED)
    try:
        table, target = Path(said["table"]), str(said["target"])
        kinds = {one.name: type(one.default) for one in fields(Settings)}
        odd = said["settings"].keys() ^ kinds.keys()
        settings = Settings(**said["settings"])
        if odd or any(type(getattr(settings, name)) is not kind for name, kind in kinds.items() if kind in (int, str)):
            raise ValueError(", ".join(odd) or "its settings")
    except (KeyError, TypeError, ValueError, AttributeError) as wrong:
        raise GoodfitError(f"{out / TRAINING / ASKED} was not written by goodfit ({wrong}); fit again.") from None
    if not table.is_file():
        raise GoodfitError(f"The training of {str(out)!r} needs its table {str(table)!r}, which is not there; put it back.")
    if _sum(table) != said["sha256"]:
        raise GoodfitError(f"{str(table)!r} is no longer the table of {str(out)!r} (SHA-256 differs); fit into another --out.")
    return table, target, settings


def checkpoints_of(out: Path, network: str) -> Path:
    """Where one of the two networks is saved."""
    return out / TRAINING / network


def forget(out: Path) -> None:
    """Remove what only a training needs, and the folder where nothing else is in it."""
    shutil.rmtree(out / TRAINING, ignore_errors=True)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
