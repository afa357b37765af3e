"""Which rule follows which operation, by its name or by its kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from goodfit.dataflow import elementwise, moves, products, reductions
from goodfit.dataflow.dependence import Dependence
from goodfit.dataflow.flows import Call

__all__ = ["rule"]

Rule = Callable[[Dependence, Call], None]

_NAMES: dict[Rule, str] = {
    elementwise.same: "clone detach alias _to_copy lift_fresh contiguous",
    elementwise.pointwise: "_prelu_kernel where masked_fill add sub mul div maximum minimum elu celu selu gelu silu mish relu6 "
    "hardswish hardsigmoid hardtanh hardshrink leaky_relu softplus softshrink threshold log_sigmoid_forward tril triu",
    elementwise.like: "zeros_like ones_like full_like empty_like fill zero",
    elementwise.new: "new_empty new_empty_strided new_full new_ones new_zeros",
    elementwise.random: "rand randn randint randperm rand_like randn_like bernoulli normal uniform native_dropout",
    elementwise.copied: "copy",
    moves.move: "_unsafe_view _reshape_alias repeat flip roll index index_select gather pixel_shuffle pixel_unshuffle "
    "channel_shuffle native_channel_shuffle im2col unsafe_split unsafe_split_with_sizes split_with_sizes_copy",
    moves.restrided: "as_strided",
    moves.joined: "cat stack",
    moves.embedding: "embedding",
    moves.glu: "glu",
    reductions.reduction: "mean sum amax amin max min var var_mean std any all argmax argmin prod logsumexp "
    "linalg_vector_norm norm cumsum _softmax _safe_softmax _log_softmax sort topk",
    reductions.batch_norm: "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit_no_training "
    "_batch_norm_no_update _native_batch_norm_legit",
    reductions.layer_norm: "native_layer_norm _fused_rms_norm",
    reductions.group_norm: "native_group_norm",
    products.matrix: "mm addmm",
    products.batched: "bmm baddbmm",
    products.convolution: "convolution",
}
_RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
_READS = {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal", "unique_dim", "_unique2"}
_SPATIAL = re.compile(r"(pool|upsample|reflection_pad|replication_pad)\w*[123]d|constant_pad_nd")


def rule(run: Dependence, call: Call) -> None:
    """Hand on what the operands of one operation depend on to its results."""
    found = _RULES.get(call.name) or _by_kind(call.func, call.name)
    if call.name in _READS:
        run.read(call.inputs[0])
    if call.outputs and (call.inputs or found is elementwise.random):
        try:
            found(run, call)
        except Exception:  # an operand of a kind that the rule does not foresee
            moves.unknown(run, call)
    if run.leaked and any(isinstance(value, int | float) and value != call.usual.get(n) for n, value in call.args.items()):
        # the number may come from the input, by way of Python
        for out in call.outputs:
            run.of(out).taint = torch.ones((1,) * out.ndim, dtype=torch.bool)


def _by_kind(func: Any, name: str) -> Rule:
    if _SPATIAL.search(name):
        return moves.spatial
    if torch.Tag.pointwise in func.tags:
        return elementwise.pointwise
    return moves.move if func.is_view else moves.unknown
