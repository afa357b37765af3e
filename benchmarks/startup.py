"""How long it takes to start: `goodfit --help`, `import goodfit`, and what of it is torch.

usage: python benchmarks/startup.py [RUNS]

Each row is a fresh interpreter, the rows taken in turn so that a drifting machine drifts for all. The floor is an
interpreter that does nothing. Prints the table of medians and writes it beside this file as startup.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROWS = {
    "python, nothing (floor)": ["-c", "pass"],
    "goodfit --help": ["-m", "goodfit", "--help"],
    "import goodfit": ["-c", "import goodfit"],
    "import torch": ["-c", "import torch"],
    "import goodfit; goodfit.Run": ["-c", "import goodfit; goodfit.Run"],
}


def seconds(words: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - start


def main(runs: int) -> None:
    for words in ROWS.values():
        seconds(words)
    times: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(runs):
        for name, words in ROWS.items():
            times[name].append(seconds(words))
    table = {name: {"median_s": round(statistics.median(t), 3), "min_s": round(min(t), 3)} for name, t in times.items()}
    print(f"{'':32}{'median s':>10}{'min s':>10}")
    for name, row in table.items():
        print(f"{name:32}{row['median_s']:>10.3f}{row['min_s']:>10.3f}")
    Path(__file__).with_suffix(".json").write_text(json.dumps({"runs": runs, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
