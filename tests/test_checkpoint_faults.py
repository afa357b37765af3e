"""Checkpoints on a machine that dies, a disk that is full or fails, files that are damaged or made to deceive."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from corruption import MUTATIONS, mutated, restored, restored_step, saved, state
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import goodfit as gf
from goodfit.checkpoints import folder as format_

CALLS = [(os, name) for name in ("fsync", "open", "mkdir", "rename", "replace", "rmdir", "unlink")]
CALLS += [(safetensors.torch, "save_file"), (Path, "write_text")]


class Fault:
    """Something that happens at the n-th call that touches the disk, and, where it lasts, at all behind it."""

    def __init__(self, at: int, act: Callable[[Any], None], *, lasts: bool = False) -> None:
        self.at, self.act, self.lasts, self.calls = at, act, lasts, 0

    def __enter__(self) -> Fault:
        self.kept = [(owner, name, getattr(owner, name)) for owner, name in CALLS]
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
        with Fault(at, failing(number), lasts=lasts):
            try:
                saving.save(3)
            except gf.GoodfitError as wrong:
                told = str(wrong)
        if told:
            refusals += 1
            assert told.startswith(f"The checkpoint cannot be written into {str(folder)!r}: {os.strerror(number)}")
            assert "\n" not in told
        saving.close()
        step = step_of(folder)
        assert step in (2, 3)
        if step == 2:
            now = bytes_of(folder)
            assert all(now[name] == data for name, data in before.items())
        goes_on(folder)
    assert refusals > 10


def test_a_full_disk_is_told_and_the_training_goes_on(tmp_path: Path) -> None:
    saved(tmp_path)
    process = os.fork()
    if not process:
        code = 1
        try:
            saving, part = training(tmp_path)
            before = bytes_of(tmp_path)
            for limit in (0, 1, 100, 500, 1000, 2000, 2500):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                part.clear()
                part |= state(3)
                with warnings.catch_warnings(record=True) as heard:
                    warnings.simplefilter("always")
                    saving._cost = 0.0
                    assert saving(3) is False
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                assert "The training goes on without this checkpoint." in str(heard[0].message)
                assert bytes_of(tmp_path) == before
            saving._cost = 0.0
            assert saving(3)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert step_of(tmp_path) == 3


@pytest.mark.parametrize("kind", MUTATIONS)
def test_damage_anywhere_is_found_and_the_checkpoint_before_it_taken(kind: str, tmp_path: Path) -> None:
    saved(tmp_path)
    draws = random.Random(0)
    files = sorted((tmp_path / "step-000000002").iterdir())
    assert [file.name for file in files] == ["manifest.json", "randomness.safetensors", "state.json", "training.safetensors"]
    for _ in range(40):
        for file in files:
            before = file.read_bytes()
            assert not mutated(file, kind, draws) or restored(tmp_path) == "found"
            file.write_bytes(before)
    assert restored(tmp_path) == "the same"


def test_files_that_are_missing_or_of_another_checkpoint_are_found(tmp_path: Path) -> None:
    saved(tmp_path)
    old, new = tmp_path / "step-000000001", tmp_path / "step-000000002"
    for name in ("manifest.json", "state.json", "training.safetensors", "randomness.safetensors"):
        before = (new / name).read_bytes()
        (new / name).unlink()
        assert restored(tmp_path) == "found"
        if name != "randomness.safetensors":  # nothing was drawn between the two
            (new / name).write_bytes((old / name).read_bytes())
            assert restored(tmp_path) == "found"
        (new / name).write_bytes(before)
    names = "training.safetensors", "randomness.safetensors"
    one, other = (new / name for name in names)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert restored(tmp_path) == "found"


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


class Ran(Exception):
    """What a file would raise that is executed."""


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
    (folder / "manifest.json").write_text(format_._json({"files": files, "format": format_.FORMAT}))


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


@pytest.mark.parametrize("name", FILES)
def test_a_file_made_to_deceive_is_one_line_and_runs_nothing(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    shutil.rmtree(tmp_path / "step-000000001")
    new = tmp_path / "step-000000002"
    file, data = FILES[name]
    (new / file).write_bytes(data)
    signed(new)
    part: dict[str, Any] = {"mine": 1}
    saving = gf.Checkpoints(tmp_path).watch(training=part)
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(gf.GoodfitError) as refused:
            saving.restore()
    assert time.monotonic() - began < 5
    assert all("\n" not in line and len(line) < 600 for line in [str(refused.value), *(str(one.message) for one in heard)])
    assert part == {"mine": 1}


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


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "..", "a/b", ""])
def test_a_manifest_that_points_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    manifest = tmp_path / "step-000000002" / "manifest.json"
    said = json.loads(manifest.read_text())
    said["files"][name] = {"sha256": "0" * 64, "size": 0}
    manifest.write_text(format_._json(said))
    assert restored(tmp_path) == "found"


@pytest.mark.parametrize("number", [2, 99])
def test_another_format_is_named_with_what_reads_it(number: int, tmp_path: Path) -> None:
    saved(tmp_path)
    manifest = tmp_path / "step-000000002" / "manifest.json"
    said = json.loads(manifest.read_text()) | {"format": number}
    manifest.write_text(format_._json(said))
    saving = gf.Checkpoints(tmp_path).watch(training={})
    with pytest.raises(gf.GoodfitError, match=f"of format {number}, and this goodfit reads 1; resume it with the"):
        saving.restore()


GOLDEN = Path(__file__).parent / "golden" / "checkpoint-1"


@pytest.mark.filterwarnings("ignore:The checkpoint was saved with:goodfit.GoodfitWarning")
def test_a_checkpoint_of_the_first_release_is_read(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "step-000000002")
    saving, part = training(tmp_path)
    assert saving.step == 2
    assert part["history"] == [{"valid_loss": 0.25}]
    assert torch.equal(part["weight"], torch.arange(6.0, dtype=torch.float32).reshape(2, 3))
    assert part["nan"] != part["nan"]


class Rotation(RuleBasedStateMachine):
    """A folder of checkpoints under whatever may happen to it."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = Path(tempfile.mkdtemp())
        self.step, self.whole = 0, 0
        self.part: dict[str, Any] = {}
        self.saving = gf.Checkpoints(self.folder, last=2).watch(training=self.part)

    def set(self, step: int) -> None:
        self.step = step
        self.part.clear()
        self.part |= state(step)

    @rule(more=st.integers(1, 5))
    def save(self, more: int) -> None:
        self.set(self.step + more)
        self.saving.save(self.step)
        self.whole = self.step
        assert 1 <= len(list(self.folder.glob("step-*"))) <= 2

    @rule(more=st.integers(1, 5), at=st.integers(1, 40), number=st.sampled_from([errno.ENOSPC, errno.EIO]))
    def save_on_a_failing_disk(self, more: int, at: int, number: int) -> None:
        self.set(self.step + more)
        try:
            with Fault(at, failing(number), lasts=True):
                self.saving.save(self.step)
            self.whole = self.step
        except gf.GoodfitError:
            if (self.folder / f"step-{self.step:09d}").exists():
                self.whole = self.step

    @rule(at=st.integers(1, 60), more=st.integers(1, 5))
    def die(self, more: int, at: int) -> None:
        process = os.fork()
        if not process:
            with Fault(at, lambda call: os._exit(0)):
                self.set(self.step + more)
                self.saving.save(self.step)
            os._exit(0)
        os.waitpid(process, 0)
        if (self.folder / f"step-{self.step + more:09d}").exists():
            self.whole = self.step + more
        self.begin_again()

    @rule()
    def begin_again(self) -> None:
        self.saving.close()
        self.part = {}
        self.saving = gf.Checkpoints(self.folder, last=2).watch(training=self.part)
        self.step = self.saving.restore()
        assert self.step == self.whole

    @precondition(lambda self: len(list(self.folder.glob("step-*"))) == 2)
    @rule(seed=st.integers(0, 99), kind=st.sampled_from(list(MUTATIONS)))
    def damage_the_newest(self, seed: int, kind: str) -> None:
        draws = random.Random(seed)
        old, new = sorted(self.folder.glob("step-*"))
        if mutated(draws.choice(sorted(new.iterdir())), kind, draws):
            self.saving.close()
            self.part = {}
            self.saving = gf.Checkpoints(self.folder, last=2).watch(training=self.part)
            with pytest.warns(gf.GoodfitWarning, match=new.name):
                self.step = self.saving.restore()
            assert self.step == int(old.name[5:])
            self.whole = self.step
            self.save(int(new.name[5:]) - self.step)  # the damaged one is replaced

    @invariant()
    def the_newest_whole_one_is_there(self) -> None:
        if self.whole:
            part: dict[str, Any] = {}
            reader = gf.Checkpoints(self.folder).watch(training=part)
            assert reader.restore() == self.whole
            assert part["step"] == self.whole

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


TestRotation = Rotation.TestCase
TestRotation.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
