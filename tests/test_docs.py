"""What the pages say is true: README blocks run, names are documented, the version has an entry."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import types
import warnings
from pathlib import Path

import pytest
import torch

import goodfit as gf
from goodfit.regularizers import catalogue

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_readme_blocks_run_one_after_the_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    blocks = re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL)
    assert [name for name, _ in blocks] == [
        "loop",
        "text",
        "fit",
        "overnight",
        "saving",
        *["stack", "path", "shrink", "norms", "sampling", "stopping"],
    ]
    world: dict[str, object] = {}
    for name, block in blocks:
        exec(compile(block, f"README.md:{name}", "exec"), world)
    printed = capsys.readouterr().out
    assert "no improvement on 0.0322581 by more than 0.001 in 5 checks: best" in printed


def test_the_page_on_regularizers_runs_too() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "regularizers.md").read_text(), re.DOTALL)
    world: dict[str, object] = {"__name__": "page"}
    exec(compile(blocks[0], "regularizers.md", "exec", dont_inherit=True), world)
    assert gf.parse("Quartic(0.2)", own=[world["Quartic"]])[0].slope({"w": torch.ones(1)}, {})["w"] == 0.2


def test_every_public_name_stands_on_a_page() -> None:
    pages = README + (ROOT / "docs" / "design.md").read_text() + (ROOT / "CHANGELOG.md").read_text()
    assert [name for name in dir(gf) if name not in pages] == []
    assert len(set(dir(gf)) - set(catalogue())) < 45


def test_the_version_has_an_entry() -> None:
    assert f"## [{gf.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_an_unknown_name_is_an_attribute_error_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match="did you mean Dropout"):
        gf.Dropuot


@pytest.mark.parametrize("name", [m.name for m in pkgutil.walk_packages(gf.__path__, "goodfit.") if "__main__" not in m.name])
def test_examples_in_docstrings_run(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    with warnings.catch_warnings():
        module = importlib.import_module(name)
        globs = {"torch": torch, "nn": torch.nn, **vars(module)}
        assert doctest.testmod(module, extraglobs=globs).failed == 0


def test_no_module_hides_a_public_name() -> None:
    for module in pkgutil.walk_packages(gf.__path__, "goodfit."):
        if "__main__" not in module.name:
            importlib.import_module(module.name)
    modules = {name for name in dir(gf) if isinstance(getattr(gf, name), types.ModuleType)}
    assert modules == {
        "convert",
        "factors",
        "groups",
        "hyper",
        "logs",
        "phases",
        "schedules",
        "spaces",
        "stop",
        "surgery",
        "where",
    }
