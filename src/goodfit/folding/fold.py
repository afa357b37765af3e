"""`gf.fold_batchnorm`: put what batch norms do in eval mode into the weights beside them, and prove that nothing changed."""

from __future__ import annotations

from typing import Any

from torch import nn

from goodfit.batchnorms.resting import settle_biases
from goodfit.errors import GoodfitError
from goodfit.folding.affine import batch_norms
from goodfit.folding.chains import pairs
from goodfit.folding.folded import Folded
from goodfit.folding.record import record
from goodfit.folding.trials import Folding
from goodfit.surgery.cost import milliseconds
from goodfit.surgery.refusals import refuse_unfit

__all__ = ["fold_batchnorm"]

_FUNCTION = "calls batch_norm as a function, whose numbers belong to no layer"


def fold_batchnorm(model: nn.Module, example: Any) -> Folded:
    """Fold each batch norm into the linear or convolution at its side; in eval mode the model then says the same.

    Formula:  with s = γ / √(var + eps) and t = β − s · mean: s(Wx + b) + t = (sW)x + (sb + t) for a norm behind the layer,
              W(sx + t) + b = (Ws)x + (b + Wt) for one before it, channel by channel, in float64 and rounded once.
    Shapes:   the example is one input batch as the model takes it (a tensor, a tuple of positions, a dict of keywords).
              Linear, Conv1d to 3d and ConvTranspose1d to 3d, grouped or not; a norm before a layer that pads goes if its
              shift is 0. Through Identity, dropout, and views that keep channels apart, such as flatten.
    Ranges:   the largest difference of outputs, relative to the largest output, is at most 1e-10 in float64, 1e-5 in float32,
              1e-2 in float16 and 5e-2 in bfloat16: on the example, on other numbers in its shape, and on other numbers of
              rows, lengths and image sizes that the model takes. Where a model in float32 loses more than that by its own
              rounding, it may be up to 1e-3, if in a copy in float64 it is at most 1e-10 and the folded model is at most
              twice as far from that copy as the model was. Equality is claimed for finite inputs in eval mode; a branch
              that the example never takes is not seen.
    Errors:   GoodfitError, with the model untouched, for wrapped, compiled, scripted, exported, lazy, sparse or quantized
              models, for one that does not run on the example, for outputs that cannot be read (they must be tensors, in
              tuples, lists, dicts, data classes or other objects with attributes), and if there are batch norms but none can
              be folded. One that must stay while others go is told in `kept`, with the reason: shared, hooked or tied layers,
              outputs that are read elsewhere too, norms that go by their batch, batch_norm as a function.
    Source:   Jacob et al., Quantization and training of neural networks, 2018, arXiv:1712.05877, section 3.2.

    In place: `result.model is model`, and weights stay the same objects; a layer without a bias gets one. So a `state_dict`
    that was taken before, but not copied, changes with it. Fold when training is over: in train mode the model no longer
    normalizes by its batch, and the keys of the norms leave its `state_dict`.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU())
    >>> result = fold_batchnorm(model, torch.ones(4, 2))
    >>> result.folded, model[1]
    ((('1', '0'),), Identity())
    """
    refuse_unfit(model, "fold_batchnorm")
    names = {module: name for name, module in model.named_modules()}
    folding = Folding(model, example)
    try:
        kept = _fold_all(model, example, folding)
        if kept and not folding.folded:
            shown = "; ".join(f"{names[module]} {reason}" for module, reason in list(kept.items())[:5])
            more = f" and {len(kept) - 5} more" if len(kept) > 5 else ""
            raise GoodfitError(f"fold_batchnorm can fold no batch norm of {type(model).__name__}: {shown}{more}.")
        latency = _measured(model, example, folding)
    except BaseException:
        folding.restore()
        raise
    settle_biases(model)
    done = tuple((names[pair.norm], names[pair.layer]) for pair in folding.folded)
    stays = tuple((names[module], reason) for module, reason in kept.items())
    return Folded(model, done, stays, latency, folding.error)


def _fold_all(model: nn.Module, example: Any, folding: Folding) -> dict[nn.Module, str]:
    """Fold until nothing more can be: a norm behind a norm finds its layer in the next round. Returns what stays, and why."""
    while True:
        run = record(model, example)
        found, kept = pairs(model, run)
        tried = {*folding.spoiled, *(pair.norm for pair in folding.folded)}
        found = [pair for pair in found if pair.norm not in tried]
        if not found:
            norms = batch_norms(model)
            functions = {module: _FUNCTION for module in run.functions if module not in norms}
            return {**kept, **folding.spoiled, **functions}
        del run
        folding.grow(found)


def _measured(model: nn.Module, example: Any, folding: Folding) -> tuple[float, float]:
    """Milliseconds before and after, in turns."""
    if not folding.folded:
        now = milliseconds(model, example)
        return now, now
    before, after = [], []
    for _ in range(3):
        folding.restore()
        before.append(milliseconds(model, example))
        folding.apply(folding.folded)
        after.append(milliseconds(model, example))
    return sorted(before)[1], sorted(after)[1]
