"""Whether a saved state is one of this criterion."""

from __future__ import annotations

from goodfit.errors import GoodfitError
from goodfit.phases import State
from goodfit.stop.criterion import Criterion

__all__ = ["refuse_other"]


def refuse_other(criterion: Criterion, saved: State) -> None:
    """Refuse what another criterion remembers; only thresholds and the like may change."""
    here, there = ({name: t.shape for name, t in state.items()} for state in (criterion.init(), saved))
    if here != there:
        odd = min(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        raise GoodfitError(
            f"The state was saved with another criterion than {criterion!r}, of which {odd!r} does not match: on resume its "
            "patience, margins and thresholds may change, and not its kind, k or median."
        )
