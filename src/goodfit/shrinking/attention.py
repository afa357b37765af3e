"""Attention with fewer heads than its width would make."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from goodfit.dataflow.flows import Rectangle
from goodfit.errors import GoodfitError
from goodfit.shrinking.choice import Choice

__all__ = ["NarrowAttention", "heads_lost", "lower_numbers", "narrow"]

_HEADS = {"heads", "n_head", "n_heads", "num_attention_heads", "num_heads", "num_key_value_heads"}
_WIDTHS = {"all_head_size", "attn_dim", "dim", "embed_dim", "hidden_size", "inner_dim", "split_size", "width"}


class NarrowAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads together are narrower than its outputs; same call, same keys in the state dict.

    softmax(q kᵀ / √d) v for each head of width d, then the output projection. Averaged attention weights are those of the
    heads that are left.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The call of `nn.MultiheadAttention`."""
        single = query.ndim == 2
        if single:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._project(query, key, value)
        mask = _mask(attn_mask, key_padding_mask, q)
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights: Tensor | None = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            attended = F.dropout(weights, self.dropout, self.training) @ v  # type: ignore[arg-type]
        else:
            weights = None
            attended = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = self.out_proj(attended.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if single:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, *given: Tensor) -> list[Tensor]:
        packed = self.in_proj_weight
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if packed is None else packed.chunk(3)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        made = [F.linear(x, w, b) for x, w, b in zip(given, weights, biases, strict=True)]
        return [x.reshape(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2) for x in made]


def _mask(attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as one that is added to the scores (batch, heads, queries, keys)."""
    found: Tensor | None = None
    if attention is not None:
        found = attention.view(len(q), -1, *attention.shape[1:]) if attention.ndim == 3 else attention
    masks = [m for m in (found, None if padding is None else padding[:, None, None, :]) if m is not None]
    added = [q.new_zeros(m.shape).masked_fill(m, float("-inf")) if m.dtype == torch.bool else m for m in masks]
    return sum(added[1:], added[0]) if added else None


def narrow(attention: nn.MultiheadAttention) -> None:
    """Let an attention whose projections were cut run with the heads that are left."""
    if attention.bias_k is not None or attention.add_zero_attn:
        raise GoodfitError("attention with bias_kv or add_zero_attn keeps its heads.")
    rows = attention.out_proj.weight.shape[1]
    attention.num_heads = rows // attention.head_dim
    # tells the fused path of TransformerEncoderLayer, which knows no narrow attention, to stay away
    attention._qkv_same_embed_dim = False
    attention.__class__ = NarrowAttention


def heads_lost(choice: Choice) -> dict[nn.Module, tuple[int, int]]:
    """For each module that attends: how many heads went, of how many."""
    found: dict[nn.Module, tuple[int, int]] = {}
    for rectangle in choice.run.rectangles.values():
        module, gone = rectangle.module, choice.gone(rectangle.ids)
        if module is not None and module in choice.run.attending and not rectangle.even and gone.ndim == 2:
            lost, total = int(gone.all(1).sum()), len(gone)
            # the least, since some views count the heads of all rows of the batch
            if lost and total < found.get(module, (0, total + 1))[1]:
                found[module] = lost, total
    return found


def lower_numbers(rectangles: list[Rectangle], choice: Choice) -> None:
    """Lower the numbers of heads, and widths, that modules keep for their views."""
    changes: dict[tuple[nn.Module, str], int] = {}
    for rectangle in rectangles:
        module, gone = rectangle.module, choice.gone(rectangle.ids)
        if module is None or isinstance(module, nn.MultiheadAttention) or not gone.any():
            continue
        old: dict[str, int] = {k: v for k, v in vars(module).items() if isinstance(v, int) and not isinstance(v, bool)}
        if rectangle.even:
            width, left = gone.shape[1], int((~gone[0]).sum())
            changes |= {(module, k): left for k, v in old.items() if k in _WIDTHS and v == width}
            continue
        for dim, heads in enumerate(gone.shape[:-1]):
            left = heads - int(gone.movedim(dim, 0).flatten(1).all(1).sum())
            if left < heads:
                wide, narrower = heads * gone.shape[-1], left * gone.shape[-1]
                changes |= {(module, k): left for k, v in old.items() if k in _HEADS and v == heads}
                changes |= {(module, k): narrower for k, v in old.items() if k in _WIDTHS and v == wide}
    for (module, name), value in changes.items():
        setattr(module, name, value)
