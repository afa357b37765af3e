"""Checkpoints on a machine that dies, a disk that is full or fails, files that are damaged or made to deceive."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from corruption import MUTATIONS, mutated, restored, restored_step, saved, state
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import goodfit as gf
from bits import bits
from goodfit.checkpoints import folder as format_
from goodfit.durable import draft_of
from goodfit.tabular.folder import claim, completed

CALLS = [(os, name) for name in ("fsync", "open", "mkdir", "rename", "replace", "rmdir", "unlink", "listdir", "scandir")]
FILES_WRITTEN: list[tuple[Any, str]] = [(safetensors.torch, "save_file"), (Path, "write_text")]
CALLS += FILES_WRITTEN


class Fault:
    """Something that happens at the n-th call that touches the disk, and, where it lasts, at all behind it."""

    def __init__(self, at: int, act: Callable[[Any], None], *, lasts: bool = False, of: Any = CALLS) -> None:
        self.at, self.act, self.lasts, self.calls, self.of = at, act, lasts, 0, of

    def __enter__(self) -> Fault:
        self.kept = [(owner, name, getattr(owner, name)) for owner, name in self.of]
        for owner, name, call in self.kept:
            setattr(owner, name, self._faulty(call))
        return self

    def __exit__(self, *wrong: object) -> None:
        for owner, name, call in self.kept:
            setattr(owner, name, call)

    def _faulty(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **names: Any) -> Any:
            self.calls += 1
            if self.calls == self.at or (self.lasts and self.calls > self.at):
                if call is safetensors.torch.save_file or call.__name__ == "save_file":
                    Path(args[1]).touch()  # a file that is there, with nothing in it
                self.act(call)
            return call(*args, **names)

        return called


def failing(number: int) -> Callable[[Any], None]:
    def act(call: Any) -> None:
        raise OSError(number, os.strerror(number))

    return act


def training(folder: Path) -> tuple[Any, dict[str, Any]]:
    part: dict[str, Any] = {}
    saving = gf.Checkpoints(folder).watch(training=part)
    saving.restore()
    return saving, part


def step_of(folder: Path) -> int:
    """The checkpoint that a new process goes on from, whole to the bit, with nothing damaged left behind."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", gf.GoodfitWarning)
        return restored_step(folder)


def whole(folder: Path) -> set[int]:
    """The steps whose checkpoints are whole."""
    found = set()
    for path in folder.glob("step-*"):
        with suppress(format_.Damaged):
            format_.read(path)
            found.add(int(path.name[5:]))
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def goes_on(folder: Path) -> None:
    """Saves are taken again, and nothing is left over."""
    saving, part = training(folder)
    for step in (8, 9):
        part.clear()
        part |= state(step)
        saving.save(step)
    saving.close()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "step-000000008", "step-000000009"]
    assert step_of(folder) == 9


def calls_of_a_save(folder: Path) -> int:
    saved(folder)
    saving, part = training(folder)
    part |= state(3)
    with Fault(0, failing(0)) as counted:
        saving.save(3)
    saving.close()
    return counted.calls


def test_a_process_that_dies_at_any_call_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    found = set()
    for at in range(1, calls_of_a_save(tmp_path / "count") + 1):
        folder = tmp_path / str(at)
        saved(folder)
        process = os.fork()
        if not process:
            saving, part = training(folder)
            part |= state(3)
            with Fault(at, lambda call: os._exit(9)):
                saving.save(3)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
        found.add(step_of(folder))
        goes_on(folder)
    assert found == {2, 3}


SAVES = (1, 2, 3, 4)


def saves(folder: Path, tell: int) -> None:
    """A training of four saves in a new folder, which tells of each that it has behind it."""
    saving, part = training(folder)
    for step in SAVES:
        part.clear()
        part |= state(step)
        saving.save(step)
        os.write(tell, bytes([step]))


