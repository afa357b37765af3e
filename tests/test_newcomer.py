"""Adding a regularizer is one class in one file: the laws, the list, the parser and the command line see it by themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOY = '''
"""A room of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from goodfit.hyper import hyper
from goodfit.phases import Penalty, State, Weights


@dataclass(frozen=True)
class Cosy(Penalty):
    """Keeps weights cosy.

    Formula: lam · Σ log cosh w. Phase: Penalty. Numbers: lam, >= 0, off at 0. Errors: lam < 0. Source: Nobody 2026.

    >>> Cosy(2.0).penalty({"w": torch.zeros(3)}, {})
    tensor(0.)
    """

    lam: float = hyper(0.5, valid="[0, inf)", off=0.0, low=0.1, high=1.0)

    def penalty(self, weights: Weights, state: State) -> Tensor:
        return self.lam * torch.stack([w.cosh().log().sum() for w in weights.values()]).sum()
'''

# The file lies beside the package's own, as if it had been put into the folder.
WITH_TOY = "import sys, goodfit.regularizers as r; r.__path__.append({folder!r}); "


def python(folder: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    start = WITH_TOY.format(folder=str(folder))
    return subprocess.run([sys.executable, "-c", start + code, *words], capture_output=True, text=True, check=False)


def test_one_file_is_all_it_takes(tmp_path: Path) -> None:
    (tmp_path / "cosy.py").write_text(TOY)
    listed = python(tmp_path, "from goodfit.cli import main; main()", "list")
    assert "Cosy  [Penalty]  Keeps weights cosy." in listed.stdout
    assert "source: Nobody 2026." in listed.stdout
    read = python(tmp_path, "import goodfit as gf; print(gf.parse('Cosy(0.25)')[0] == gf.Cosy(lam=0.25), gf.parse('Cosy()'))")
    assert read.stdout == "True Cosy(0.5)\n"
    wrong = python(tmp_path, "from goodfit.cli import main; main()", "fit", "x.csv", "--target", "y", "--cocktail", "Cozy()")
    assert (wrong.returncode, wrong.stderr) == (2, "goodfit: A cocktail knows no regularizer 'Cozy'; did you mean Cosy?\n")
    laws = Path(__file__).parent / "test_laws.py"
    command = f"import pytest; sys.exit(pytest.main(['-p', 'no:cacheprovider', '-k', 'Cosy', {str(laws)!r}]))"
    proved = python(tmp_path, command)
    assert proved.returncode == 0, proved.stdout
    assert "13 passed" in proved.stdout
