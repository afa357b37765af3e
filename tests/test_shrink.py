"""Shrinking: what is exactly zero goes, what it still emits is folded, and the model says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import goodfit as gf
from goodfit import GoodfitError
from nets import Net, settled
from shrinking import IMAGES, ROWS, removed, shrunk, zero


def test_units_of_a_perceptron() -> None:
    model = settled(nn.Sequential(zero(nn.Linear(4, 8), 1, 2, 5, bias=0.7), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Linear(8, 3)))
    result = shrunk(model, ROWS, torch.randn(9, 4))
    assert result.parameters == (4 * 8 + 8 + 16 + 8 * 3 + 3, 4 * 5 + 5 + 10 + 5 * 3 + 3)
    assert removed(result) == {("0", "units"): 3}
    assert (model[0].out_features, model[1].num_features, model[3].in_features) == (5, 5, 5)
    assert result.flops == (2 * 5 * (4 * 8 + 8 * 3), 2 * 5 * (4 * 5 + 5 * 3))
    assert "0: 3 of 8 units removed" in str(result)
    assert min(result.latency) > 0


def test_what_zero_units_emit_goes_into_the_next_bias() -> None:
    first, last = zero(nn.Linear(2, 3), 1, bias=2.0), nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        last.weight.copy_(torch.tensor([[1.0, 10.0, 1.0]]))
    model = nn.Sequential(first, nn.ReLU(), last)
    shrunk(model, torch.randn(4, 2))
    assert model[2].bias.tolist() == [20.0]
    assert model[2].weight.tolist() == [[1.0, 1.0]]


def test_units_that_nothing_reads() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].weight.detach()[:, [1, 3]] = 0
    assert shrunk(model, ROWS).parameters == (44, 44 - 2 * 5 - 2 * 2)


def test_units_whose_readers_go() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), zero(nn.Linear(6, 6), 0, 1), nn.ReLU(), nn.Linear(6, 2))
    model[2].weight.detach()[2:, 4] = 0
    assert removed(shrunk(model, ROWS)) == {("0", "units"): 1, ("2", "units"): 2}


def test_batch_norm_with_zero_scale() -> None:
    model = settled(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)))
    model[1].weight.detach()[[0, 2]] = 0
    assert removed(shrunk(model, ROWS)) == {("0", "units"): 2}


def test_constants_before_padding_are_merged_into_one() -> None:
    model = nn.Sequential(zero(nn.Conv2d(3, 6, 3), 0, 1, 2, bias=0.5), nn.ReLU(), nn.Conv2d(6, 2, 3, padding=1))
    result = shrunk(model, IMAGES, torch.randn(1, 3, 9, 9))
    assert removed(result) == {("0", "filters"): 2}
    assert result.kept == (("0.weight", 1, "carries the constants of others, which padding needs"),)
    assert not gf.shrink(model, IMAGES).removed  # again: nothing, and no error


def test_zeros_before_padding_go_whole() -> None:
    model = nn.Sequential(zero(nn.Conv2d(3, 6, 3), 0, 1, bias=-0.5), nn.ReLU(), nn.Conv2d(6, 2, 3, padding=1))
    assert removed(shrunk(model, IMAGES)) == {("0", "filters"): 2}
    assert model[2].in_channels == 4


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_all_ranks(rank: int, transposed: bool) -> None:
    conv = getattr(nn, f"Conv{rank}d")
    inner = getattr(nn, f"ConvTranspose{rank}d") if transposed else conv
    norm = getattr(nn, f"BatchNorm{rank}d")
    second = inner(6, 8, 2)
    model = nn.Sequential(zero(conv(3, 6, 2), 1, 4), nn.ReLU(), second, norm(8), nn.PReLU(8), conv(8, 2, 1))
    settled(model)
    zero(second, 0, 3, 5, axis=int(transposed))
    result = shrunk(model, torch.randn(2, 3, *[5] * rank), torch.randn(1, 3, *[6] * rank))
    assert removed(result) == {("0", "filters"): 2, ("2", "filters"): 3}
    assert (second.in_channels, second.out_channels, model[4].num_parameters) == (4, 5, 5)


def test_depthwise() -> None:
    middle = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    model = nn.Sequential(zero(nn.Conv2d(3, 6, 3), 0, 1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(6, 2, 1))
    assert removed(shrunk(model, IMAGES)) == {("0", "filters"): 2, ("2", "filters"): 2}
    assert (middle.groups, tuple(middle.weight.shape)) == (4, (4, 1, 3, 3))


def test_depthwise_with_several_filters_each() -> None:
    middle = nn.Conv1d(4, 8, 3, groups=4)
    model = nn.Sequential(zero(nn.Conv1d(3, 4, 3), 1), nn.ReLU(), middle, nn.ReLU(), nn.Conv1d(8, 2, 1))
    shrunk(model, torch.randn(2, 3, 9))
    assert (middle.groups, middle.in_channels, middle.out_channels) == (3, 3, 6)


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_shrink_evenly(transposed: bool) -> None:
    middle = (nn.ConvTranspose1d if transposed else nn.Conv1d)(8, 8, 3, groups=2)
    # inputs: three zeros in the first group, one in the second; outputs: one and two
    first = zero(nn.Conv1d(3, 8, 3), 0, 2, 3, 5)
    if transposed:
        middle.weight.detach()[:4, 1] = 0
        middle.weight.detach()[4:, [0, 2]] = 0
        middle.bias.detach()[[1, 4, 6]] = 0.25
    else:
        zero(middle, 1, 4, 6, bias=0.25)
    model = nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), nn.Conv1d(8, 2, 1))
    assert removed(shrunk(model, torch.randn(2, 3, 9))) == {("0", "filters"): 2, ("2", "filters"): 2}
    assert (middle.groups, middle.in_channels, middle.out_channels) == (2, 6, 6)


def test_a_whole_group_goes() -> None:
    middle = zero(nn.Conv1d(6, 6, 3, groups=3), 2, 3)
    model = nn.Sequential(zero(nn.Conv1d(3, 6, 3), 2, 3), nn.ReLU(), middle, nn.ReLU(), nn.Conv1d(6, 2, 1))
    shrunk(model, torch.randn(2, 3, 9))
    assert (middle.groups, tuple(middle.weight.shape)) == (2, (4, 2, 3))


def test_flatten_between_convolution_and_linear() -> None:
    model = nn.Sequential(zero(nn.Conv2d(3, 4, 3), 1, bias=0.5), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    result = shrunk(model, IMAGES)
    assert model[3].in_features == 3 * 36
    assert result.parameters == (4 * 27 + 4 + 144 * 5 + 5, 3 * 27 + 3 + 108 * 5 + 5)


def convs(*sizes: int) -> dict[str, nn.Module]:
    return {name: nn.Conv2d(i, o, 3, padding=1) for name, i, o in zip("abcdef", sizes, sizes[1:], strict=False)}


def test_a_residual_channel_that_one_side_feeds_stays() -> None:
    layers = convs(3, 6, 6, 6, 2)
    zero(layers["a"], 0, 1), zero(layers["b"], 1, 4), zero(layers["c"], 0, 1, 2)
    model = Net(lambda m, x: m.d(F.relu((h := F.relu(m.a(x))) + m.c(F.relu(m.b(h))))), **layers)
    result = shrunk(model, IMAGES)
    assert removed(result) == {("a", "filters"): 2, ("b", "filters"): 2, ("c", "filters"): 2}
    assert {name: (n, why) for name, n, why in result.kept}["c.weight"] == (1, "is read by d.weight")


def test_concatenation() -> None:
    layers = {"a": zero(nn.Conv2d(3, 4, 3), 1), "b": zero(nn.Conv2d(3, 6, 3), 0, 5), "c": nn.Conv2d(10, 2, 1)}
    model = Net(lambda m, x: m.c(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1)), **layers)
    assert removed(shrunk(model, IMAGES)) == {("a", "filters"): 1, ("b", "filters"): 2}


def test_squeeze_and_excite() -> None:
    layers = {"a": zero(nn.Conv2d(3, 8, 3), 1, 2), "f": nn.Linear(8, 4), "g": nn.Linear(4, 8), "b": nn.Conv2d(8, 2, 3)}

    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        return m.b(x * torch.sigmoid(m.g(F.relu(m.f(x.mean((2, 3))))))[:, :, None, None])

    assert removed(shrunk(Net(forward, **layers), IMAGES)) == {("a", "filters"): 2, ("g", "units"): 2}


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_units_that_a_recurrent_layer_reads(kind: Any) -> None:
    model = Net(lambda m, x: m.b(m.r(F.relu(m.a(x)))[0]), a=zero(nn.Linear(4, 6), 1, 3), r=kind(6, 3), b=nn.Linear(3, 2))
    assert removed(shrunk(model, torch.randn(7, 2, 4), torch.randn(3, 1, 4))) == {("a", "units"): 2}
    assert model.r.input_size == 4


def test_channel_shuffle() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        n, c, h, w = x.shape
        return m.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))

    model = Net(forward, a=zero(nn.Conv2d(3, 8, 3), 1, 3, 5), b=nn.Conv2d(8, 2, 3))  # 1 and 5 are partners, 3 is alone
    assert removed(shrunk(model, IMAGES)) == {("a", "filters"): 2}


def test_pixel_shuffle() -> None:
    first = zero(nn.Conv2d(3, 16, 3), 0, 4, 5, 6, 7)  # all four filters of channel 1, one of channel 0
    model = nn.Sequential(first, nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    assert removed(shrunk(model, IMAGES, torch.randn(1, 3, 6, 7))) == {("0", "filters"): 4}
    assert model[3].in_channels == 3


def test_halves() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = F.relu(m.a(x)).chunk(2, 1)
        return m.b(left) + m.c(right)

    layers = {"a": zero(nn.Conv2d(3, 8, 3), 0, 1, 6), "b": nn.Conv2d(4, 2, 1), "c": nn.Conv2d(4, 2, 1)}
    assert removed(shrunk(Net(forward, **layers), IMAGES)) == {("a", "filters"): 2}


def test_gated_units_go_in_pairs() -> None:
    model = nn.Sequential(zero(nn.Linear(4, 8), 1, 5, 6, bias=0.3), nn.GLU(), nn.Linear(4, 2))
    assert removed(shrunk(model, ROWS)) == {("0", "units"): 2}


def test_embedding_features() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3))
    model[0].weight.detach()[:, [1, 4]] = torch.tensor([0.0, 2.0])
    result = shrunk(model, torch.tensor([[1, 2, 3]]), torch.tensor([[8, 0, 5]]))
    assert removed(result) == {("0", "features"): 2}
    assert model[0].embedding_dim == 4


def test_input_features() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    model[0].weight.detach()[:, [0, 2]] = 0
    result = shrunk(model, ROWS, torch.randn(3, 4))
    assert result.inputs == {"0": (1, 3)}
    assert removed(result) == {("0", "inputs"): 2}
    assert model(torch.randn(7, 4)).shape == (7, 2)
    model[0].weight.detach()[:, 0] = 0
    assert gf.shrink(model, ROWS).inputs == {"0": (1,)}
    assert model[0].take.indices.tolist() == [3]


def test_an_all_zero_layer_keeps_one_unit() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), zero(nn.Linear(6, 5), *range(5), bias=1.0), nn.ReLU(), nn.Linear(5, 2))
    result = shrunk(model, ROWS)
    assert (model[2].out_features, model[0].out_features) == (1, 1)
    assert ("2.weight", 1, "is the last of its layer") in result.kept


def test_a_constant_that_holds_for_one_size_of_input_is_none() -> None:
    inner = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    model = nn.Sequential(zero(nn.Conv2d(3, 4, 3), 1, bias=0.5), inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(GoodfitError, match=r"is read by 4.weight"):
        gf.shrink(model, IMAGES)


def test_a_number_that_passes_through_python_is_no_constant() -> None:
    model = Net(lambda m, x: m.b(F.relu(m.a(x)) * float(x.sum())), a=zero(nn.Linear(4, 6), 1, bias=1.0), b=nn.Linear(6, 2))
    with pytest.raises(GoodfitError, match=r"is read by b.weight"):
        gf.shrink(model, ROWS)


def test_nan_weights_stay_nan() -> None:
    model = nn.Sequential(zero(nn.Linear(4, 6), 2), nn.ReLU(), nn.Linear(6, 2))
    model[0].weight.detach()[3, 0] = float("nan")
    assert removed(shrunk(model, ROWS)) == {("0", "units"): 1}
    assert model(ROWS).isnan().all()


def test_frozen_layers_stay_frozen() -> None:
    model = nn.Sequential(zero(nn.Linear(4, 6), 2), nn.ReLU(), nn.Linear(6, 2))
    model[0].requires_grad_(False)
    shrunk(model, ROWS)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_memory_format_and_half_precision() -> None:
    conv, last = zero(nn.Conv2d(3, 6, 3), 1), nn.Conv2d(6, 2, 3)
    model = nn.Sequential(conv, nn.ReLU(), last).to(memory_format=torch.channels_last)
    shrunk(model, IMAGES.contiguous(memory_format=torch.channels_last))
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    small = nn.Sequential(zero(nn.Linear(4, 6), 2, bias=1.0), nn.ReLU(), nn.Linear(6, 2)).bfloat16()
    result = gf.shrink(small, ROWS.bfloat16())
    assert removed(result) == {("0", "units"): 1}
    assert small[2].bias.dtype == torch.bfloat16


def test_dicts_in_and_several_outputs() -> None:
    def forward(m: Any, u: Tensor, v: Tensor) -> dict[str, Any]:
        h = F.relu(m.a(u))
        return {"one": m.b(h), "two": (m.c(h) + v, 3)}

    model = Net(forward, a=zero(nn.Linear(4, 6), 2), b=nn.Linear(6, 2), c=nn.Linear(6, 1))
    example = {"u": ROWS, "v": torch.randn(5, 1)}
    assert removed(shrunk(model, example)) == {("a", "units"): 1}


def test_a_unit_that_is_returned_stays() -> None:
    model = Net(lambda m, x: (h := F.relu(m.a(x)), m.b(h)), a=zero(nn.Linear(4, 6), 2), b=nn.Linear(6, 2))
    with pytest.raises(GoodfitError, match=r"1 in a.weight: is an output of the model"):
        gf.shrink(model, ROWS)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.sampled_from(["conv", "wide", "depthwise", "grouped", "add", "pool"]), max_size=4))
def test_random_networks_are_never_wrong_and_nothing_dead_stays(seed: int, plan: list[str]) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
    for step in plan:
        kind = {"wide": (8, 3, 0, 1), "depthwise": (8, 3, 1, 8), "grouped": (8, 3, 1, 2)}.get(step, (8, 3, 1, 1))
        act = [nn.ReLU(), nn.GELU(), nn.Sigmoid(), nn.PReLU(8)][int(torch.randint(4, ()))]
        block: list[nn.Module] = [nn.BatchNorm2d(8), act]
        block += [nn.MaxPool2d(3, 1, 1)] if step == "pool" else [nn.Conv2d(8, 8, kind[1], padding=kind[2], groups=kind[3])]
        layers += [Net(lambda m, x: x + m.inner(x), inner=nn.Sequential(*block))] if step == "add" else block
    model = settled(
        nn.Sequential(*layers, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            zero(module, *torch.randperm(8)[: int(torch.randint(0, 6, ()))].tolist(), bias=float(torch.randn(())))
    try:
        result = shrunk(model, torch.randn(2, 3, 12, 12), torch.randn(3, 3, 14, 14))
    except GoodfitError as error:
        kept = [str(error)]
    else:
        kept = [reason for _, count, reason in result.kept if count > (2 if "carries" in reason else 1)]
    limits = ("read by", "smaller than the others", "last group")
    assert all(any(limit in reason for limit in limits) for reason in kept)