def test_a_process_that_dies_at_any_call_of_several_saves_loses_none_that_was_done(tmp_path: Path) -> None:
    nobody = os.open(os.devnull, os.O_WRONLY)
    with Fault(0, failing(0)) as counted:
        saves(tmp_path / "count" / "new", nobody)
    os.close(nobody)
    assert counted.calls > 60
    for at in range(1, counted.calls + 1):
        folder = tmp_path / str(at) / "new"
        hear, tell = os.pipe()
        process = os.fork()
        if not process:
            with Fault(at, lambda call: os._exit(9)):
                saves(folder, tell)
            os._exit(0)
        os.close(tell)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
        done = max(os.read(hear, 9), default=0)
        os.close(hear)
        folder.mkdir(parents=True, exist_ok=True)
        saving, part = training(folder)
        assert saving.step in (done, done + 1)
        assert bits({name: part.get(name) for name in state(1)} if saving.step else part) == bits(
            state(saving.step) if saving.step else {}
        )
        saving.close()
        goes_on(folder)


@pytest.mark.filterwarnings("always::goodfit.GoodfitWarning")
@pytest.mark.parametrize("lasts", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_disk_that_fails_at_any_call_loses_no_checkpoint(number: int, lasts: bool, tmp_path: Path) -> None:
    refusals = 0
    for at in range(1, calls_of_a_save(tmp_path / "count") + 1):
        folder = tmp_path / str(at)
        saved(folder)
        before = bytes_of(folder)
        saving, part = training(folder)
        part |= state(3)
        told = ""
        with warnings.catch_warnings(record=True) as heard, Fault(at, failing(number), lasts=lasts):
            try:
                saving.save(3)
            except gf.GoodfitError as wrong:
                told = str(wrong)
        if told:
            refusals += 1
            where = re.escape(repr(str(folder)))
            assert re.match(rf"The checkpoint cannot be (written into|sought in) {where}: {os.strerror(number)}; those", told)
            assert "\n" not in told
            assert not heard
            now = bytes_of(folder)
            assert all(now[name] == data for name, data in before.items())
            had = whole(folder)
            for again in range(1, 30):  # the same save, tried again on a disk that fails before long
                try:
                    with Fault(again, failing(number), lasts=lasts):
                        saving.save(3)
                except gf.GoodfitError:
                    replaced = {3} if lasts else set()  # where the disk fails for good between the two renames
                    assert had - replaced <= whole(folder)
                else:
                    break
            assert len(whole(folder)) >= 2
        else:
            assert max(whole(folder)) == saving.step == 3
            assert all("is no longer needed and cannot be removed" in str(one.message) for one in heard)
            assert len(heard) <= 1
        saving.close()
        assert step_of(folder) in (2, 3)
        goes_on(folder)
    assert refusals > 10


def test_an_old_checkpoint_that_cannot_be_removed_is_told_and_stops_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = gf.Checkpoints(tmp_path, every=1).watch(training=(part := state(1)))
    rename, stuck = os.rename, {"step-000000001", "step-000000003"}

    def rename_some(old: Any, new: Any) -> None:
        if Path(old).name in stuck:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        rename(old, new)

    monkeypatch.setattr(os, "rename", rename_some)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for step in range(1, 8):
            part.update(state(step))
            assert saving(step)
    assert len(heard) == 5  # one for each save from the third on
    assert all("is no longer needed and cannot be removed: Permission denied; remove it" in str(one.message) for one in heard)
    assert whole(tmp_path) == {1, 3, 6, 7}
    stuck.remove("step-000000001")  # which goes, though the one before it in the row does not
    with pytest.warns(gf.GoodfitWarning, match="step-000000003 is no longer needed"):
        saving.save(8)
    assert whole(tmp_path) == {3, 7, 8}
    stuck.clear()
    saving.save(9)
    assert whole(tmp_path) == {8, 9}


def test_a_full_disk_is_told_and_the_training_goes_on(tmp_path: Path) -> None:
    saved(tmp_path)
    files = sorted((tmp_path / "step-000000002").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert [file.name for file in files] == ["training.safetensors", "randomness.safetensors", "state.json", "manifest.json"]
    cases = [(at, limit) for at, file in enumerate(files, 1) for limit in (0, 1, 100, file.stat().st_size - 1)]
    process = os.fork()
    if not process:
        code = 1
        try:
            saving, part = training(tmp_path)
            before = bytes_of(tmp_path)
            free = resource.RLIM_INFINITY
            part |= state(3)
            for at, limit in cases:

                def full(call: Any, limit: int = limit) -> None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free))

                with warnings.catch_warnings(record=True) as heard, Fault(at, full, of=FILES_WRITTEN):
                    warnings.simplefilter("always")
                    saving._cost = 0.0
                    assert saving(3) is False
                resource.setrlimit(resource.RLIMIT_FSIZE, (free, free))
                told = [str(one.message) for one in heard]
                assert len(told) == 1
                assert "File too large" in told[0]
                assert told[0].endswith("as they were. The training goes on without this checkpoint.")
                assert bytes_of(tmp_path) == before
            saving._cost = 0.0
            assert saving(3)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert step_of(tmp_path) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-000000002", "step-000000003"]


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    saving = gf.Checkpoints(tmp_path).watch(training={})
    with (
        Fault(1, failing(errno.EIO), of=[(os, "listdir")]),
        pytest.raises(
            gf.GoodfitError, match=r"cannot be sought in .*: Input/output error; those that are there are as they were"
        ),
    ):
        saving.restore()
    assert saving.restore() == 2


