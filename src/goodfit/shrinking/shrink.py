"""`gf.shrink`: remove what is exactly zero from a model, and prove that it still says the same."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from goodfit.errors import GoodfitError
from goodfit.shrinking.follow import choose, follow
from goodfit.shrinking.search import Search
from goodfit.shrinking.shrunk import BENIGN, Shrunk, kept_zeros, what_went
from goodfit.surgery.cost import flops, milliseconds, size
from goodfit.surgery.proof import Proof
from goodfit.surgery.refusals import refuse_unfit
from goodfit.surgery.snapshot import Snapshot

__all__ = ["shrink"]


def shrink(model: nn.Module, example: Any) -> Shrunk:
    """Remove units, filters, heads and input features that are exactly zero; in eval mode the model then says the same.

    Formula:  W₂ f(W₁x + b₁) + b₂ = W₂[:, A] f(W₁[A]x + b₁[A]) + (b₂ + W₂[:, Z] f(b₁[Z])), where the rows Z of W₁ are zero.
    Shapes:   the example is one input batch as the model takes it (a tensor, a tuple of positions, a dict of keywords); inputs
              and outputs of the model keep their shapes.
    Ranges:   weights count as zero at exactly 0. The largest difference of outputs, relative to the largest output, is at most
              1e-10 in float64, 1e-5 in float32, 1e-2 in float16 and 5e-2 in bfloat16: on the example, on other numbers in its
              shape, and on other numbers of rows, lengths and image sizes that the model takes. Equality is claimed for
              finite inputs in eval mode.
    Errors:   GoodfitError, with the model untouched, for wrapped, compiled, scripted, lazy, sparse or quantized models, for a
              model that does not run on the example, and if there are zero units but none can go. A unit that must stay
              while others go is told in `kept`, with the reason.
    Source:   He, Zhang & Sun, Channel Pruning, 2017, arXiv:1707.06168, for what goes together; here nothing is approximated,
              and constants that zero units still emit are folded into the next bias or, before padding, into one channel.

    Parameters that were cut are new objects: make the optimizer anew. `result.model is model`.

    >>> first = nn.Linear(2, 3)
    >>> _ = nn.init.zeros_(first.weight[1].detach())
    >>> result = shrink(nn.Sequential(first, nn.ReLU(), nn.Linear(3, 1)), torch.ones(1, 2))
    >>> result.parameters
    (13, 9)
    """
    refuse_unfit(model, "shrink")
    proof = Proof(model, example)
    before = Snapshot(model)
    try:
        run = follow(model, example)
        choice, shared = choose(model, run)
        before.restore()
        search = Search(model, choice, shared, before, proof.gap)
        error = search.largest()
    except BaseException:
        before.restore()
        raise
    after = Snapshot(model)
    try:
        return _told(model, example, search, error, before, after)
    except BaseException:
        before.restore()
        raise


def _told(model: nn.Module, example: Any, search: Search, error: float, before: Snapshot, after: Snapshot) -> Shrunk:
    choice = search.choice
    removed = what_went(model, choice, search.inputs)
    kept = kept_zeros(choice)
    if not removed and any(reason not in BENIGN for _, _, reason in kept):
        shown = "; ".join(f"{count} in {name}: {reason}" for name, count, reason in kept[:5])
        more = f" and {len(kept) - 5} more" if len(kept) > 5 else ""
        raise GoodfitError(f"shrink found zero units in {type(model).__name__} but none can be removed: {shown}{more}.")
    measured: dict[str, list[Any]] = defaultdict(list)
    rounds = 3 if removed else 1
    for turn in range(2 * rounds):
        (before if turn % 2 == 0 else after).restore()
        if turn < 2:
            measured["parameters"].append(size(model))
            measured["flops"].append(flops(model, example))
        measured["before" if turn % 2 == 0 else "after"].append(milliseconds(model, example))
    latency = tuple(sorted(measured[when])[rounds // 2] for when in ("before", "after"))
    inputs = {name.rpartition(".")[0]: tuple(taken.tolist()) for name, taken in search.inputs.items()}
    pairs: Any = [tuple(measured[what]) for what in ("parameters", "flops")]
    return Shrunk(model, pairs[0], pairs[1], (latency[0], latency[1]), tuple(removed), tuple(kept), inputs, error)
