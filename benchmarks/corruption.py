"""Checkpoints that were damaged on the disk: what is found, and what is loaded without a word: corruption.csv.

    python benchmarks/corruption.py --mutations 10000

One mutation of one file of the newest of two checkpoints, and goodfit goes on from the one before it, says so, and has its very
bits. Beside it the same mutations of one file that torch.save wrote, read by torch.load(weights_only=True), and of one file of
safetensors. Silent means: loaded, and other numbers came out.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from table import show, write
from torch import Tensor

import goodfit as gf

Mutation = Callable[[bytearray, random.Random], bytes]


def _flipped(data: bytearray, draws: random.Random) -> bytes:
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    return bytes(data)


def _zeroed(data: bytearray, draws: random.Random) -> bytes:
    at = draws.randrange(len(data))
    data[at : at + 512] = bytes(len(data[at : at + 512]))
    return bytes(data)


def _cut(data: bytearray, draws: random.Random) -> bytes:
    return bytes(data[: draws.randrange(len(data))])


def _longer(data: bytearray, draws: random.Random) -> bytes:
    return bytes(data) + draws.randbytes(draws.randrange(1, 600))


def _overwritten(data: bytearray, draws: random.Random) -> bytes:
    at = draws.randrange(len(data))
    part = draws.randbytes(draws.randrange(1, 64))
    return bytes(data[:at]) + part + bytes(data[at + len(part) :])


def _inserted(data: bytearray, draws: random.Random) -> bytes:
    at = draws.randrange(len(data))
    return bytes(data[:at]) + draws.randbytes(1) + bytes(data[at:])


MUTATIONS: dict[str, Mutation] = {
    "bit flipped": _flipped,
    "512 bytes zeroed": _zeroed,
    "cut": _cut,
    "bytes appended": _longer,
    "bytes overwritten": _overwritten,
    "byte inserted": _inserted,
}


def state(step: int) -> dict[str, Any]:
    """What is saved: another one at each step."""
    draws = torch.Generator().manual_seed(step)
    weights = {"weight": torch.randn(20, 30, generator=draws), "bias": torch.randn(20, generator=draws)}
    return {"step": step, "history": [{"valid_loss": 0.1 * step}], **weights}


def saved(folder: Path) -> None:
    """Two checkpoints."""
    part: dict[str, Any] = {}
    saving = gf.Checkpoints(folder).watch(training=part)
    for step in (1, 2):
        part |= state(step)
        saving.save(step)
    saving.close()


def restored_step(folder: Path) -> int:
    """The step that a new training goes on from, -1 where it has other numbers than were saved."""
    part: dict[str, Any] = {}
    saving = gf.Checkpoints(folder).watch(training=part)
    try:
        step = saving.restore()
    finally:
        saving.close()
    return step if step and all(_same(part[name], value) for name, value in state(step).items()) else -1


def restored(folder: Path) -> str:
    """What comes of the newest: found (and the one before it came back), silent, or the same."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        step = restored_step(folder)
    told = [str(one.message) for one in heard]
    if step not in (1, 2):
        return "silent"
    if step == 2:
        return "the same" if not told else "wrong alarm"
    return "found" if len(told) == 1 and str(folder / "step-000000002") in told[0] else "found, and not told"


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(other, Tensor) else bool(one == other)


def mutated(file: Path, kind: str, draws: random.Random) -> bool:
    """Whether the file is another now."""
    data = file.read_bytes()
    other = MUTATIONS[kind](bytearray(data), draws)
    file.write_bytes(other)
    return other != data


def goodfit_outcome(folder: Path, kind: str, draws: random.Random) -> str:
    """One mutation of one of the files of the newest checkpoint."""
    files = sorted((folder / "step-000000002").iterdir())
    file = draws.choice(files)
    before = file.read_bytes()
    changed = mutated(file, kind, draws)
    told = restored(folder)
    file.write_bytes(before)
    return told if changed else "unchanged"


def peer_outcome(file: Path, load: Callable[[Path], dict[str, Tensor]], kind: str, draws: random.Random) -> str:
    """One mutation of the one file of a peer."""
    before, expected = file.read_bytes(), {name: t.clone() for name, t in load(file).items()}  # which may be views of the file
    changed = mutated(file, kind, draws)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load(file)
        same = found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())
        told = "the same" if same else "silent"
    except Exception:
        told = "found"
    file.write_bytes(before)
    return told if changed else "unchanged"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mutations", type=int, default=10_000)
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    given = options.parse_args()
    weights = {name: t for name, t in state(2).items() if isinstance(t, Tensor)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        saved(folder / "goodfit")
        torch.save(weights, folder / "torch.pt")
        save_file(weights, folder / "bare.safetensors")
        ways: dict[str, Callable[[str, random.Random], str]] = {
            "goodfit": lambda kind, draws: goodfit_outcome(folder / "goodfit", kind, draws),
            "torch.save": lambda kind, draws: peer_outcome(
                folder / "torch.pt", lambda file: torch.load(file, weights_only=True), kind, draws
            ),
            "safetensors": lambda kind, draws: peer_outcome(folder / "bare.safetensors", load_file, kind, draws),
        }
        for way, outcome in ways.items():
            draws = random.Random(0)
            for kind in MUTATIONS:
                counts = Counter(outcome(kind, draws) for _ in range(given.mutations // len(MUTATIONS) + 1))
                named = {name: counts.pop(name, 0) for name in ("found", "silent", "the same", "unchanged")}
                rows.append({"system": way, "mutation": kind, **named, "other": sum(counts.values())})
        shutil.rmtree(folder / "goodfit")
    show(rows)
    write(rows, str(given.out))


if __name__ == "__main__":
    main()