def test_a_new_folder_is_forced_to_the_disk_in_all_that_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of power would take away a folder whose name is not on the disk, with all checkpoints that are."""
    forced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda one: (forced.add(os.fstat(one).st_ino), fsync(one))[1])
    gf.Checkpoints(tmp_path / "a" / "b").watch(training={})
    assert {tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino} <= forced


def test_all_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_oldest_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    events: list[Any] = []
    fsync, rename = os.fsync, os.rename

    def watched(old: Any, new: Any) -> None:
        old, new = Path(old), Path(new)
        inside = {one.stat().st_ino for one in (old, *old.iterdir())} if old.is_dir() else set()
        rename(old, new)
        events.append((old.name[:14], new.name[:14], inside))

    monkeypatch.setattr(os, "fsync", lambda one: (events.append(os.fstat(one).st_ino), fsync(one))[1])
    monkeypatch.setattr(os, "rename", watched)
    saving, part = training(tmp_path)
    part |= state(3)
    events.clear()
    saving.save(3)
    (placed, inside), (taken, _) = [(at, one[2]) for at, one in enumerate(events) if isinstance(one, tuple)]
    assert events[placed][:2] == (".step-00000000", "step-000000003")
    assert events[taken][:2] == ("step-000000001", ".step-00000000")
    assert len(inside) == 5
    assert inside <= set(events[:placed])
    assert tmp_path.stat().st_ino in events[placed:taken]
    assert tmp_path.stat().st_ino in events[taken:]


def test_drafts_of_processes_that_were_killed_are_in_nobodys_way(tmp_path: Path) -> None:
    """In a container the next process may have the same number."""
    saved(tmp_path / "saved")
    out = tmp_path / "run"
    step = tmp_path / "saved" / "step-000000008"
    for left in (step.with_name(f".{step.name}.1.draft"), draft_of(step), draft_of(out)):
        left.mkdir()
        (left / "state.json").touch()
    goes_on(tmp_path / "saved")
    claim(out)
    out.mkdir()
    for left in (out / ".results.1.draft", draft_of(out / "results")):
        left.mkdir()
        (left / "run.json").touch()
    with completed(out) as draft:
        (draft / "run.json").write_text("{}")
    assert [path.name for path in tmp_path.glob(".*")] == []
    assert [path.name for path in out.iterdir()] == ["run.json"]


def test_a_training_keeps_its_lock_where_the_same_process_looks_in(tmp_path: Path) -> None:
    """POSIX takes the lock from a process that closes any descriptor of the file."""
    writing = gf.Checkpoints(tmp_path).watch(a=[1])
    gf.Checkpoints(tmp_path).watch(a=[1]).close()
    for expected in (3, 0):
        process = os.fork()
        if not process:
            code = 0
            try:
                gf.Checkpoints(tmp_path).watch(a=[1])
            except gf.GoodfitError:
                code = 3
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == expected
        writing.close()


def falls_back(folder: Path, file: Path) -> None:
    """To the very bits of the checkpoint before, with one warning that names the file; where there is none, with one error."""
    part: dict[str, Any] = {}
    saving = gf.Checkpoints(folder).watch(training=part)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert saving.restore() == 1
    assert bits(part) == bits(state(1))
    (told,) = [str(one.message) for one in heard]
    assert told.startswith(str(file))
    assert told.endswith("; the checkpoint before it is tried.")
    assert "\n" not in told
    older = folder / "step-000000001"
    older.rename(folder / "aside")
    part |= {"mine": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gf.GoodfitWarning)
        with pytest.raises(gf.GoodfitError, match=r"No checkpoint in .* is whole"):
            saving.restore()
    assert bits(part) == bits(state(1) | {"mine": 1})
    (folder / "aside").rename(older)
    saving.close()


NAMES = ("manifest.json", "randomness.safetensors", "state.json", "training.safetensors")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MUTATIONS)
def test_damage_anywhere_is_found_and_the_checkpoint_before_it_taken(kind: str, name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    file, draws, changed = tmp_path / "step-000000002" / name, random.Random(f"{kind} of {name}"), 0
    assert sorted(one.name for one in file.parent.iterdir()) == list(NAMES)
    before = file.read_bytes()
    for _ in range(40):
        if mutated(file, kind, draws):
            changed += 1
            falls_back(tmp_path, file)
        file.write_bytes(before)
    assert changed > 30
    assert step_of(tmp_path) == 2


def test_each_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """Also those of the number of the format, which must not read as another format."""
    saved(tmp_path)
    manifest = tmp_path / "step-000000002" / "manifest.json"
    data = manifest.read_bytes()
    for at in range(len(data) * 8):
        manifest.write_bytes(data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :])
        with pytest.raises(format_.Damaged):
            format_.read(manifest.parent)


HEADERS = {"the length of the header": range(8), "the header": range(8, 200), "the numbers": range(-400, -1)}


@pytest.mark.parametrize("place", HEADERS)
@pytest.mark.parametrize("name", ["training.safetensors", "randomness.safetensors"])
def test_each_place_of_a_file_of_tensors_counts(name: str, place: str, tmp_path: Path) -> None:
    saved(tmp_path)
    file, draws = tmp_path / "step-000000002" / name, random.Random(0)
    before = file.read_bytes()
    for at in draws.sample(HEADERS[place], 8):
        data = bytearray(before)
        data[at] ^= 1 << draws.randrange(8)
        file.write_bytes(data)
        falls_back(tmp_path, file)


def test_files_that_are_missing_or_of_another_checkpoint_are_found(tmp_path: Path) -> None:
    saved(tmp_path)
    old, new = tmp_path / "step-000000001", tmp_path / "step-000000002"
    for name in NAMES:
        before = (new / name).read_bytes()
        (new / name).unlink()
        falls_back(tmp_path, new / name)
        if name != "randomness.safetensors":  # nothing was drawn between the two
            (new / name).write_bytes((old / name).read_bytes())
            falls_back(tmp_path, new / ("state.json" if name == "manifest.json" else name))
        (new / name).write_bytes(before)
    one, other = new / "randomness.safetensors", new / "training.safetensors"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    falls_back(tmp_path, one)


def test_an_older_checkpoint_in_the_place_of_the_newest_is_found(tmp_path: Path) -> None:
    saved(tmp_path)
    new = tmp_path / "step-000000002"
    shutil.rmtree(new)
    shutil.copytree(tmp_path / "step-000000001", new)
    falls_back(tmp_path, new)


def test_what_is_damaged_goes_before_what_is_whole(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "step-000000002" / "state.json").write_text("{}")
    with pytest.warns(gf.GoodfitWarning, match="has 3 bytes|has 2 bytes"):
        saving, part = training(tmp_path)
    part |= state(5)
    saving.save(5)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000001", "step-000000005"]
    assert whole(tmp_path) == {1, 5}


def test_steps_that_are_taken_back_are_not_gone_on_from(tmp_path: Path) -> None:
    part: dict[str, Any] = {}
    saving = gf.Checkpoints(tmp_path).watch(training=part)
    for step in (3, 7, 5):
        part |= state(step)
        saving.save(step)
    assert whole(tmp_path) == {3, 5}
    assert step_of(tmp_path) == 5


def test_where_none_is_whole_nothing_is_loaded(tmp_path: Path) -> None:
    saved(tmp_path)
    for folder in tmp_path.glob("step-*"):
        (folder / "state.json").write_text("{}")
    part: dict[str, Any] = {"mine": 1}
    saving = gf.Checkpoints(tmp_path).watch(training=part)
    with (
        pytest.warns(gf.GoodfitWarning, match="has 2 bytes of"),
        pytest.raises(gf.GoodfitError, match=r"No checkpoint in .* is whole"),
    ):
        saving.restore()
    assert part == {"mine": 1}


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('a file was executed')",)


def signed(folder: Path) -> None:
    """Make the manifest say what is there, as one would who wants to deceive."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json":
            regular = path.is_file() and not path.is_symlink()
            data = path.read_bytes() if regular else b""
            files[path.name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "manifest.json").write_text(format_._signed({"files": files, "format": format_.FORMAT}))


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def deep(levels: int) -> str:
    return '{"about": {"step": 2}, "parts": {"training": ' + '{"dict": {"value": ' * levels + "1" + "}}" * levels + "}}"


