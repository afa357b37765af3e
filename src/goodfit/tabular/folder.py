"""The folder of a run: weights without pickle, all else as JSON; written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from goodfit.cocktail import Cocktail, parse
from goodfit.durable import discard, draft_of, synced, whole_folder
from goodfit.errors import GoodfitError, nearest
from goodfit.phases import Build
from goodfit.tabular.answers import Answers
from goodfit.tabular.encode import Encoder
from goodfit.tabular.network import mlp

__all__ = [
    "FORMAT",
    "TRAINING",
    "claim",
    "completed",
    "load_predictor",
    "read_json",
    "refused",
    "save_predictor",
    "write_json",
    "written_whole",
]

FORMAT = 1
RUN, PREPROCESSING, WEIGHTS = "run.json", "preprocessing.json", "weights.safetensors"
TRAINING = "training"


def claim(out: Path) -> None:
    """Refuse a run folder that exists, has no parent, or climbs out of where the user stands."""
    if ".." in out.parts:
        raise GoodfitError(
            f"The run folder must not climb by '..', got {str(out)!r}; give an absolute path, or one below here."
        )
    try:
        if (out / TRAINING).is_dir():
            raise GoodfitError(
                f"The training of {str(out)!r} has not ended; goodfit fit --resume {out} goes on, or give another --out."
            )
        if out.exists() or out.is_symlink():
            raise GoodfitError(f"The run folder {str(out)!r} exists already; give another --out, or remove it.")
        if not out.absolute().parent.is_dir():
            raise GoodfitError(f"The run folder {str(out)!r} needs a folder to be in, which does not exist; make it first.")
        probe = draft_of(out)
        discard(probe)  # in a container a process that was killed may have had the same number
        probe.mkdir()
        probe.rmdir()
    except OSError as wrong:
        raise GoodfitError(f"The run folder {out!s:.80} cannot be made: {wrong.strerror}; give another --out.") from None


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end; after an error nothing is left of it."""
    try:
        with whole_folder(out) as draft:
            yield draft
    except OSError as wrong:
        raise refused(out, wrong) from None


@contextmanager
def completed(out: Path) -> Iterator[Path]:
    """A folder to write into, whose files go into `out` at the end, that which makes it a run folder last of all."""
    draft = draft_of(out / "results")
    try:
        for left in out.glob(".results.*.draft"):  # of processes that were killed
            discard(left)
        draft.mkdir()
        yield draft
        (out / RUN).unlink(missing_ok=True)
        for part in sorted(draft.iterdir(), key=lambda part: part.name == RUN):
            synced(part)
            part.replace(out / part.name)
        synced(out)
    except OSError as wrong:
        raise refused(out, wrong) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refused(out: Path, wrong: OSError) -> GoodfitError:
    """What a disk that does not take a folder is told as."""
    left = f"its training is: goodfit fit --resume {out}" if (out / TRAINING).is_dir() else "nothing is left of it"
    return GoodfitError(f"The run folder {str(out)!r} cannot be written: {wrong.strerror or wrong}; {left}.")


def save_predictor(folder: Path, model: nn.Module, encoder: Encoder, answers: Answers, about: dict[str, Any]) -> None:
    """Write all that prediction needs: `about` must name the cocktail and the network."""
    from safetensors.torch import save

    (folder / WEIGHTS).write_bytes(save({name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}))
    write_json(folder / PREPROCESSING, encoder.to_json())
    sums = {name: _sum(folder / name) for name in (WEIGHTS, PREPROCESSING)}
    write_json(folder / RUN, {"format": FORMAT, **about, "answers": answers.to_json(), "sha256": sums})


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_predictor(folder: Path) -> tuple[nn.Module, Encoder, Answers, dict[str, Any]]:
    """Read it back: the network as it was fitted, its preprocessing, its target, and what `about` said."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    about = read_json(folder / RUN)
    if about.get("format") != FORMAT:
        got = about.get("format")
        raise GoodfitError(f"{folder / RUN} must have format {FORMAT}, got {got!r}; read it with the goodfit that wrote it.")
    for name in (WEIGHTS, PREPROCESSING):
        if not (folder / name).is_file() or about.get("sha256", {}).get(name) != _sum(folder / name):
            raise GoodfitError(f"{folder / name} is not the file that the fit wrote (SHA-256 differs); fit again.")
    encoder, answers = Encoder.from_json(read_json(folder / PREPROCESSING)), Answers.from_json(about.get("answers", {}))
    try:
        shape = {key: int(about["network"][key]) for key in ("inputs", "outputs", "width", "depth")}
        if not all(1 <= n <= 10**6 for n in shape.values()) or shape["depth"] > 100:
            raise ValueError(f"its sizes {shape}")
        model, cocktail = mlp(**shape), parse(about["cocktail"])
        rebuild(model, cocktail, shape["inputs"])
        model.load_state_dict(load_file(folder / WEIGHTS))
        about["threads"] = min(max(1, int(about["threads"])), 256)
        reading = about["reading"]
        if not isinstance(reading, dict) or not all(isinstance(m, str) for m in reading.get("missing", [])):
            raise ValueError("reading")
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as wrong:
        line = str(wrong).split("\n")[0][:200]
        raise GoodfitError(f"The network in {str(folder)!r} cannot be read ({line}); fit again.") from None
    return model.requires_grad_(False).eval(), encoder, answers, about


def rebuild(model: nn.Module, cocktail: Cocktail, inputs: int) -> None:
    """Insert what the cocktail inserts, so that the weights find their places."""
    import torch

    for one in cocktail.of(Build):
        one.at(0).build(model, torch.zeros(2, inputs))


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON: a number that is not finite becomes null."""
    path.write_text(json.dumps(_strict(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run folder."""
    if not path.parent.is_dir():
        siblings = [p.name for p in path.parent.absolute().parent.glob("*") if (p / RUN).exists()]
        raise GoodfitError(f"There is no run folder {str(path.parent)!r}; {nearest(path.parent.name, siblings)}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        unfinished = (path.parent / TRAINING).is_dir()
        cure = f"; its training has not ended: goodfit fit --resume {path.parent}" if unfinished else ""
        raise GoodfitError(f"{str(path.parent)!r} is not a run folder: it has no {path.name}{cure}.") from None
    except (OSError, ValueError, RecursionError) as wrong:
        raise GoodfitError(f"{path} cannot be read as JSON ({wrong}); fit again.") from None
    if not isinstance(value, dict):
        raise GoodfitError(f"{path} must hold a JSON object, got {type(value).__name__}; fit again.")
    return value
