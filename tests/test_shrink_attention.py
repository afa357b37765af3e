"""Shrinking attention: whole heads go, in torch's own layers and in those of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import goodfit as gf
from goodfit.shrinking.attention import NarrowAttention
from goodfit.surgery.proof import answers, largest_error

SERIES = torch.randn(3, 5, 8, dtype=torch.float64)


class Around(nn.Module):
    """Attention between linear layers, as a model calls it."""

    def __init__(self, need_weights: bool, **options: Any) -> None:
        super().__init__()
        self.before, self.after, self.need_weights = nn.Linear(8, 8), nn.Linear(8, 3), need_weights
        self.attention = nn.MultiheadAttention(8, 4, **options)
        nn.init.normal_(self.attention.in_proj_bias) if options.get("bias", True) else None

    def forward(self, x: Tensor, padding: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        h = self.before(x)
        out, _ = self.attention(h, h, h, key_padding_mask=padding, attn_mask=mask, need_weights=self.need_weights)
        return self.after(torch.relu(out))


def headless(attention: nn.MultiheadAttention, *heads: int) -> None:
    for head in heads:
        attention.out_proj.weight.detach()[:, head * attention.head_dim : (head + 1) * attention.head_dim] = 0


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_heads_that_nothing_reads(need_weights: bool, batch_first: bool, bias: bool) -> None:
    model = Around(need_weights, batch_first=batch_first, bias=bias)
    headless(model.attention, 1, 2)
    before = copy.deepcopy(model)
    result = gf.shrink(model, SERIES)
    assert isinstance(model.attention, NarrowAttention)
    assert (model.attention.num_heads, tuple(model.attention.in_proj_weight.shape)) == (2, (12, 8))
    assert result.parameters[0] - result.parameters[1] == 3 * 4 * 8 + 3 * 4 * bias + 4 * 8
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
    x = SERIES if batch_first else SERIES.transpose(0, 1).contiguous()
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for example in (torch.randn(2, 4, 8), torch.randn(4, 8), (x, padding), (x, padding, causal), (x, None, causal.double())):
        assert largest_error(answers(before, example), answers(model, example))[0] <= 1
    copy.deepcopy(model).train()(SERIES).sum().backward()


def test_a_head_whose_values_are_constant() -> None:
    model = Around(False, batch_first=True)
    rows = torch.arange(2 * 8 + 2, 2 * 8 + 4)  # the values of head 1; their bias is not zero, and weights sum to one
    model.attention.in_proj_weight.detach()[rows] = 0
    before = copy.deepcopy(model)
    result = gf.shrink(model, SERIES)
    assert ("attention", "heads", 1, 4) in result.removed
    fresh = torch.randn(2, 9, 8)
    assert largest_error(answers(before, fresh), answers(model, fresh))[0] <= 1


def test_encoder_layers() -> None:
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3))
    for one in model[1].layers:
        headless(one.self_attn, 0)
        one.linear1.weight.detach()[[3, 5]] = 0
    before = copy.deepcopy(model)
    result = gf.shrink(model, SERIES)
    assert [(what, count) for _, what, count, _ in result.removed if what == "heads"] == [("heads", 1)] * 2
    assert [one.linear1.out_features for one in model[1].layers] == [14, 14]
    fresh = torch.randn(4, 6, 8)
    assert largest_error(answers(before, fresh), answers(model, fresh))[0] <= 1


def test_weights_that_are_returned_keep_their_heads() -> None:
    class Shown(Around):
        def forward(self, x: Tensor, *masks: Tensor | None) -> Any:  # type: ignore[override]
            return self.attention(self.before(x), x, x)

    model = Shown(True)
    headless(model.attention, 1)
    assert not gf.shrink(model, SERIES).removed
    assert type(model.attention) is nn.MultiheadAttention


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 50}
HF: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "BERT": ("Bert", SMALL, "attention.output.dense", "intermediate.dense"),
    "DistilBERT": (
        "DistilBert",
        {"dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 32, "vocab_size": 50},
        "attention.out_lin",
        "ffn.lin1",
    ),
    "GPT-2": (
        "GPT2",
        {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 16},
        "attn.c_proj",
        "mlp.c_fc",
    ),
    "Llama": ("Llama", {**SMALL, "num_key_value_heads": 4}, "self_attn.o_proj", "mlp.up_proj"),
}


@pytest.mark.parametrize("case", HF)
def test_transformers(case: str) -> None:
    name, numbers, out, hidden = HF[case]
    config = getattr(transformers, f"{name}Config")(**numbers, use_cache=False, bos_token_id=1, eos_token_id=2)
    model = getattr(transformers, f"{name}Model")(config).double().eval()
    for path, module in model.named_modules():
        columns = 0 if case == "GPT-2" else 1
        if path.endswith(out):
            module.weight.detach().narrow(columns, 6, 6).zero_()
        elif path.endswith(hidden):
            module.weight.detach().index_fill_(1 - columns, torch.tensor([1, 4, 7]), 0)
    before = copy.deepcopy(model)
    result = gf.shrink(model, {"input_ids": torch.randint(3, 50, (2, 7))})
    counts = [(what, count) for layer, what, count, _ in result.removed if what == "heads" or layer.endswith(hidden)]
    assert sorted(counts) == [("heads", 1)] * 2 + [("units", 3)] * 2
    fresh = {"input_ids": torch.randint(3, 50, (3, 9))}
    assert largest_error(answers(before, fresh), answers(model, fresh))[0] <= 1