MANY = json.dumps({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}).encode()
FILES: dict[str, tuple[str, bytes]] = {
    "a pickle for tensors": ("training.safetensors", pickle.dumps(Bomb())),
    "a pickle for the state": ("state.json", pickle.dumps(Bomb())),
    "a header of 2**60 bytes": ("training.safetensors", header(b"{}", 2**60)),
    "a header of 100,000 names": ("training.safetensors", header(MANY)),
    "overlapping tensors": (
        "training.safetensors",
        header(json.dumps({n: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for n in "ab"}).encode()) + bytes(4),
    ),
    "a state 100,000 levels deep": ("state.json", deep(100_000).encode()),
    "a state 2,000 levels deep": ("state.json", deep(2_000).encode()),
    "no state": ("state.json", b"[]"),
    "a kind that is none": ("state.json", b'{"about": {"step": 2}, "parts": {"training": {"code": "x"}, "randomness": 1}}'),
    "a tensor that is not there": ("state.json", b'{"about": {"step": 2}, "parts": {"training": {"tensor": "/etc/passwd"}}}'),
    "parts that climb": ("state.json", b'{"about": {"step": 2}, "parts": {"../../x": {"dict": {}}}}'),
    "a number of a million digits": ("state.json", b'{"about": {"step": 1' + b"0" * 10**6 + b'}, "parts": {}}'),
    "a step that is none": ("state.json", b'{"about": {"step": "x"}, "parts": {}}'),
    "text that is none": ("state.json", b"\xff\xfe\x00"),
}


