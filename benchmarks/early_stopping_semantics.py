"""What early stopping does in the situations in which systems differ, goodfit and the installed others side by side.

    python benchmarks/early_stopping_semantics.py

A row is a situation, a column a system. A cell is the index, from 0, of the check at which training stops, "never" where it
runs on, "error" where the numbers are refused; in the rows "kept", the check of the weights and buffers with which training
ends. "no": the system has no such setting. A "!" behind it: other than the written rules, which are the first
column. `ReduceLROnPlateau` lowers a rate in place of a stop, and tolerates one check more by its documentation.
"""

from __future__ import annotations

import argparse
import logging
from importlib.metadata import PackageNotFoundError, version

from stopping_peer import cell
from stopping_peers import PEERS
from stopping_rules import SITUATIONS, expected
from table import show, write

DISTRIBUTIONS = {"ignite": "pytorch-ignite", "sklearn": "scikit-learn"}


def title(name: str) -> str:
    """The system with its version."""
    package = PEERS[name].package
    try:
        return f"{name} {version(DISTRIBUTIONS.get(package, package)).split('+')[0]}"
    except PackageNotFoundError:
        return name


def row(name: str) -> dict[str, str]:
    """What the rules say and what each system does."""
    rule = expected(SITUATIONS[name])
    cells = {title(system): cell(kind, SITUATIONS[name]) for system, kind in PEERS.items()}
    right = (rule, "no", "not installed")
    return {"situation": name, "rules": rule} | {system: did if did in right else f"{did} !" for system, did in cells.items()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.disable(logging.WARNING)  # Ignite tells each stop
    rows = [row(name) for name in SITUATIONS]
    show(rows)
    write(rows, __file__)


if __name__ == "__main__":
    main()
