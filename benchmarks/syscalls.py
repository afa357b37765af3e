"""A save, with each of its system calls failing or being the last: syscalls.csv. Needs strace, and leave to trace a child.

    python benchmarks/syscalls.py

A folder has the checkpoints of steps 1 and 2; a child saves step 3, and strace lets its n-th call fail with an error, or kills
it there, for every n. Then another process goes on: from step 3 or step 2, with the very bits, without a word of damage, and
saves again. A child that was not killed must have saved, or said in one GoodfitError that it could not.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from corruption import restored_step, saved, state
from table import show, write

import goodfit as gf

CALLS = (
    "openat",
    "mkdir",
    "write",
    "pwrite64",
    "ftruncate",
    "fsync",
    "rename",
    "renameat",
    "read",
    "getdents64",
    "unlinkat",
    "unlink",
    "rmdir",
)
FAULTS = {"ENOSPC": "error=ENOSPC", "EIO": "error=EIO", "EINTR": "error=EINTR", "killed": "signal=KILL"}


def save(folder: Path, said: Path) -> None:
    """What the child does, once it is traced."""
    part: dict[str, Any] = {}
    saving = gf.Checkpoints(folder).watch(training=part)
    saving.restore()
    part |= state(3)
    told = os.open(said, os.O_CREAT | os.O_WRONLY)
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        saving.save(3)
        line = b"saved"
    except gf.GoodfitError:
        line = b"refused"
    except BaseException as wrong:
        line = type(wrong).__name__.encode()
    os.kill(os.getpid(), signal.SIGSTOP)  # from here on it is no longer traced
    os.write(told, line)
    os._exit(0)


def traced(folder: Path, *options: str) -> tuple[str, str]:
    """What the child said, and what strace saw."""
    said = folder / "said"
    process = os.fork()
    if not process:
        save(folder / "saved", said)
    os.waitpid(process, os.WUNTRACED)
    watch = subprocess.Popen(["strace", "-f", "-p", str(process), *options], stderr=subprocess.PIPE, text=True)
    assert watch.stderr is not None
    if "attached" not in watch.stderr.readline():
        os.kill(process, signal.SIGKILL)
        sys.exit("strace may not trace a child here; nothing was measured.")
    os.kill(process, signal.SIGCONT)
    while True:
        _, status = os.waitpid(process, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            break
        watch.terminate()
        seen = watch.communicate()[1]
        os.kill(process, signal.SIGCONT)
    if os.WIFSIGNALED(status):
        seen = watch.communicate()[1]
    return (said.read_text() if said.exists() else "") or "died", seen


def saved_again(folder: Path) -> None:
    """Another training saves there, and a third one finds it, whole."""
    part: dict[str, Any] = {}
    saving = gf.Checkpoints(folder).watch(training=part)
    saving.restore()
    part |= state(9)
    saving.save(9)
    saving.close()
    if restored_step(folder) != 9 or list(folder.glob("*.draft")):
        raise gf.GoodfitError("what is saved behind it is not whole, or something is left over")


def outcome(folder: Path, call: str, fault: str, number: int) -> str:
    """One call with one fault."""
    shutil.rmtree(folder / "saved", ignore_errors=True)
    (folder / "said").unlink(missing_ok=True)
    saved(folder / "saved")
    told, _ = traced(folder, "-e", f"trace={call}", "-e", f"inject={call}:{FAULTS[fault]}:when={number}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", gf.GoodfitWarning)
        try:
            step = restored_step(folder / "saved")
            saved_again(folder / "saved")
        except (gf.GoodfitError, gf.GoodfitWarning) as wrong:
            return f"{told}, then {wrong}"
    return f"{told}, goes on from {step}" if told in ("saved", "refused", "died") else told


def main() -> None:
    if shutil.which("strace") is None:
        sys.exit("strace is not here; nothing was measured.")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        saved(folder / "saved")
        _, seen = traced(folder, "-e", f"trace={','.join(CALLS)}")
        counts = Counter(re.findall(r"^(?:\[pid +\d+\] )?(\w+)\(", seen, re.MULTILINE))
        for call in CALLS:
            for fault in FAULTS if counts[call] else ():
                found = Counter(outcome(folder, call, fault, n + 1) for n in range(counts[call]))
                names = ("saved, goes on from 3", "refused, goes on from 2", "refused, goes on from 3")
                named = {name: found.pop(name, 0) for name in (*names, "died, goes on from 2", "died, goes on from 3")}
                rows.append({"call": call, "fault": fault, "times": counts[call], **named, "other": sum(found.values())})
                for line in found:
                    print(line, file=sys.stderr)
    show(rows)
    write(rows, __file__)


if __name__ == "__main__":
    main()