def told_of(folder: Path) -> list[str]:
    """The warnings, and the one error, of a restore that takes nothing."""
    part: dict[str, Any] = {"mine": 1}
    saving = gf.Checkpoints(folder).watch(training=part)
    before = bits(saving.parts["randomness"].state_dict())
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(gf.GoodfitError) as refused:
            saving.restore()
    assert time.monotonic() - began < 5
    assert part == {"mine": 1}
    assert bits(saving.parts["randomness"].state_dict()) == before
    told = [*(str(one.message) for one in heard), str(refused.value)]
    assert all("\n" not in line and len(line) < 600 for line in told)
    return told


def alone(folder: Path) -> Path:
    """The one checkpoint of a folder."""
    saved(folder)
    shutil.rmtree(folder / "step-000000001")
    return folder / "step-000000002"


@pytest.mark.parametrize("name", FILES)
def test_a_file_made_to_deceive_is_one_line_and_runs_nothing(name: str, tmp_path: Path) -> None:
    new = alone(tmp_path)
    file, data = FILES[name]
    (new / file).write_bytes(data)
    signed(new)
    warned, _ = told_of(tmp_path)
    assert warned.startswith(str(new))


def inside(said: Any, *keys: Any) -> Any:
    """A place in a tree of state.json."""
    for key in keys:
        said = said[key]
    return said


