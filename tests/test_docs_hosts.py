"""The pages on hosts are true: their blocks run, one after the other, where the host is installed."""

from __future__ import annotations

import ast
import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import goodfit as gf

PAGES = sorted((Path(__file__).parents[1] / "docs" / "hosts").glob("*.md"))


def packages(block: str) -> set[str]:
    """Top-level packages that a block imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_of_a_host_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert any(page.stem in block for block in blocks if "import" in block) or page.stem == "plain"
    missing = [name for block in blocks for name in packages(block) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {missing[0]}")
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    world: dict[str, Any] = {"__name__": "page"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hosts have advice of their own
        warnings.simplefilter("error", gf.GoodfitWarning)
        for number, block in enumerate(blocks):
            exec(compile(block, f"{page.name}:{number}", "exec", dont_inherit=True), world)
    printed = capsys.readouterr().out
    for promised in re.findall(r"print\(.*\)  # (.+?) \.\.\.$", "".join(blocks), re.MULTILINE):
        assert promised in printed
