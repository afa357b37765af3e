"""The house stands: imports point down its floors, files and functions stay small, imports are lazy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "goodfit"
FLOORS = [
    {"errors", "schedules", "defaults", "durable"},
    {
        "hyper",
        "noise",
        "rows",
        "where",
        "axes",
        "factors",
        "groups",
        "blocks",
        "tensors",
        "losses",
        "processes",
        "tally",
        "interrupts",
        "logs",
        "progress",
        "kept",
    },
    {"dataflow", "layers"},
    {"surgery"},
    {"batchnorms", "chain", "folding", "sampling", "shrinking"},
    {"phases", "rates"},
    {"stop"},
    {"regularizers"},
    {"cocktail"},
    {"plan", "hooks", "convert", "spaces"},
    {"accumulation", "views"},
    {"again", "beside", "checks"},
    {"run", "checkpoints"},
    {"stack"},
    {"order", "streams"},
    {"explanation"},
    {"fitting"},
    {"tabular", "report"},
    {"paths"},
    {"launch"},
    {"job", "manual", "results", "terminal"},
    {"cli", "adapters"},
    {"__init__", "__main__"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Names of the goodfit modules that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "goodfit":
            below = node.module.split(".")[1:]
            yield from [".".join(below)] if below else (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("goodfit."))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    for name in imports(path):
        other = name.split(".")[0]
        if other == "__version__" or room(path) == "__init__":
            continue
        below = FLOOR[other] < FLOOR[room(path)]
        beside = FLOOR[other] == FLOOR[room(path)]
        assert below or beside, f"{path.name} stands on floor {FLOOR[room(path)]} and imports {name} from floor {FLOOR[other]}"


def test_no_module_imports_itself_round_a_cycle() -> None:
    modules = {".".join(p.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    graph = {name: {i for i in imports(path) if i in modules} for name, path in modules.items() if name != "__init__"}

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        return any(n == goal or (n not in seen and (seen.add(n) or reaches(n, goal, seen))) for n in graph.get(start, ()))

    assert [name for name in graph if reaches(name, name, set())] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_rooms_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 250
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or node.end_lineno - body[0].lineno < 45, node.name


def test_nothing_unpickles_evaluates_or_opens_a_connection() -> None:
    forbidden = {"eval", "exec", "pickle", "joblib", "marshal", "shelve", "socket", "urllib", "requests", "http", "torch.load"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call):
                names = [ast.unparse(node.func)]
            assert not forbidden & {n for name in names for n in (name, name.split(".")[0])} or names == ["model.eval"], path


def loaded(statement: str) -> set[str]:
    """Top-level packages in memory after a statement, in a fresh interpreter."""
    code = f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_imports_are_lazy() -> None:
    assert not {"torch", "sklearn", "pyarrow", "numpy"} & loaded("import goodfit")
    assert not {"torch", "sklearn", "pyarrow", "numpy", "jinja2"} & loaded("import goodfit.cli")
    hosts = {"lightning", "pytorch_lightning", "transformers", "accelerate"}
    assert not {"sklearn", "pyarrow", "rich", "jinja2", "optuna", *hosts} & loaded(
        "import goodfit as gf; gf.Run; gf.fit; gf.L1"
    )