TRAINING, STEP = ("parts", "training", "dict", "value", "dict"), ("about",)
GENERATORS = ("parts", "randomness", "dict", "state", "dict", "processes", 0, "dict")
STATES: dict[str, tuple[tuple[Any, ...], str, Any]] = {
    **{f"a step of {step!r:.9}": (STEP, "step", step) for step in ("x", None, -3, True, 2.0, 7, 10**30, [1], {})},
    "a tensor that is not there": (TRAINING, "weight", {"tensor": "x"}),
    "a tensor of another part": (TRAINING, "weight", {"tensor": "randomness.state.processes.0.torch"}),
    "a tensor by a number": (TRAINING, "weight", {"tensor": 3}),
    "a tensor by a list": (TRAINING, "weight", {"tensor": []}),
    "complex numbers of three": (TRAINING, "weight", {"complex": "training.value.weight"}),
    "an array of no tensor": (TRAINING, "weight", {"array": 3}),
    "a kind that is none": (TRAINING, "weight", {"__reduce__": "os.system"}),
    "two kinds": (TRAINING, "weight", {"tuple": [], "dict": {}}),
    "no kind": (TRAINING, "weight", {}),
    "pairs of three": (TRAINING, "weight", {"pairs": [[1, 2, 3]]}),
    "a key that is a list": (TRAINING, "weight", {"pairs": [[[], 1]]}),
    "a number that is none": (TRAINING, "weight", {"int": "x"}),
    "a dict of a list": (TRAINING, "weight", {"dict": [1]}),
    "a part of no state": (("parts", "training"), "dict", {}),
    "a part of another kind": (("parts", "training", "dict"), "value", [1]),
    "a part with lines in its kind": (("parts", "randomness", "dict"), "kind", "a\nb" * 1000),
    "a part more": (("parts",), "more", {"dict": {}}),
    "a part with lines in its name": (("parts",), "a\nb", {"dict": {}}),
    "parts by the thousand": ((), "parts", {f"x{i}": {"dict": {}} for i in range(1000)}),
    "a place in Python's generator": ((*GENERATORS, "python", "tuple"), 1, {"tuple": [0] * 624 + [10**6]}),
    "a place in NumPy's generator": ((*GENERATORS, "numpy", "tuple"), 2, 10**9),
    "another generator of NumPy": ((*GENERATORS, "numpy", "tuple"), 0, "PCG64"),
    "a torch generator of weights": (GENERATORS, "torch", {"tuple": []}),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_made_to_deceive_is_one_line_with_all_parts_as_they_were(name: str, tmp_path: Path) -> None:
    new = alone(tmp_path)
    said = json.loads((new / "state.json").read_text())
    keys, key, value = STATES[name]
    inside(said, *keys)[key] = value
    (new / "state.json").write_text(json.dumps(said))
    signed(new)
    assert any(str(new) in line or "saved with another" in line for line in told_of(tmp_path))
    assert 0 <= np.random.rand() < 1  # NumPy reads where it was told to


@pytest.mark.filterwarnings("always::goodfit.GoodfitWarning")
def test_what_a_checkpoint_says_about_itself_is_told_in_one_line(tmp_path: Path) -> None:
    new = alone(tmp_path)
    said = json.loads((new / "state.json").read_text())
    said["about"]["torch"] = "a\nb" * 1000
    (new / "state.json").write_text(json.dumps(said))
    signed(new)
    with pytest.warns(gf.GoodfitWarning, match="saved with torch") as heard:
        training(tmp_path)
    assert all("\n" not in str(one.message) and len(str(one.message)) < 300 for one in heard)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "a b", "a\0b", "\ud800", ""])
