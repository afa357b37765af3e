"""Selectors go by the role of a weight, which follows from the module that owns it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from goodfit.where import biases, embeddings, everything, kernels, named, norms, roles


class Zoo(nn.Module):
    """Weights of every role."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch, self.linear = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 4)
        self.lstm, self.attention = nn.LSTM(3, 4), nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.layer, self.group, self.rms, self.instance = (
            nn.LayerNorm((4, 4)),
            nn.GroupNorm(2, 4),
            nn.RMSNorm(4),
            nn.InstanceNorm1d(4, affine=True),
        )
        self.slope, self.embedding, self.bag = nn.PReLU(4), nn.Embedding(5, 4), nn.EmbeddingBag(5, 4)
        self.scale, self.token, self.bias = (
            nn.Parameter(torch.ones(4, 1, 1)),
            nn.Parameter(torch.zeros(1, 1, 4)),
            nn.Parameter(torch.zeros(4)),
        )
        self.home, self.stack = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(2, 3, 4))


KERNELS = {
    "conv.weight",
    "linear.weight",
    "lstm.weight_ih_l0",
    "lstm.weight_hh_l0",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "home",
    "stack",
}
BIASES = {
    "bias",
    "conv.bias",
    "linear.bias",
    "lstm.bias_ih_l0",
    "lstm.bias_hh_l0",
    "attention.in_proj_bias",
    "attention.out_proj.bias",
    "attention.bias_k",
    "attention.bias_v",
}
NORMS = {"rms.weight"} | {f"{name}.{part}" for name in ("batch", "layer", "group", "instance") for part in ("weight", "bias")}
EMBEDDINGS = {"embedding.weight", "bag.weight"}
OTHER = {"slope.weight", "scale", "token"}


def test_every_weight_has_one_role() -> None:
    model = Zoo()
    found = {s: set(s.select(model)) for s in (kernels, biases, norms, embeddings)}
    assert found == {kernels: KERNELS, biases: BIASES, norms: NORMS, embeddings: EMBEDDINGS}
    assert set(everything.select(model)) == dict(model.named_parameters()).keys() == set().union(*found.values()) | OTHER


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (kernels & named("attention.*"), {"attention.in_proj_weight", "attention.out_proj.weight"}),
        (embeddings | named("scale"), EMBEDDINGS | {"scale"}),
        (kernels & ~named("*_l0") & ~named("attention.*"), {"conv.weight", "linear.weight", "home", "stack"}),
        (~(kernels | biases | norms | embeddings), OTHER),
        (named("*.weight_[ih]h_l?"), {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}),
        (named("CONV.*"), set()),
    ],
    ids=repr,
)
def test_selectors_combine(selector: object, expected: set[str]) -> None:
    assert set(selector.select(Zoo())) == expected


def test_the_order_is_the_models() -> None:
    model = Zoo()
    assert everything.select(model) == [name for name, _ in model.named_parameters()]


def test_a_selector_is_a_value_that_prints_as_it_is_written() -> None:
    one = kernels & ~named("head.*") | biases
    assert one == kernels & ~named("head.*") | biases
    assert hash(one) == hash(kernels & ~named("head.*") | biases)
    assert eval(repr(one), {"kernels": kernels, "named": named, "biases": biases}) == one


def test_the_direction_of_a_parametrized_layer_is_its_kernel() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), parametrizations.spectral_norm(nn.Conv1d(3, 2, 3)))
    assert roles(model) == {
        "0.bias": "bias",
        "0.parametrizations.weight.original0": "other",  # the length of each row
        "0.parametrizations.weight.original1": "kernel",
        "1.bias": "bias",
        "1.parametrizations.weight.original": "kernel",
    }


@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_kernel_tied_to_an_embedding_is_an_embedding_under_its_first_name(embedding_first: bool) -> None:
    table, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = table.weight
    layers = [("table", table), ("head", head)]
    model = nn.ModuleDict(layers if embedding_first else layers[::-1])
    name = "table.weight" if embedding_first else "head.weight"
    assert roles(model) == {name: "embedding"}
    assert kernels.select(model) == []
    assert everything.select(model) == [name] == [n for n, _ in model.named_parameters()]


def test_a_layer_that_is_used_twice_counts_once() -> None:
    layer = nn.Linear(2, 2)
    assert kernels.select(nn.Sequential(layer, nn.ReLU(), layer)) == ["0.weight"]
