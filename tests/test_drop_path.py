"""Drop path: residual additions are found where they are, rows are dropped as the formula says, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import goodfit as gf
from goodfit import DropPath, GoodfitError, GoodfitWarning, Run
from goodfit.layers.path import SeededDropPath
from goodfit.noise import Clock, Noise
from goodfit.surgery.residuals import residuals
from goodfit.where import named
from nets import Net

IMAGES, TOKENS, ROWS = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 4, 6, 6), (3, 5, 8), (4, 8)))


class Bottleneck(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.relu, self.down = nn.ReLU(inplace=True), None
        if stride > 1 or i != o:
            self.down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


class Block(nn.Module):
    """A transformer block whose attention returns a tuple."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.attn, self.n1, self.n2 = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            h = self.n1(x)
            x = x + self.attn(h, h, h)[0]
            return x + self.mlp(self.n2(x))
        x = self.n1(x + self.attn(x, x, x)[0])
        return self.n2(self.mlp(x) + x)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def lin(names: str = "abc") -> dict[str, nn.Module]:
    return {name: nn.Linear(8, 8) for name in names}


def mlps() -> dict[str, nn.Module]:
    return {n: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for n in "ab"} | {"n": nn.LayerNorm(8)}


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.c(x)
    h.add_(m.b(m.a(h)))
    return h


def unet(m: Any, x: Tensor) -> Tensor:
    low = F.relu(m.down(x))
    return m.up(low + m.mid(low)) + x


def scores_with_bias(m: Any, x: Tensor) -> Tensor:
    bias = m.c(x) @ x.transpose(1, 2)
    for _ in range(2):
        x = torch.softmax((m.a(x) @ m.b(x).transpose(1, 2) + bias).float(), -1).to(x.dtype) @ x
    return x


