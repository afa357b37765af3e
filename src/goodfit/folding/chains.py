"""Which layer stands straight before or behind each batch norm, so that it can take up what the norm does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from goodfit.dataflow.flows import storage
from goodfit.folding.affine import Affine, affine, batch_norms
from goodfit.folding.products import Layer, layers, unique
from goodfit.folding.record import Record

__all__ = ["Pair", "pairs"]


@dataclass(frozen=True, eq=False)
class Pair:
    """A batch norm and the layer that takes it up: a scale and a shift for each of its rows, or of its columns."""

    norm: nn.Module
    layer: nn.Module
    groups: int
    transposed: bool
    before: bool  # the layer stands before the norm: by rows
    scale: Tensor
    shift: Tensor
    rest: nn.Module


def pairs(model: nn.Module, run: Record) -> tuple[list[Pair], dict[nn.Module, str]]:
    """What a run shows: pairs, and why the other batch norms stay."""
    products, names = layers(model, run), {module: name for name, module in model.named_modules()}
    found, kept = [], {}
    for norm in batch_norms(model):
        pair = _pair(norm, run, products, names)
        if isinstance(pair, Pair):
            found.append(pair)
        else:
            kept[norm] = pair
    return found, kept


def _pair(norm: nn.Module, run: Record, products: list[Layer], names: dict[nn.Module, str]) -> Pair | str:
    calls = run.runs[norm]
    if len(calls) != 1:
        return f"runs {len(calls)} times" if calls else "does not run on the example"
    x, y = calls[0]
    acts = affine(norm, x)
    if isinstance(acts, str):
        return acts
    own = [*norm.parameters(), *norm.buffers()]
    if any(norm not in reader.modules for tensor in own for reader in run.reading(tensor)):
        return "has numbers that are read elsewhere too"
    before = next((p for p in products if storage(p.out) == storage(x)), None)
    if before is not None:
        pair = _into_rows(norm, acts, x, before, run)
        if isinstance(pair, Pair):
            return pair
    behind = [p for p in products if [p.product] == run.reading(y)] if isinstance(acts.rest, nn.Identity) else []
    if behind:
        other = _into_columns(norm, acts, y, behind[0], run)
        if isinstance(other, Pair) or before is None:
            return other if isinstance(other, Pair) else f"comes before {names[behind[0].module]}: {other}"
    if before is not None:
        return f"comes after {names[before.module]}: {pair}"
    maker, readers = run.makers.get(storage(x)), run.reading(y)
    source = maker.modules[-1] if maker is not None and maker.modules else norm
    if "weight" not in source._parameters and isinstance(getattr(source, "weight", None), Tensor):
        return f"comes after {names[source]}: its weight is computed"
    origin = maker.call.name if maker is not None else "the input"
    return f"stands between {origin} and {readers[0].call.name if readers else 'the output'}, with no layer at its side"


def _into_rows(norm: nn.Module, acts: Affine, x: Tensor, layer: Layer, run: Record) -> Pair | str:
    others = sorted({r.call.name for r in run.reading(layer.out) if norm not in r.modules})
    if others:
        return f"its output is also read by {', '.join(others)}"
    if storage(layer.out) in run.seen:
        return f"its output {run.seen[storage(layer.out)]}"
    if layer.reason:
        return layer.reason
    channels = unique(layer.out, layer.rows, x, 1, forward=False)
    if channels is None:
        return "its channels are not those of the norm"
    scale = torch.where(channels < 0, 1.0, acts.scale[channels])
    shift = torch.where(channels < 0, 0.0, acts.shift[channels])
    return Pair(norm, layer.module, layer.groups, layer.transposed, True, scale, shift, acts.rest)


def _into_columns(norm: nn.Module, acts: Affine, y: Tensor, layer: Layer, run: Record) -> Pair | str:
    if storage(y) in run.seen:
        return f"what the norm gives {run.seen[storage(y)]}"
    if layer.reason:
        return layer.reason
    if layer.padded and bool(acts.shift.any()):
        return "it pads, and a shift is none at the border"
    channels = unique(y, 1, layer.x, layer.columns, forward=True)
    if channels is None:
        return "its inputs are not the channels of the norm"
    scale, shift = acts.scale[channels], acts.shift[channels]
    return Pair(norm, layer.module, layer.groups, layer.transposed, False, scale, shift, acts.rest)
