"""The picture of a path, by matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from goodfit.errors import GoodfitError

if TYPE_CHECKING:
    from goodfit.paths.result import Path

__all__ = ["plot"]


def plot(path: Path, ax: Any = None) -> Any:
    """Score ± standard error against λ, best and 1-SE marked; behind it, on an axis of its own, what is left."""
    if ax is None:
        try:
            from matplotlib import pyplot
        except ImportError:
            raise GoodfitError("path.plot() needs matplotlib, which is not installed; pip install 'goodfit[plot]'.") from None
        _, ax = pyplot.subplots(layout="constrained")
    lams, best, one_se = path.lams, path.best, path.one_se
    bars = [s if math.isfinite(s) else 0.0 for s in path.stderrs]
    ax.errorbar(lams, path.scores, yerr=bars, marker="o", markersize=3, capsize=2, label="validation loss ± se")
    ax.axvline(best.lam, linestyle="--", color="C1", label=f"best, λ = {best.lam:.3g}")
    ax.axvline(one_se.lam, linestyle=":", color="C2", label=f"1-SE, λ = {one_se.lam:.3g}")
    if path.dense is not None:
        ax.axhline(path.dense.score, linewidth=0.8, color="0.6", label="dense")
    ax.set(xscale="log", xlabel="λ", ylabel="validation loss", title=f"path over {type(path.over).__name__}")
    left = ax.twinx()
    features = [p.features for p in path.points]
    told = all(f is not None for f in features)
    counts = [len(f) if f is not None else 0 for f in features] if told else [p.nonzero for p in path.points]
    left.plot(lams, counts, drawstyle="steps-mid", color="0.5", alpha=0.6)
    left.set_ylabel("inputs left" if told else "weights left")
    left.set_ylim(bottom=0)
    ax.legend(fontsize="small")
    return ax