def split(m: Any, x: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat([one, F.relu(m.a(one)) + two], -1)


def twice_used(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return x + h + m.b(h.sin())


UNET = {"down": nn.Conv2d(4, 4, 3, 2, 1), "mid": nn.Conv2d(4, 4, 3, 1, 1), "up": nn.ConvTranspose2d(4, 4, 2, 2)}
SQUARE = torch.randn(2, 8, 8, dtype=torch.float64)
POSITIONS = nn.Parameter(torch.randn(5, 8, dtype=torch.float64))


def cell(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        h = torch.tanh(m.a(x[:, t]) + m.b(h))
    return h


def additive_attention(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.n((torch.softmax(torch.tanh(m.c(x) + m.b(h)), 1) * h).sum(1))


def way_up(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.end(m.up(m.low(F.relu(m.down(h)))) + m.beside(h))


def grown(m: Any, x: Tensor) -> Tensor:
    return m.end(m.b(m.a(m.up(x))) + m.beside(m.up(x)))


def conv(stride: int = 1, size: int = 3) -> nn.Module:
    return nn.Conv2d(4, 4, size, stride, size // 2)


WAY_UP = {"a": conv(), "down": conv(2), "low": conv(), "beside": conv(size=1), "end": conv()}
GROWN = {"a": conv(), "b": conv(), "beside": conv(size=1), "end": conv(), "up": nn.Upsample(scale_factor=2)}
WIDE = {"w": nn.Linear(8, 1), "d": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), "n": nn.Linear(1, 1)}

# model, example, hosts in order; what has no host says why
FOUND: dict[str, tuple[nn.Module, Any, list[str]]] = {
    "resnet": (nn.Sequential(Bottleneck(4, 4, 1), Bottleneck(4, 8, 2)), IMAGES, ["0.bn2", "1.bn2"]),
    "pre-norm": (nn.Sequential(Block(True), Block(True)), TOKENS, ["0.attn", "0.mlp", "1.attn", "1.mlp"]),
    "post-norm": (nn.Sequential(Block(False)), TOKENS, ["0.attn", "0.mlp"]),
    "torch's": (nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), TOKENS, ["0.dropout1", "0.dropout2"]),
    "parallel, one by one": (Net(lambda m, x: x + m.a(m.n(x)) + m.b(m.n(x)), **mlps()), ROWS, ["a", "b"]),
    "parallel, summed first": (Net(lambda m, x: (m.a(h := m.n(x)) + m.b(h)) + x, **mlps()), ROWS, ["a", "b"]),
    "parallel, one is longer": (Net(lambda m, x: (m.c(h := m.n(x)) + m.b(h)) + x, **mlps(), **lin("c")), ROWS, ["c", "b"]),
    "into the skip": (Net(in_place, **lin()), ROWS, ["b"]),
    "layer scale": (Net(lambda m, x: x + 0.1 * m.a(x).view(4, 8), **lin("a")), ROWS, ["a"]),
    "keyword": (Net(lambda m, x: torch.add(x, other=m.a(x)), **lin("a")), ROWS, ["a"]),
    "float functional": (Net(lambda m, x: m.q.add(m.a(x), x), **lin("a"), q=nn.quantized.FloatFunctional()), ROWS, ["a"]),
    "identity": (Net(lambda m, x: x + m.path(m.a(x)), **lin("a"), path=nn.Identity()), ROWS, ["path"]),
    "u-net by addition": (Net(unet, **UNET), IMAGES, ["mid", "up"]),
    "queries that are weights": (Net(lambda m, x: m.q.weight + m.a(m.q(x)), q=nn.Linear(8, 4), a=nn.Linear(4, 8)), ROWS, ["a"]),
    "dense": (Net(lambda m, x: torch.cat([x, m.a(x)], 1), **lin("a")), ROWS, []),
    "gate": (Net(lambda m, x: m.b(x) * torch.sigmoid(m.a(x)), **lin()), ROWS, []),
    "highway": (Net(lambda m, x: (g := torch.sigmoid(m.a(x))) * m.b(x) + (1 - g) * x, **lin()), ROWS, []),
    "twins": (Net(lambda m, x: m.a(x) + m.b(x), **lin()), ROWS, []),
    "recurrent by hand": (Net(cell, **lin()), TOKENS, []),
    "projected": (Net(lambda m, x: m.n(m.w(x) + m.d(x)), **WIDE), ROWS, ["d"]),
    "projected, gated": (Net(lambda m, x: m.n((y := m.w(x) + m.d(x)) * torch.sigmoid(y)), **WIDE), ROWS, ["d"]),
    "projected and grown": (Net(grown, **GROWN), IMAGES, ["b"]),
    "wide and deep": (Net(lambda m, x: (m.w(x) + m.d(x)).squeeze(1), **WIDE), ROWS, []),
    "wide and deep, squashed": (Net(lambda m, x: torch.sigmoid(m.w(x) + m.d(x)).squeeze(1), **WIDE), ROWS, []),
    "additive attention": (Net(additive_attention, **lin(), n=nn.Linear(8, 1)), TOKENS, []),
    "way up": (Net(way_up, up=nn.Upsample(scale_factor=2), **WAY_UP), IMAGES, []),
    "way up, transposed": (Net(way_up, up=nn.ConvTranspose2d(4, 4, 2, 2), **WAY_UP), IMAGES, []),
    "queries and keys": (Net(lambda m, x: m.c(torch.tanh(m.a(x) + m.b(x))), **lin()), ROWS, []),
    "parts": (Net(split, a=nn.Linear(4, 4)), ROWS, []),
    "biased attention": (Net(scores_with_bias, **lin()), TOKENS, []),
    "positions again": (Net(lambda m, x: m.b(m.a(x + POSITIONS) + POSITIONS), **lin()), TOKENS, []),
    "a convolution beside": (Net(lambda m, x: torch.softmax(x, 1) @ (v := m.a(x).mT) + m.b(v), **lin()), SQUARE, []),
    "function": (Net(lambda m, x: x + torch.tanh(m.a(x)), **lin("a")), ROWS, ["is the result of a function, not of a module"]),
    "used twice": (Net(twice_used, **lin("ab")), ROWS, ["is used elsewhere too", "b"]),
    "runs elsewhere": (Net(lambda m, x: m.a(x + m.a(x)), **lin("a")), ROWS, ["comes from a, which runs elsewhere too"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_residual_additions_are_found_with_the_module_that_hands_the_branch_over(case: str) -> None:
    model, example, hosts = copy.deepcopy(FOUND[case][0]).double(), FOUND[case][1].double(), FOUND[case][2]
    found = residuals(model, example)
    assert [r.branch if r.module is not None else r.reason for r in found] == hosts
    assert all(model.get_submodule(r.branch) is r.module for r in found if r.module is not None)
    assert all(r.branch in r.inside for r in found if r.module is not None)
    assert [r.order for r in found] == sorted(r.order for r in found)


def test_what_was_straight_the_branch_is_told_with_the_innermost_first() -> None:
    body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    (one,) = residuals(Net(lambda m, x: x + m.path(m.body(x)), body=body, path=nn.Identity()), IMAGES)
    assert (one.branch, one.straight) == ("path", ("body.1", "body.2", "body", "path"))
    assert one.inside == {"body.0", *one.straight}


def test_branches_that_are_summed_first_are_of_one_block() -> None:
    model, example, _ = FOUND["parallel, summed first"]
    assert [r.order for r in residuals(copy.deepcopy(model).double(), example)] == [0, 0]
    model = DropPath(0.4).build(nn.Sequential(copy.deepcopy(model), Plain()).double(), example)
    assert [m.p for m in layers(model)] == [0.2, 0.2, 0.4]


def layers(model: nn.Module) -> list[SeededDropPath]:
    return [m for m in model.modules() if isinstance(m, SeededDropPath)]


def vit(blocks: int = 2) -> nn.Module:
    return nn.Sequential(*(Block(True) for _ in range(blocks)), nn.Linear(8, 1))


@pytest.mark.parametrize("p", [0.2, 0.6])
def test_each_row_is_kept_and_scaled_or_dropped_as_a_slow_loop_says(p: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Plain(), Plain())
    run = Run(DropPath(p), model, example=ROWS, task="numbers", seed=7)
    x = torch.randn(64, 8)
    for call in range(2):
        y = run.model(x)
        expected = []
        for i in range(64):
            h = model[0](x[i])
            for block, rate in ((1, p / 2), (2, p)):
                noise = Noise(7, f"{block}.f.drop_path", 0, call).uniform(64, 1)[i]
                kept = model[block].f.weight @ h + model[block].f.bias
                h = h + (kept / (1 - rate) if noise >= rate else 0 * kept)
            expected.append(h)
        torch.testing.assert_close(y, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_the_mean_over_many_masks_is_the_output_of_eval() -> None:
    model = DropPath(0.5).build(nn.Sequential(Plain(), nn.Identity()), ROWS)
    x = torch.randn(1, 8)
    kept = model.eval()(x)
    many = model.train()(x.expand(20000, 8))
    assert 0.48 < float((many == x).all(1).double().mean()) < 0.52
    torch.testing.assert_close(many.mean(0, keepdim=True), kept, rtol=0, atol=0.05)


def test_eval_and_p_zero_are_the_identity_and_keys_stay() -> None:
    plain = vit()
    model = DropPath(0.5).build(copy.deepcopy(plain), TOKENS)
    assert torch.equal(model.eval()(TOKENS), plain.eval()(TOKENS))
    model.train(), plain.train()
    assert not torch.equal(model(TOKENS), plain(TOKENS))
    for layer in layers(model):
        layer.p = 0.0
    assert torch.equal(model(TOKENS), plain(TOKENS))
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())


def test_rates_grow_linearly_with_depth_and_where_picks_without_counting_anew() -> None:
    assert [m.p for m in layers(DropPath(0.4).build(vit(), TOKENS))] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert [m.p for m in layers(DropPath(0.4, linear=False).build(vit(), TOKENS))] == [0.4] * 4
    model = DropPath(0.4, where=named("*.mlp")).build(vit(), TOKENS)
    assert {n: m.p for n, m in model.named_modules() if isinstance(m, SeededDropPath)} == {
        "0.mlp.drop_path.layer": 0.2,
        "1.mlp.drop_path.layer": 0.4,
    }


class StochasticDepth(nn.Module):
    """Torchvision's numbers."""

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


class SwinDropPath(nn.Module):
    """The numbers of timm and transformers."""

    def __init__(self, drop_prob: float | None = None) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.drop_prob or 0.0, self.training)


def dropping(path: nn.Module) -> nn.Module:
    return Net(lambda m, x: x + m.path(m.a(x)), **lin("a"), path=path)


def test_stochastic_depth_that_is_there_gets_the_rate_and_stays_the_only_one() -> None:
    paths = (nn.Identity(), StochasticDepth(0.2, "row"), SwinDropPath(None), SwinDropPath(0.1))
    model = nn.Sequential(*map(dropping, paths))
    one = DropPath(0.4).build(model, ROWS)
    assert [m.p for m in layers(one)] == [0.1]
    assert model[0].path.drop_path is layers(one)[0]
    assert (model[1].path.p, model[2].path.drop_prob, model[3].path.drop_prob) == pytest.approx((0.2, 0.3, 0.4))
    DropPath(0.8).at(0).tune(one)
    assert model[3].path.drop_prob == 0.8


def test_a_block_around_blocks_that_drop_gets_no_layer_of_its_own() -> None:
    model = Net(lambda m, x: x + m.c(m.a(x)), a=dropping(SwinDropPath(0.1)), c=nn.Linear(8, 8))
    assert layers(DropPath(0.4).build(model, ROWS)) == []
    assert model.a.path.drop_prob == 0.4


def test_a_layer_that_stands_before_no_addition_counts_where_it_runs() -> None:
    model = nn.Sequential(Plain(), nn.Linear(8, 8), SwinDropPath(0.1), nn.Linear(8, 8), Plain())
    DropPath(0.3).build(model, ROWS)
    assert [model[0].f.drop_path.p, model[2].drop_prob, model[4].f.drop_path.p] == pytest.approx([0.1, 0.2, 0.3])


def test_one_layer_for_a_whole_block_is_as_deep_as_its_last_use_and_for_blocks_apart_is_refused() -> None:
    block = Net(lambda m, x: (h := x + m.path(m.a(x))) + m.path(m.b(h)), **lin("ab"), path=nn.Identity())
    model = DropPath(0.4).build(nn.Sequential(block, Plain()), ROWS)
    assert [m.p for m in layers(model)] == pytest.approx([0.8 / 3, 0.4])
    shared = Plain()
    with pytest.raises(GoodfitError, match=r"cannot give 0\.f a rate by its depth, since it runs in blocks 1, 3: say linear"):
        DropPath(0.4).build(nn.Sequential(shared, Plain(), shared), ROWS)
    model = DropPath(0.4, linear=False).build(nn.Sequential(shared, Plain(), shared), ROWS)
    assert [m.p for m in layers(model)] == [0.4, 0.4]


def test_rows_may_be_on_the_second_axis() -> None:
    model = nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False))
    DropPath(0.5, linear=False).build(model, torch.randn(4, 4, 8))  # as long as it is wide
    assert [m.axis for m in layers(model)] == [1, 1]
    layer = layers(model)[0].train()
    y = layer(torch.ones(3, 200, 8))
    assert {tuple(row.unique().tolist()) for row in y.unbind(1)} == {(0.0,), (2.0,)}


EXAMPLES = {"zeros": torch.zeros(7, 3, 16), "one each": torch.randn(1, 1, 16), "batch of one": torch.randn(5, 1, 16)}
EXAMPLES |= {
    "numbers": torch.randn(5, 3, 16),
    "square": torch.ones(4, 4, 16),
    "a row again": torch.randn(5, 1, 16).expand(-1, 3, -1),
}


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("first", [False, True])
def test_the_rows_are_found_whatever_the_numbers_of_the_example(first: bool, example: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=first)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    DropPath(0.5).build(model, EXAMPLES[example].double())
    assert [m.axis for m in layers(model)] == [0 if first else 1] * 4


class Recurrent(nn.Module):
    """A residual network on each step by itself, then a recurrent one; what it returns is said by `out`."""

    def __init__(self, first: bool, out: Callable[..., Any]) -> None:
        super().__init__()
        self.body, self.rnn, self.out = Plain(), nn.LSTM(8, 8, batch_first=first), out

    def forward(self, x: Tensor) -> Any:
        return self.out(self.rnn(self.body(x)))


OUTS = (lambda y: y, lambda y: y[0], lambda y: y[1][0][-1], lambda y: (y[0].flatten(0, 1), y[1]))


@pytest.mark.parametrize("example", [torch.zeros(7, 3, 8), torch.randn(5, 3, 8), torch.randn(1, 1, 8), torch.randn(4, 4, 8)])
@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("first", [False, True])
def test_where_two_axes_fit_the_whole_model_says_which_has_the_rows(
    first: bool, out: Callable[..., Any], example: Tensor
) -> None:
    model = DropPath(0.5).build(Recurrent(first, out), example.double())
    assert [m.axis for m in layers(model)] == [0 if first else 1]


def test_rows_of_tokens_are_found_where_all_are_the_same() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), Block(True))
    assert [m.axis for m in layers(DropPath(0.5).build(model, torch.zeros(2, 5, dtype=torch.long)))] == [0, 0]


def test_rows_that_may_be_on_two_axes_are_refused_and_in_another_block_are_left_to_it() -> None:
    with pytest.raises(GoodfitError, match=r"cannot tell the rows of 0\.f in Sequential: no axis .* alone, or two do"):
        DropPath(0.5).build(nn.Sequential(Plain(), nn.Tanh()), torch.randn(5, 3, 8))
    model = Net(lambda m, x: m.b(m.a(x)).mean(), a=Plain(), b=Block(True))  # a scalar tells nothing
    assert [m.axis for m in layers(DropPath(0.5).build(model, torch.randn(5, 3, 8)))] == [0, 0, 0]


def test_rows_that_do_not_show_are_left_out_or_refused() -> None:
    flat = Net(lambda m, x: (h := x.flatten(0, 1)) + m.a(h), **lin("a"))
    with pytest.raises(GoodfitError, match=r"cannot tell the rows of a in Net: no axis of its output follows"):
        DropPath(0.5).build(flat, TOKENS)
    assert not flat.a._forward_hooks
    with pytest.warns(GoodfitWarning, match=r"DropPath leaves out 1\.a, whose rows do not show\."):
        model = DropPath(0.5).build(nn.Sequential(Block(True), flat).double(), TOKENS)
    assert [m.p for m in layers(model)] == pytest.approx([0.5 / 3, 1 / 3])


@pytest.mark.parametrize("case", ["dense", "twins", "function"])
def test_a_model_without_a_place_is_refused_and_stays_as_it_was(case: str) -> None:
    model = copy.deepcopy(FOUND[case][0])
    with pytest.raises(GoodfitError, match=r"found no residual addition|each residual addition is the result of a function"):
        DropPath(0.5).build(model.double(), FOUND[case][1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_branch_without_a_module_is_left_out_aloud() -> None:
    model = nn.Sequential(Plain(), copy.deepcopy(FOUND["function"][0]))
    with pytest.warns(GoodfitWarning, match=r"leaves out block 2, whose branch is the result of a function"):
        DropPath(0.4).build(model.double(), ROWS)
    assert [m.p for m in layers(model)] == [0.2]


def test_what_where_does_not_pick_is_told() -> None:
    with pytest.raises(GoodfitError, match=r"matched no branch \(where=named\('x'\)\); Sequential has: 0\.attn, 0\.mlp,"):
        DropPath(0.4, where=named("x")).build(vit(), TOKENS)
    with pytest.raises(GoodfitError, match="a place has no role"):
        DropPath(0.4, where=gf.where.kernels)


def test_a_layer_that_runs_several_times_in_a_row_has_the_rate_of_the_last() -> None:
    def loop(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + 0.1 * m.a(x)
        return x + m.b(x)

    model = DropPath(0.4).build(Net(loop, **lin("ab")), ROWS)
    assert [m.p for m in layers(model)] == pytest.approx([0.8 / 3, 0.4])


def test_two_regularizers_and_a_schedule_move_their_own_layers() -> None:
    model = vit()
    cocktail = (
        DropPath(gf.schedules.linear(0.0, 0.4, steps=2), where=named("0.*"), linear=False),
        DropPath(0.1, where=named("1.*"), linear=False),
    )
    run = Run(cocktail, model, example=TOKENS, task="numbers")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rates = []
    for _ in range(3):
        rates.append([m.p for m in layers(model)])
        run.loss(TOKENS, torch.randn(3, 5)).backward()
        run.gradient(optimizer)
        optimizer.step()
        run.step(optimizer)
    assert rates == [[0.0, 0.0, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1]]


def test_building_twice_doubles_nothing() -> None:
    model = DropPath(0.2, linear=False).build(vit(), TOKENS)
    before = [id(m) for m in model.modules()]
    DropPath(0.3, linear=False).build(model, TOKENS)
    assert [id(m) for m in model.modules()] == before
    assert [m.p for m in layers(model)] == [0.3] * 4
    assert all(len(m._forward_hooks) <= 1 for m in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_act_by_themselves(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = DropPath(0.5).build(vit(), TOKENS)
    other = copied(model)
    x = torch.randn(16, 5, 8)
    assert torch.equal(model(x), other(x))
    DropPath(0.0).tune(other)
    assert [m.p for m in layers(other)] == [0.0] * 4
    assert layers(model)[-1].p == 0.5
    assert torch.equal(other(x), model.eval()(x))


def test_building_leaves_all_else_as_it_was() -> None:
    model = nn.Sequential(Bottleneck(4, 4, 1), Bottleneck(4, 8, 2))
    model[1].bn1.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    tensors, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    DropPath(0.5).build(model, IMAGES)
    assert {n: m.training for n, m in model.named_modules() if n in modes} == modes
    assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(GoodfitError, match="must run on the example"):
        DropPath(0.5).build(vit(), torch.randn(3, 5, 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_works_in_any_precision_and_memory_format(dtype: torch.dtype) -> None:
    model = DropPath(0.5).build(nn.Sequential(Bottleneck(4, 4, 1), Bottleneck(4, 8, 2)).to(dtype), IMAGES.to(dtype))
    assert len(layers(model)) == 2
    y = layers(model)[1](torch.ones(9, 4, 5, 5, dtype=dtype).to(memory_format=torch.channels_last))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert set(y.unique().tolist()) == {0.0, 2.0}


def test_a_tuple_passes_but_for_its_first() -> None:
    layer = SeededDropPath(p=0.5)
    first, second = layer((torch.ones(50, 2), torch.ones(50)))
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(second, torch.ones(50))


def test_masks_are_drawn_again_in_checkpointing() -> None:
    class Checked(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for one in self:
                x = checkpoint(one, x, use_reentrant=False)
            return x

    plain = nn.Sequential(Plain(), Plain())
    gradients = []
    for kind in (nn.Sequential, Checked):
        model = DropPath(0.5).build(kind(*copy.deepcopy(plain)), ROWS)
        for layer in layers(model):
            layer.bind(layer.name, 3, Clock())
        model(ROWS).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_wrapped_lazy_and_bare_models_are_refused_and_compiling_afterwards_is_right() -> None:
    for wrapped in (nn.DataParallel(vit()), torch.compile(vit(), backend="eager"), torch.jit.script(nn.Sequential(Plain()))):
        with pytest.raises(GoodfitError, match="give the model first"):
            DropPath(0.5).build(wrapped, TOKENS)
    with pytest.raises(GoodfitError, match="single Linear"):
        DropPath(0.5).build(nn.Linear(8, 8), ROWS)
    with pytest.raises(GoodfitError, match=r"0\.weight is lazy: run the model on a batch once"):
        DropPath(0.5).build(nn.Sequential(nn.LazyLinear(8), Plain()), ROWS)
    model = DropPath(0.5).build(nn.Sequential(Plain(), Plain()), ROWS)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(ROWS), model(ROWS))
    with warnings.catch_warnings():
        assert torch.equal(compiled.eval()(ROWS), model.eval()(ROWS))
