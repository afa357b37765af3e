"""Dropout of attention probabilities."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.hyper import hyper
from goodfit.phases import Build
from goodfit.surgery.attending import attending, hang_rate
from goodfit.surgery.insert import refuse_wrappers
from goodfit.surgery.records import records, remember
from goodfit.where import Where, everything

__all__ = ["AttentionDropout"]


@dataclass(frozen=True)
class AttentionDropout(Build):
    """Attention dropout: in training each attention probability is zero with probability p, the others are scaled up.

    Formula: y = (softmax(q kᵀ / √d) · mask / (1 − p)) v with mask ~ Bernoulli(1 − p) in training; without mask in eval.
    Phase: Build. The number of nn.MultiheadAttention becomes p, and so does the rate of dropout layers that stand straight
        behind a softmax (BERT, timm). Where the code of a module calls F.scaled_dot_product_attention, or F.dropout on a
        softmax, it gets the rate while it runs, whatever number it has itself (attention_dropout, attn_pdrop): p in
        training, 0 in eval. So this also mends code that drops in eval because it gives dropout_p without asking for
        self.training (pytorch#124464). where picks modules by name. Shapes of tensors stay.
    Numbers: p, the probability of a zero, in [0, 1), off at 0.
    Errors: p outside [0, 1); a model in which no attention is found, or none that where picks; a bare leaf, a DDP or compiled
        wrapper. Code with a softmax that no dropout acts on is left out, with a warning.
    Source: Vaswani et al. 2017, Attention is all you need, arXiv 1706.03762; Zehui et al. 2019, DropAttention, arXiv
        1907.11065. The masks are drawn by torch's functions from torch's generator, and so are those of torch's layers.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> AttentionDropout(0.3).build(nn.Sequential(layer), torch.zeros(2, 3, 8))[0].self_attn.dropout
    0.3
    """

    p: float = hyper(0.1, valid="[0, 1)", off=0.0, low=0.0, high=0.5)
    where: Where = everything

    def build(self, model: nn.Module, example: Any) -> nn.Module:
        refuse_wrappers(model, "AttentionDropout")
        found, kind = attending(model, example), type(model).__name__
        places = [*found.numbers, *found.layers, *found.callers]
        chosen = [name for name in places if self.where.holds(name, "place")]
        if not places:
            bare = f"; {found.without[0]!r} has a softmax without dropout on it" if found.without else ""
            raise GoodfitError(
                f"AttentionDropout found no attention in {kind}{bare}: use nn.MultiheadAttention, "
                "F.scaled_dot_product_attention, or a dropout layer behind the softmax."
            )
        if not chosen:
            raise GoodfitError(f"AttentionDropout matched no place (where={self.where}); {kind} has: {', '.join(places[:8])}.")
        if found.without:
            shown = ", ".join(name or kind for name in found.without[:5])
            warnings.warn(
                f"AttentionDropout leaves out {shown}: the code has a softmax without dropout on it.",
                GoodfitWarning,
                stacklevel=3,
            )
        names = [hang_rate(model, name) if name in found.callers else name for name in chosen]
        remember(model, self._key, dict.fromkeys(names, 1.0))
        self.tune(model)
        return model

    def tune(self, model: nn.Module) -> None:
        p = self.at(0).p
        for name, share in records(model).get(self._key, {}).items():
            layer: Any = model.get_submodule(name)
            setattr(layer, "dropout" if isinstance(layer, nn.MultiheadAttention) else "p", p * share)

    @property
    def _key(self) -> str:
        return f"AttentionDropout(where={self.where!r})"