def test_parts_are_not_written_elsewhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(gf.GoodfitError, match="needs a name such as an argument has"):
        gf.Checkpoints(tmp_path / "in").watch(**{name: {"t": torch.ones(2)}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["a file", "a pipe", "a folder", "a link", "a link to nothing"])
def test_what_has_the_name_of_a_checkpoint_and_is_none_is_passed_over_and_goes(kind: str, tmp_path: Path) -> None:
    saved(tmp_path / "elsewhere")
    saved(tmp_path / "here")
    path = tmp_path / "here" / "step-000000008"
    make = {"a file": path.touch, "a pipe": lambda: os.mkfifo(path), "a folder": path.mkdir}
    other = gf.Checkpoints(tmp_path / "elsewhere").watch(training=state(8))
    other.restore()
    other.parts["training"] |= state(8)
    other.save(8)
    make |= {"a link": lambda: path.symlink_to(tmp_path / "elsewhere" / path.name)}
    make.get(kind, lambda: path.symlink_to(tmp_path / "nothing"))()
    before = bytes_of(tmp_path / "elsewhere")
    with pytest.warns(gf.GoodfitWarning, match="step-000000008.*; the checkpoint before it is tried"):
        saving, part = training(tmp_path / "here")
    assert saving.step == 2
    for step in (8, 9):
        part.clear()
        part |= state(step)
        saving.save(step)
    saving.close()
    assert step_of(tmp_path / "here") == 9
    assert sorted(one.name for one in (tmp_path / "here").iterdir()) == [".lock", "step-000000008", "step-000000009"]
    assert bytes_of(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("name", ["step-²", "step-00000000٣", "step-3", "step-0000000000000003", "step-x", "step-"])
def test_other_names_are_nobodys_checkpoints(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / name).mkdir()
    assert step_of(tmp_path) == 2
    saving, part = training(tmp_path)
    part |= state(3)
    saving.save(3)
    assert (tmp_path / name).is_dir()


def odd(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "a link to an endless file" else "/etc/hostname")


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "training.safetensors"])
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link", "a link to an endless file"])
def test_what_is_no_regular_file_is_not_read(kind: str, name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    odd(tmp_path / "step-000000002" / name, kind)
    if name != "manifest.json":
        signed(tmp_path / "step-000000002")
    assert restored(tmp_path) == "found"


ELSEWHERE = ["../../outside", "/etc/hostname", "..", "a/b", "", "a\0b", "\ud800", "a\nb.safetensors", "x" * 5000]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_manifest_that_points_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    manifest = tmp_path / "step-000000002" / "manifest.json"
    said = json.loads(manifest.read_text())
    said["files"][name] = {"sha256": "0" * 64, "size": 0}
    del said["sha256"]
    manifest.write_text(format_._signed(said))
    assert restored(tmp_path) == "found"


@pytest.mark.parametrize("number", [0, 2, 99, -1])
def test_another_format_is_named_with_what_reads_it(number: int, tmp_path: Path) -> None:
    saved(tmp_path)
    manifest = tmp_path / "step-000000002" / "manifest.json"
    said = json.loads(manifest.read_text()) | {"format": number}
    del said["sha256"]
    manifest.write_text(format_._signed(said))
    saving = gf.Checkpoints(tmp_path).watch(training={})
    with pytest.raises(gf.GoodfitError, match=f"of format {number}, and this goodfit reads 1; resume it with the"):
        saving.restore()


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.filterwarnings("ignore:The checkpoint was saved with:goodfit.GoodfitWarning")
def test_a_checkpoint_of_the_first_format_is_read(tmp_path: Path) -> None:
    written = runpy.run_path(str(GOLDEN / "checkpoint.py"))
    shutil.copytree(GOLDEN / "checkpoint-1", tmp_path / f"step-{written['STEP']:09d}")
    assert sum(file.stat().st_size for file in (GOLDEN / "checkpoint-1").iterdir()) < 20_000
    saving, part = training(tmp_path)
    assert saving.step == written["STEP"]
    assert bits(part) == bits(written["kinds"]())
    draws = random.random(), np.random.rand(), float(torch.rand(1))
    written["seed"]()
    assert draws == (random.random(), np.random.rand(), float(torch.rand(1)))


class Rotation(RuleBasedStateMachine):
    """A folder of two checkpoints under whatever may happen to it; `good` are the steps that must be there, and whole."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.step, self.good = 0, set[int]()
        self.begin()

    def begin(self) -> None:
        self.part: dict[str, Any] = {}
        self.saving = gf.Checkpoints(self.folder, last=2).watch(training=self.part)
        self.step = self.saving.restore()
        self.saving._cost = 0.0

    def set(self, step: int) -> None:
        self.step = step
        self.part.clear()
        self.part |= state(step)

    def was_saved(self) -> None:
        """Of this step and the one before it, and of no other, there are checkpoints."""
        before = [step for step in self.good if step < self.step]
        self.good = {self.step, *sorted(before)[-1:]}
        assert {int(path.name[5:]) for path in self.folder.glob("step-*")} == self.good
        assert not list(self.folder.glob(".step-*"))

    @rule(more=st.integers(1, 5))
    def save(self, more: int) -> None:
        self.set(self.step + more)
        self.saving.save(self.step)
        self.was_saved()

    @rule(more=st.integers(1, 5))
    def save_where_it_is_time_to(self, more: int) -> None:
        self.set(self.step + more)
        if self.saving(self.step):
            self.was_saved()
        self.saving._cost = 0.0

    @rule(more=st.integers(0, 5), at=st.integers(1, 40), number=st.sampled_from([errno.ENOSPC, errno.EIO]), lasts=st.booleans())
    def save_on_a_failing_disk(self, more: int, at: int, number: int, lasts: bool) -> None:
        self.set(self.step + more)
        before = set(self.good)
        with warnings.catch_warnings(), Fault(at, failing(number), lasts=lasts):
            warnings.simplefilter("ignore", gf.GoodfitWarning)
            with suppress(gf.GoodfitError):
                self.saving.save(self.step)
        now = whole(self.folder)
        kept = before - {self.step}  # which may be replaced
        assert kept <= now or (self.saving.step == self.step and len(now) >= 2)
        assert max(now, default=0) >= max(kept, default=0)
        self.good = now

    @rule(more=st.integers(1, 5), at=st.integers(1, 60))
    def die(self, more: int, at: int) -> None:
        process = os.fork()
        if not process:
            code = 1
            try:
                with Fault(at, lambda call: os._exit(0)):
                    self.set(self.step + more)
                    self.saving.save(self.step)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        now = whole(self.folder)
        assert max(now, default=0) >= max(self.good, default=0)
        self.good = now
        self.begin_again()

    @rule()
    def begin_again(self) -> None:
        self.saving.close()
        self.begin()
        assert self.step == max(self.good, default=0)

    @precondition(lambda self: len(self.good) >= 2)
    @rule(seed=st.integers(0, 99), kind=st.sampled_from(list(MUTATIONS)))
    def damage_the_newest(self, seed: int, kind: str) -> None:
        draws = random.Random(seed)
        new = self.folder / f"step-{max(self.good):09d}"
        if mutated(draws.choice(sorted(new.iterdir())), kind, draws):
            self.good.remove(max(self.good))
            self.saving.close()
            with pytest.warns(gf.GoodfitWarning, match=new.name):
                self.begin()
            assert self.step == max(self.good)
            self.save(1 + seed % 3)  # as many steps, fewer or more than that of the damaged one

    @invariant()
    def all_good_ones_are_whole(self) -> None:
        assert self.good <= whole(self.folder)

    @invariant()
    def the_newest_good_one_is_what_was_saved(self) -> None:
        if self.good:
            part: dict[str, Any] = {}
            assert gf.Checkpoints(self.folder).watch(training=part).restore() == max(self.good)
            assert bits(part) == bits(state(max(self.good)))

    def teardown(self) -> None:
        self.saving.close()
        shutil.rmtree(self.folder)


TestRotation = Rotation.TestCase
TestRotation.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
