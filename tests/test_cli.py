"""The command line as a user meets it: what it writes, what it says, and how it refuses."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from goodfit import cli, run as goodfit_run

Outcome = tuple[int, str, str]
FAST = ("--epochs", "3", "--cocktail", "BatchNorm(), Dropout(0.2), L1(1e-3), EarlyStopping(20)")


@pytest.fixture
def goodfit(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Outcome]:
    """Run the command in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)

    def run(*words: str) -> Outcome:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["goodfit", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capfd.readouterr())

    return run


def rows(n: int = 120, seed: int = 0) -> list[dict[str, object]]:
    """A table whose target follows from a number and a category, with holes in both."""
    draw = random.Random(seed)
    table = []
    for i in range(n):
        age, city = draw.randint(18, 80), draw.choice(["Rome", "Oslo", "Łódź"])
        row = {"id": f"c{i:04}", "age": age, "city": city, "day": f"2024-03-{draw.randint(1, 28):02}", "same": 1}
        row |= {"member": draw.choice(["true", "false"]), "churn": "yes" if (age > 50) ^ (city == "Oslo") else "no"}
        row |= {"age": ""} if i % 17 == 3 else {}
        row |= {"city": ""} if i % 19 == 5 else {}
        table.append(row)
    return table


def write(name: str, table: list[dict[str, object]]) -> str:
    with open(name, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return name


def read(name: str | Path) -> list[dict[str, str]]:
    with open(name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_fit_writes_a_whole_run_folder_and_says_what_it_did(goodfit: Callable[..., Outcome]) -> None:
    code, out, err = goodfit("fit", write("churn.csv", rows()), "--target", "churn", *FAST)
    assert code == 0
    assert sorted(p.name for p in Path("churn-run").iterdir()) == [
        "history.json", "preprocessing.json", "report.html", "report.json", "run.json", "test_predictions.csv",
        "weights.safetensors",
    ]  # fmt: skip
    assert [line.split()[0] for line in out.splitlines()] == ["train", "valid", "test", "valid,", "run"]
    assert "left out, a different text in every row like an identifier: id\n" in err
    assert "left out, constant: same\n" in err
    assert "category: city, member\n" in err
    assert "split: train 72, valid 24, test 24 rows" in err
    about = json.loads(Path("churn-run/run.json").read_text())
    assert about["cocktail"].startswith("Cocktail(BatchNorm(momentum=0.1")
    assert (about["seed"], about["rows"], about["classes"]) == (0, {"train": 72, "valid": 24, "test": 24}, ["no", "yes"])
    assert len(json.loads(Path("churn-run/history.json").read_text())["regularized"]) == 3
    assert list(Path().glob(".*")) == []


def test_predict_gives_the_bits_of_fitting_whatever_the_order_and_number_of_rows(goodfit: Callable[..., Outcome]) -> None:
    table = rows()
    goodfit("fit", write("churn.csv", table), "--target", "churn", "--out", "run", *FAST)
    fitted = {r["row"]: (r["prediction"], r["p(no)"], r["p(yes)"]) for r in read("run/test_predictions.csv")}
    assert len(fitted) == 24
    assert goodfit("predict", "run", "churn.csv", "-o", "all.csv")[0] == 0
    again = {str(i): tuple(r.values()) for i, r in enumerate(read("all.csv"), 1)}
    assert {i: again[i] for i in fitted} == fitted
    shuffled = [{k: row[k] for k in ("member", "city", "day", "age")} | {"new": 7} for row in reversed(table[40:])]
    assert goodfit("predict", "run", write("part.csv", shuffled), "-o", "part_out.csv")[0] == 0
    assert [tuple(r.values()) for r in read("part_out.csv")] == [again[str(i)] for i in range(120, 40, -1)]


def test_predict_in_another_process_gives_the_same_bits(goodfit: Callable[..., Outcome]) -> None:
    goodfit("fit", write("churn.csv", rows()), "--target", "churn", "--out", "run", *FAST)
    goodfit("predict", "run", "churn.csv", "-o", "here.csv")
    command = [sys.executable, "-m", "goodfit", "predict", "run", "churn.csv", "-o", "there.csv"]
    subprocess.run(command, check=True, capture_output=True)
    assert Path("here.csv").read_bytes() == Path("there.csv").read_bytes()


def test_predict_accepts_new_categories_and_refuses_a_missing_column(goodfit: Callable[..., Outcome]) -> None:
    goodfit("fit", write("churn.csv", rows()), "--target", "churn", "--out", "run", *FAST)
    strange = [{**row, "city": "Atlantis", "member": ""} for row in rows(30, seed=1)]
    assert goodfit("predict", "run", write("new.csv", strange), "-o", "new_out.csv")[0] == 0
    assert len(read("new_out.csv")) == 30
    without = [{k: v for k, v in row.items() if k != "city"} | {"citty": 1} for row in rows(30)]
    code, _, err = goodfit("predict", "run", write("less.csv", without), "-o", "less_out.csv")
    assert (code, err) == (2, "goodfit: less.csv: expected the column city, which is not there; did you mean citty?\n")
    assert not Path("less_out.csv").exists()


def test_a_column_that_changed_its_kind_is_refused(goodfit: Callable[..., Outcome]) -> None:
    goodfit("fit", write("churn.csv", rows()), "--target", "churn", "--out", "run", *FAST)
    code, _, err = goodfit("predict", "run", write("x.csv", [{**r, "age": "old"} for r in rows(30)]), "-o", "o.csv")
    assert code == 2
    assert "age" in err
    assert err.count("\n") == 1


def test_numbers_are_predicted_in_their_own_units(goodfit: Callable[..., Outcome]) -> None:
    table = [{"a": i / 10, "price": 1000.5 + 3 * i} for i in range(200)]
    code, out, _ = goodfit("fit", write("p.csv", table), "--target", "price", "--out", "run", "--epochs", "60")
    assert code == 0
    assert "rmse" in out
    goodfit("predict", "run", "p.csv", "-o", "o.csv")
    guess = np.array([float(r["prediction"]) for r in read("o.csv")])
    truth = np.array([row["price"] for row in table])
    assert np.sqrt(np.mean((guess - truth) ** 2)) < 0.5 * truth.std()


def test_the_same_seed_gives_the_same_weights(goodfit: Callable[..., Outcome]) -> None:
    write("churn.csv", rows())
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        goodfit("fit", "churn.csv", "--target", "churn", "--out", name, "--seed", seed, *FAST)
    a, b, c = (Path(name, "weights.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize(("target", "task", "classes"), [("member", "classes", ["False", "True"]), ("age", "numbers", None)])
def test_the_target_is_inferred_and_overridable(
    goodfit: Callable[..., Outcome], target: str, task: str, classes: object
) -> None:
    assert goodfit("fit", write("churn.csv", rows()), "--target", target, "--out", "run", *FAST)[0] == 0
    about = json.loads(Path("run/run.json").read_text())
    assert (about["task"], about["classes"]) == (task, classes)


REFUSED = {
    "missing file": (("fit", "no.csv", "--target", "y"), "no.csv: there is no such file"),
    "missing target": (("fit", "churn.csv", "--target", "chrun"), "no column 'chrun' to predict; did you mean churn?"),
    "one class": (("fit", "churn.csv", "--target", "same"), "'same' must have two different values at least"),
    "all-missing target": (("fit", "holes.csv", "--target", "void"), "'void' is missing in all 40 rows"),
    "empty table": (("fit", "empty.csv", "--target", "y"), "empty"),
    "header only": (("fit", "header.csv", "--target", "y"), "no rows"),
    "two rows": (("fit", "two.csv", "--target", "churn"), "at least 20 rows"),
    "only constants": (("fit", "constant.csv", "--target", "y"), "none that can be used (a: left out, constant)"),
    "infinite number": (("fit", "inf.csv", "--target", "y"), "--missing inf"),
    "identifier target": (("fit", "churn.csv", "--target", "id"), "too many for classes"),
    "unknown regularizer": (("fit", "churn.csv", "--target", "churn", "--cocktail", "Dropuot(.1)"), "did you mean Dropout or "),
    "number out of range": (("fit", "churn.csv", "--target", "churn", "--cocktail", "L2(lam=-1)"), "L2.lam must be >= 0"),
    "unknown number": (("fit", "churn.csv", "--target", "churn", "--cocktail", "L2(lma=1)"), "did you mean lam?"),
    "code in a cocktail": (("fit", "churn.csv", "--target", "churn", "--cocktail", "__import__('os')"), "knows no regularizer"),
    "unknown refit": (
        ("fit", "no.csv", "--target", "y", "--refit", "foo"),
        "--refit must be steps or epochs, or left out, got",
    ),
    "maximising": (("fit", "no.csv", "--target", "churn", "--cocktail", "EarlyStopping(2, mode='max')"), "lower is better"),
    "run folder exists": (("fit", "churn.csv", "--target", "churn", "--out", "there"), "exists already"),
    "climbing name": (("fit", "churn.csv", "--target", "churn", "--out", "../../x"), "must not climb"),
    "no parent": (("fit", "churn.csv", "--target", "churn", "--out", "a/b/c"), "needs a folder to be in"),
    "unknown task": (
        ("fit", "churn.csv", "--target", "churn", "--task", "clases"),
        "task must be 'classes' or 'numbers', got 'clases'",
    ),
    "wrong task": (("fit", "churn.csv", "--target", "churn", "--task", "numbers"), "needs a target of numbers"),
    "unknown device": (("fit", "churn.csv", "--target", "churn", "--device", "gpu9"), "gpu9"),
    "bad number of epochs": (("fit", "churn.csv", "--target", "churn", "--epochs", "0"), "--epochs"),
    "unknown option": (("fit", "churn.csv", "--traget", "churn"), "--traget"),
    "unknown command": (("fti",), "fti"),
    "no run folder": (("predict", "nowhere", "churn.csv", "-o", "x.csv"), "no run folder 'nowhere'"),
    "not a run folder": (("report", "there"), "not a run folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_line_exit_code_2_and_leaves_nothing(goodfit: Callable[..., Outcome], case: str) -> None:
    words, expected = REFUSED[case]
    write("churn.csv", rows())
    write("two.csv", rows(2))
    write("holes.csv", [{"a": i, "void": ""} for i in range(40)])
    write("constant.csv", [{"a": 1, "y": i % 2} for i in range(40)])
    write("inf.csv", [{"a": "inf" if i == 7 else i, "y": i % 2} for i in range(40)])
    Path("empty.csv").write_text("")
    Path("header.csv").write_text("a,y\n")
    Path("there").mkdir()
    before = sorted(Path("..").rglob("*"))
    code, out, err = goodfit(*words)
    assert (code, out) == (2, "")
    assert expected in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("goodfit: ")
    assert sum(line.startswith("goodfit: ") for line in err.splitlines()) == 1
    assert "Traceback" not in err
    assert sorted(Path("..").rglob("*")) == before


def test_debug_shows_the_traceback(goodfit: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no such file"):
        goodfit("fit", "no.csv", "--target", "y", "--debug")


def test_hostile_names_are_escaped_in_the_report_and_harmless_in_the_terminal(goodfit: Callable[..., Outcome]) -> None:
    evil = "<script>alert(1)</script>"
    table = [{evil: i % 7, "../../x": i % 5, "été 😀\x1b[2J": i % 3, "y": f"{evil}{i % 2}"} for i in range(60)]
    code, out, err = goodfit("fit", write("<b>.csv", table), "--target", "y", "--out", "run", *FAST)
    assert code == 0
    assert "\x1b" not in out + err
    page = Path("run/report.html").read_text()
    assert "<script>" not in page.lower()
    assert "&lt;script&gt;" in page
    assert goodfit("predict", "run", "<b>.csv", "-o", "o.csv")[0] == 0


def test_ten_thousand_columns_are_fitted(goodfit: Callable[..., Outcome]) -> None:
    draw = np.random.default_rng(0)
    table = draw.integers(0, 9, size=(40, 10_001))
    table[:, 0] %= 2
    lines = [",".join(["y", *(f"c{i}" for i in range(10_000))]), *(",".join(map(str, row)) for row in table)]
    Path("wide.csv").write_text("\n".join(lines))
    assert goodfit("fit", "wide.csv", "--target", "y", "--out", "run", *FAST)[0] == 0
    assert Path("run/report.html").stat().st_size < 4_000_000


def test_arrays_are_fitted_and_predicted(goodfit: Callable[..., Outcome]) -> None:
    x = np.random.default_rng(0).normal(size=(60, 3, 2))
    np.savez("a.npz", X=x, y=(x.sum(axis=(1, 2)) > 0).astype(int))
    assert goodfit("fit", "a.npz", "--target", "y", "--out", "run", *FAST)[0] == 0
    assert goodfit("predict", "run", "a.npz", "-o", "o.csv")[0] == 0
    assert len(read("o.csv")) == 60


def test_report_is_drawn_anew_and_list_shows_every_regularizer(goodfit: Callable[..., Outcome]) -> None:
    goodfit("fit", write("churn.csv", rows()), "--target", "churn", "--out", "run", *FAST)
    page = Path("run/report.html")
    drawn = page.read_text()
    page.unlink()
    assert goodfit("report", "run")[0] == 0
    assert page.read_text() == drawn
    code, out, _ = goodfit("list")
    assert code == 0
    for part in (
        "Dropout  [Build]",
        "p = 0.2   in [0, 1), off at 0",
        "patience = 30",
        "off at inf",
        "Tibshirani 1996",
        "GL  [criterion",
    ):
        assert part in out


@pytest.mark.parametrize("damage", ["weights.safetensors", "run.json", "preprocessing.json"])
def test_a_damaged_run_folder_is_one_line(goodfit: Callable[..., Outcome], damage: str) -> None:
    goodfit("fit", write("churn.csv", rows()), "--target", "churn", "--out", "run", *FAST)
    whole = Path("run", damage).read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"{}", b"[1]", b"\x80\x04."):
        Path("run", damage).write_bytes(broken)
        code, _, err = goodfit("predict", "run", "churn.csv", "-o", "o.csv")
        assert (code, err.count("\n")) == (2, 1), err
    Path("run", damage).unlink()
    assert goodfit("predict", "run", "churn.csv", "-o", "o.csv")[0] == 2


def test_a_changed_preprocessing_is_noticed(goodfit: Callable[..., Outcome]) -> None:
    goodfit("fit", write("churn.csv", rows()), "--target", "churn", "--out", "run", *FAST)
    saved = json.loads(Path("run/preprocessing.json").read_text())
    saved["means"][0] += 1
    Path("run/preprocessing.json").write_text(json.dumps(saved))
    code, _, err = goodfit("predict", "run", "churn.csv", "-o", "o.csv")
    assert code == 2
    assert "preprocessing.json is not the file that the fit wrote (SHA-256 differs)" in err
    about = json.loads(Path("run/run.json").read_text())
    about["sha256"]["preprocessing.json"] = hashlib.sha256(Path("run/preprocessing.json").read_bytes()).hexdigest()
    Path("run/run.json").write_text(json.dumps(about))
    code, _, err = goodfit("predict", "run", "churn.csv", "-o", "o.csv")
    assert code == 2
    assert "encodes its sample rows otherwise" in err


def test_weights_of_another_run_are_noticed(goodfit: Callable[..., Outcome]) -> None:
    write("churn.csv", rows())
    for name in "ab":
        goodfit("fit", "churn.csv", "--target", "churn", "--out", name, "--seed", str(ord(name)), *FAST)
    Path("a/weights.safetensors").write_bytes(Path("b/weights.safetensors").read_bytes())
    assert goodfit("predict", "a", "churn.csv", "-o", "o.csv")[0] == 2


@pytest.mark.parametrize(
    "edit",
    [{"threads": "x"}, {"network": {"inputs": 3, "outputs": 2, "width": 10**9, "depth": 2}}, {"reading": {"missing": 5}}],
)
def test_an_edited_run_is_one_line(goodfit: Callable[..., Outcome], edit: dict[str, object]) -> None:
    goodfit("fit", write("churn.csv", rows()), "--target", "churn", "--out", "run", *FAST)
    about = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps(about | edit))
    code, _, err = goodfit("predict", "run", "churn.csv", "-o", "o.csv")
    assert (code, err.count("\n")) == (2, 1), err


def test_predict_tells_what_the_fit_had_not_seen(goodfit: Callable[..., Outcome]) -> None:
    goodfit("fit", write("churn.csv", rows()), "--target", "churn", "--out", "run", *FAST)
    _, _, err = goodfit(
        "predict", "run", write("new.csv", [{**r, "city": "Atlantis", "age": ""} for r in rows(30)]), "-o", "o.csv"
    )
    assert "column city: 30 of 30 cells hold categories new or rare to the fit" in err
    assert "column age: every cell is missing" in err


def test_checks_by_steps_and_a_refit_are_told_apart(goodfit: Callable[..., Outcome]) -> None:
    words = ("fit", write("churn.csv", rows()), "--target", "churn", *FAST[2:], "--epochs", "6", "--check-every", "4")
    assert goodfit(*words, "--out", "alone")[0] == 0
    code, out, err = goodfit(*words, "--out", "run", "--refit", "epochs")
    assert code == 0
    alone, report = (json.loads(Path(name, "report.json").read_text()) for name in ("alone", "run"))
    steps = [row["step"] for row in report["history"]["regularized"]]
    assert steps == [*range(4, 6 * 5 + 1, 4), 30]  # 72 rows in batches of 16
    kept = min(report["history"]["regularized"], key=lambda row: row["valid_loss"])
    assert (report["best_step"], report["best_epoch"], report["stop_step"]) == (kept["step"], kept["epoch"], steps[-1])
    assert report["scores"]["regularized"] == alone["scores"]["regularized"]  # of the validated network
    assert report["refit"] in err
    assert report["scores"]["refit"]["test"] != report["scores"]["regularized"]["test"]
    assert "test, refit" in out
    page = Path("run/report.html").read_text()
    assert f"The weights of step {kept['step']} were kept." in page
    assert report["refit"] in page
    assert Path("run/weights.safetensors").read_bytes() != Path("alone/weights.safetensors").read_bytes()
    assert goodfit("predict", "run", "churn.csv", "-o", "o.csv")[0] == 0
    assert goodfit(*words, "--out", "other", "--refit", "often")[0] == 2


def test_predictions_never_take_the_place_of_the_table(goodfit: Callable[..., Outcome]) -> None:
    goodfit("fit", write("churn.csv", rows()), "--target", "churn", "--out", "run", *FAST)
    before = Path("churn.csv").read_bytes()
    assert goodfit("predict", "run", "churn.csv", "-o", "churn.csv")[0] == 2
    assert Path("churn.csv").read_bytes() == before


def test_the_report_speaks_of_the_weights_that_were_kept(goodfit: Callable[..., Outcome]) -> None:
    draw = random.Random(0)
    table = [{"a": draw.random(), "b": draw.random(), "y": draw.random()} for _ in range(60)]
    goodfit("fit", write("noise.csv", table), "--target", "y", "--out", "run", "--cocktail", "L2(1e-6)", "--epochs", "40")
    report = json.loads(Path("run/report.json").read_text())
    losses = [row["valid_loss"] for row in report["history"]["regularized"]]
    assert losses.index(min(losses)) + 1 < 40
    assert report["best_epoch"] == 40


def test_padded_text_predicts_the_same_from_csv_and_parquet(goodfit: Callable[..., Outcome]) -> None:
    table = [{"c": "ab"[i % 2] + " ", "x": i % 7, "y": "uv"[i % 2]} for i in range(60)]
    write("p.csv", table)
    pq.write_table(pa.Table.from_pylist(table), "p.parquet")
    goodfit("fit", "p.parquet", "--target", "y", "--out", "run", *FAST)
    for name in ("p.csv", "p.parquet"):
        assert goodfit("predict", "run", name, "-o", f"{name}.out.csv")[0] == 0
    assert Path("p.csv.out.csv").read_bytes() == Path("p.parquet.out.csv").read_bytes()


def test_no_command_opens_a_connection(goodfit: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert goodfit("fit", write("churn.csv", rows()), "--target", "churn", "--out", "run", *FAST)[0] == 0
    assert goodfit("predict", "run", "churn.csv", "-o", "o.csv")[0] == 0


def test_help_is_the_manual_and_quick() -> None:
    shown = subprocess.run([sys.executable, "-m", "goodfit", "--help"], capture_output=True, text=True, check=True).stdout
    for word in ("fit", "predict", "report", "list", "--debug", "--version", "EarlyStopping(20)"):
        assert word in shown


def test_without_a_command_the_manual_is_shown(goodfit: Callable[..., Outcome]) -> None:
    code, out, err = goodfit()
    assert (code, err) == (0, "")
    assert "Fit a network on a table" in out


def test_ctrl_c_before_the_first_epoch_leaves_nothing_and_says_so(
    goodfit: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("goodfit.fitting.stepping.Stepping.over", interrupted)
    code, out, err = goodfit("fit", write("churn.csv", rows()), "--target", "churn", "--out", "run", *FAST)
    assert (code, out, err.splitlines()[-1]) == (
        130,
        "",
        "goodfit: interrupted before the first check; nothing was written",
    )
    assert [p.name for p in Path().iterdir()] == ["churn.csv"]


def interrupting(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Ctrl-C in front of one training step, counted over all trainings of the command."""
    steps, whole = iter(range(1, 10**6)), goodfit_run.Run.loss

    def loss(run: goodfit_run.Run, *args: object, **how: object) -> torch.Tensor:
        if next(steps) == at:
            raise KeyboardInterrupt
        return whole(run, *args, **how)

    monkeypatch.setattr(goodfit_run.Run, "loss", loss)


@pytest.mark.parametrize(("cocktail", "restores"), [("L2(1e-4)", False), ("L2(1e-4), EarlyStopping(20)", True)])
def test_ctrl_c_says_whose_weights_are_kept(
    goodfit: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, cocktail: str, restores: bool
) -> None:
    interrupting(monkeypatch, 13)  # 5 steps in an epoch
    code, _, err = goodfit("fit", write("churn.csv", rows()), "--target", "churn", "--out", "run", "--cocktail", cocktail)
    assert code == 0
    report = json.loads(Path("run/report.json").read_text())
    losses = [row["valid_loss"] for row in report["history"]["regularized"]]
    best = losses.index(min(losses)) + 1
    kept = f"the best weights, of epoch {best}" if restores else "the weights of the last step, which no check has scored"
    assert err.splitlines()[-2:] == ["ended: interrupted in epoch 3", f"kept: {kept}"]
    assert report["best_epoch"] == (best if restores else None)
    page = Path("run/report.html").read_text()
    assert ("The weights of the last step were kept, which no check has scored." in page) != restores
    assert (f"The weights of epoch {best} were kept." in page) == restores


def test_without_early_stopping_the_last_weights_are_kept_and_it_says_so(goodfit: Callable[..., Outcome]) -> None:
    draw = random.Random(0)
    table = [{"a": draw.random(), "b": draw.random(), "y": draw.random()} for _ in range(60)]
    words = ("--target", "y", "--out", "run", "--cocktail", "L2(1e-6)", "--epochs", "40")
    _, _, err = goodfit("fit", write("noise.csv", table), *words)
    losses = [row["valid_loss"] for row in json.loads(Path("run/report.json").read_text())["history"]["regularized"]]
    best = losses.index(min(losses)) + 1
    assert f"the weights of the last step, not those of epoch {best}: no EarlyStopping restores the best" in err


def test_ctrl_c_in_the_comparison_leaves_the_run(goodfit: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupting(monkeypatch, 17)  # in the first epoch of the bare network
    code, _, err = goodfit("fit", write("churn.csv", rows()), "--target", "churn", "--out", "run", *FAST)
    assert (code, err.splitlines()[-1]) == (0, "without a comparison: the bare network was interrupted")
    assert json.loads(Path("run/report.json").read_text())["scores"]["bare"] == {}


def test_a_run_tells_whether_it_was_refit(goodfit: Callable[..., Outcome]) -> None:
    words = ("fit", write("churn.csv", rows()), "--target", "churn", *FAST)
    for name, more in (("alone", ()), ("run", ("--refit", "steps"))):
        assert goodfit(*words, "--out", name, *more)[0] == 0
    alone, refit = (json.loads(Path(name, "run.json").read_text())["refit"] for name in ("alone", "run"))
    assert alone == ""
    assert refit.startswith("refit on train and valid for the ")
