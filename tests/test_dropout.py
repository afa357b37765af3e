"""The kinds of dropout: what each does to numbers, where it goes, and whose rate moves."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

import goodfit as gf
from goodfit import (
    AlphaDropout,
    ChannelDropout,
    DropBlock,
    Dropout,
    GaussianDropout,
    GoodfitError,
    GoodfitWarning,
    InputDropout,
    Run,
)
from goodfit.layers.dropblock import SeededDropBlock
from goodfit.layers.dropout import (
    SeededAlphaDropout,
    SeededChannelDropout,
    SeededDropout,
    SeededGaussianDropout,
    SeededInputDropout,
    SeededLayer,
)
from goodfit.noise import Clock
from goodfit.regularizers.shapes import shares
from goodfit.schedules import curriculum, early, late, linear
from goodfit.where import biases, everything, kernels, named
from nets import Net

X = torch.randn(4, 6, dtype=torch.float64)
MAPS = torch.randn(2, 3, 8, 9, dtype=torch.float64)
SERIES = torch.randn(2, 5, 6, dtype=torch.float64)

# a layer of each kind, and an input that it takes
LAYERS: dict[str, tuple[Callable[[], SeededLayer], Tensor]] = {
    "element": (lambda: SeededDropout(p=0.4), X),
    "input": (lambda: SeededInputDropout(p=0.4), X),
    "channel": (lambda: SeededChannelDropout(p=0.4, axis=1, ndim=4), MAPS),
    "channel last": (lambda: SeededChannelDropout(p=0.4, axis=-1), SERIES),
    "alpha": (lambda: SeededAlphaDropout(p=0.4), X),
    "Gaussian": (lambda: SeededGaussianDropout(p=0.4), X),
    "block 1d": (lambda: SeededDropBlock(p=0.4, size=3, ndim=3), SERIES),
    "block 2d": (lambda: SeededDropBlock(p=0.4, size=3, ndim=4), MAPS),
    "block 3d": (lambda: SeededDropBlock(p=0.4, size=2, ndim=5), MAPS[..., None].expand(-1, -1, -1, -1, 4)),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def mlp(*between: nn.Module, depth: int = 2) -> nn.Sequential:
    hidden = [m for _ in range(depth) for m in (nn.Linear(6, 6), nn.ReLU(), *copy.deepcopy(between))]
    return nn.Sequential(*hidden, nn.Linear(6, 1))


def cnn(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation(), nn.Conv2d(4, 5, 3), activation(), nn.Flatten(), nn.Linear(100, 2)
    )


def bound(layer: SeededLayer, seed: int = 0, step: int = 0) -> SeededLayer:
    layer.bind("here", seed, Clock(step=step))
    return layer.train()


def rates(model: nn.Module) -> dict[str, float]:
    return {n: round(m.p, 12) for n, m in model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)}


# -- layers --


@each_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_layer_keeps_shape_and_dtype_and_is_nothing_in_eval_and_at_0(kind: str, dtype: torch.dtype) -> None:
    make, x = LAYERS[kind]
    layer, x = bound(make()), x.to(dtype)
    before = torch.get_rng_state()
    y = layer(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert not torch.equal(y, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.eval()(x) is x
    layer.train().p = 0.0
    assert torch.equal(layer(x), x)
    assert list(layer.state_dict()) == []
    assert layer.to(dtype).half().rate.dtype == torch.float64


@each_layer
def test_each_layer_draws_by_seed_step_and_call_alone(kind: str) -> None:
    make, x = LAYERS[kind]
    assert torch.equal(bound(make(), 3, 7)(x), bound(make(), 3, 7)(x))
    again = bound(make(), 3, 7)
    others = [again(x), again(x), bound(make(), 4, 7)(x), bound(make(), 3, 8)(x)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(others, 2))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(bound(make(), 3, 7))))
    assert torch.equal(copied(x), others[0])


@each_layer
def test_each_member_of_a_stack_has_the_masks_it_has_alone(kind: str) -> None:
    make, x = LAYERS[kind]
    layers = [bound(make(), seed) for seed in (5, 6, 7)]
    for layer, p in zip(layers, (0.0, 0.2, 0.6), strict=True):
        layer.p = p
    alone = torch.stack([layer(x) for layer in layers])
    for layer in layers:
        layer.clock.rewind()
    _, buffers = stack_module_state(layers)
    together = vmap(lambda b: functional_call(layers[0], b, (x,)), randomness="error")(buffers)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@each_layer
def test_gradients_flow_through_what_is_kept(kind: str) -> None:
    make, x = LAYERS[kind]
    x = x.clone().requires_grad_()
    layer = bound(make())
    y = layer(x)
    y.sum().backward()
    layer.clock.rewind()
    torch.testing.assert_close(layer(x + 1) - y, x.grad, rtol=1e-9, atol=1e-9)  # all are affine in x for one mask


@pytest.mark.parametrize(
    ("shape", "axis", "mask"),
    [
        ((50, 40), 1, (50, 40)),
        ((50, 40, 3), 1, (50, 40, 1)),
        ((50, 40, 2, 3), 1, (50, 40, 1, 1)),
        ((50, 2, 40), -1, (50, 1, 40)),
        ((50, 2, 3, 2, 40), -1, (50, 1, 1, 1, 40)),
    ],
)
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_channels_are_dropped_whole_row_by_row(shape: tuple[int, ...], axis: int, mask: tuple[int, ...], p: float) -> None:
    y = bound(SeededChannelDropout(p=p, axis=axis))(torch.ones(shape))
    first = y[tuple(slice(n) for n in mask)]
    assert torch.equal(y, first.expand(shape))
    assert set(first.unique().tolist()) == {0.0, 1 / (1 - p)}
    assert abs(float((first == 0).double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / first.numel())
    rows = {tuple(row.flatten().tolist()) for row in first}
    assert len(rows) > 45


def test_a_channel_layer_refuses_another_rank_than_it_was_built_for() -> None:
    layer = bound(SeededChannelDropout(axis=1, ndim=4, p=0.5))
    with pytest.raises(GoodfitError, match=r"here drops whole channels of a batch of rank 4, got \(3, 8, 8\)"):
        layer(torch.ones(3, 8, 8))
    with pytest.raises(GoodfitError, match=r"here drops blocks of a batch of rank 4, \(N, C, \.\.\.\), got \(3, 8, 8\)"):
        bound(SeededDropBlock(ndim=4, p=0.5))(torch.ones(3, 8, 8))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.7])
def test_alpha_dropout_keeps_mean_and_variance_behind_selu(p: float) -> None:
    x = F.selu(torch.randn(1000, 1000))  # mean 0 and variance 1 are SELU's fixed point
    y = bound(SeededAlphaDropout(p=p))(x)
    assert abs(float(y.mean())) < 0.01
    assert abs(float(y.var()) - 1) < 0.01
    low = -1.7580993408473766
    scale = ((1 - p) * (1 + p * low**2)) ** -0.5
    dropped = (y - scale * low * (1 - p)).abs() < 1e-9
    assert abs(float(dropped.double().mean()) - p) < 0.002
    torch.testing.assert_close(y[~dropped], scale * (x[~dropped] - p * low), rtol=1e-12, atol=1e-12)


def test_alpha_dropout_uses_torchs_numbers() -> None:
    p, x = 0.3, torch.zeros(1000)
    ours, theirs = bound(SeededAlphaDropout(p=p))(x), F.alpha_dropout(x, p, training=True)
    for a, b in zip(ours.unique(), theirs.unique(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_gaussian_dropout_multiplies_by_a_normal_of_dropouts_mean_and_variance(p: float) -> None:
    z = bound(SeededGaussianDropout(p=p))(torch.ones(1000, 1000))
    variance = p / (1 - p)
    n = z.numel()
    assert abs(float(z.mean()) - 1) < 4 * math.sqrt(variance / n)
    assert abs(float(z.var()) / variance - 1) < 4 * math.sqrt(2 / n)
    standard = (z - 1) / math.sqrt(variance)
    assert abs(float(standard.pow(3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float(standard.pow(4).mean()) - 3) < 4 * math.sqrt(96 / n)
    for bound_, share in ((1, 0.6826895), (2, 0.9544997), (3, 0.9973002)):
        assert abs(float((standard.abs() < bound_).double().mean()) - share) < 0.002


def slow_dropblock(x: Tensor, u: Tensor, p: float, size: int) -> Tensor:
    """Ghiasi et al., line by line, for one axis or more."""
    lengths = x.shape[2:]
    block = [min(size, n) for n in lengths]
    gamma = p
    for n, b in zip(lengths, block, strict=True):
        gamma *= n / b / (n - b + 1)
    mask = torch.ones_like(x)
    for place in itertools.product(*map(range, u.shape)):
        if u[place] < gamma:
            row, channel, *corner = place
            mask[(row, channel, *(slice(c, c + b) for c, b in zip(corner, block, strict=True)))] = 0
    return x * mask * mask.numel() / mask.sum()


@pytest.mark.parametrize("size", [1, 2, 3, 20])
@pytest.mark.parametrize("shape", [(9, 8, 7), (4, 3, 6, 9), (9, 9, 2, 5), (9, 9, 4, 3, 5)])
def test_dropblock_is_the_papers(size: int, shape: tuple[int, ...]) -> None:
    x, p = torch.randn(shape), 0.3
    layer = bound(SeededDropBlock(p=p, size=size, ndim=len(shape)))
    y = layer(x)
    corners = [n - min(size, n) + 1 for n in shape[2:]]
    layer.clock.rewind()
    u = layer.draw(torch.Size((*shape[:2], *corners)), x.device)
    torch.testing.assert_close(y, slow_dropblock(x, u, p, size), rtol=1e-12, atol=0)
    assert bool((y == 0).any())


@pytest.mark.parametrize(("p", "size"), [(0.05, 3), (0.1, 7), (0.3, 1)])
def test_dropblock_drops_about_p_and_keeps_the_sum(p: float, size: int) -> None:
    y = bound(SeededDropBlock(p=p, size=size))(torch.ones(40, 32, 20, 20))
    dropped = float((y == 0).double().mean())
    assert 0.85 * p < dropped < 1.02 * p  # blocks that overlap make it less
    torch.testing.assert_close(y.mean(), torch.tensor(1.0), rtol=1e-12, atol=0)


def test_dropblock_of_everything_is_zero_and_not_nan() -> None:
    y = bound(SeededDropBlock(p=0.999, size=9))(torch.ones(2, 2, 3, 3))
    assert bool(y.isfinite().all())


# -- places --

KINDS: dict[str, Any] = {
    "Dropout": Dropout(0.3),
    "ChannelDropout": ChannelDropout(0.3),
    "AlphaDropout": AlphaDropout(0.3),
    "GaussianDropout": GaussianDropout(0.3),
    "DropBlock": DropBlock(0.3, 3),
}
each_kind = pytest.mark.parametrize("one", KINDS.values(), ids=KINDS)


@each_kind
def test_each_kind_goes_behind_activations_once_and_leaves_the_old_keys(one: Any) -> None:
    model = cnn(nn.SELU).double()
    model(MAPS)
    plain = copy.deepcopy(model)
    one.build(model, MAPS)
    child = type(one).__name__.lower()
    assert rates(model) == {f"2.{child}": 0.3, f"4.{child}": 0.3}
    assert torch.equal(model.eval()(MAPS), plain.eval()(MAPS))
    assert not torch.equal(model.train()(MAPS), model.eval()(MAPS))
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    type(one)(0.1).build(model, MAPS)
    assert rates(model) == {f"2.{child}": 0.1, f"4.{child}": 0.1}


@each_kind
def test_where_picks_places_by_name(one: Any) -> None:
    child = type(one).__name__.lower()
    for where, expected in ((named("4"), ["4"]), (~named("4"), ["2"]), (named("2") | named("4"), ["2", "4"])):
        model = type(one)(0.3, where=where).build(cnn(nn.SELU).double(), MAPS)
        assert list(rates(model)) == [f"{place}.{child}" for place in expected]
        assert Run(type(one)(0.3, where=where), cnn(nn.SELU).double(), example=MAPS)
    model = cnn(nn.SELU).double()
    with pytest.raises(GoodfitError, match=rf"{type(one).__name__} matched no place \(where=named\('x\*'\)\); .* has: 2, 4\."):
        type(one)(where=named("x*")).build(model, MAPS)
    assert rates(model) == {}


@pytest.mark.parametrize("where", [kernels, ~biases, named("a") & kernels, everything | biases])
@pytest.mark.parametrize("kind", [Dropout, DropBlock, InputDropout])
def test_a_place_has_no_role(kind: Any, where: Any) -> None:
    with pytest.raises(GoodfitError, match=rf"{kind.__name__}\.where picks places by their name, .* got where="):
        kind(where=where)


def test_a_text_with_where_and_shape_reads_back() -> None:
    text = "Dropout(linear(0.0, 0.5, steps=9), where=named('encoder.*') & ~named('*.1'), shape='funnel', before_norm=True)"
    (one,) = gf.parse(text)
    assert gf.parse(repr(one))[0] == gf.parse(str(one))[0] == one
    assert (one.shape, one.before_norm) == ("funnel", True)


def test_a_shape_spreads_the_rates_in_the_order_of_the_forward_run() -> None:
    def backwards(m: Any, x: Tensor) -> Tensor:
        return m.a(F.relu(m.b(F.relu(m.c(F.relu(m.d(x)))))))

    model = Net(backwards, **{name: nn.Linear(6, 6) for name in "abcd"}).double()
    Dropout(0.6, shape="funnel").build(model, X)
    assert rates(model) == {"a.dropout": 0.2, "b.dropout": 0.4, "c.dropout": 0.6}
    own = mlp(nn.Dropout(0.9), depth=4).double()
    Dropout(0.4, shape="triangle").build(own, X)
    assert rates(own) == {"2": 0.1, "5": 0.2, "8": 0.3, "11": 0.4}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("brick", [1, 1, 1, 1, 1, 1]),
        ("funnel", [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("long_funnel", [1, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("triangle", [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]),
        ("diamond", [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3]),
        ("hexagon", [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3]),
        ("stairs", [1, 1, 2 / 3, 2 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_shapes_by_hand(shape: str, expected: list[float]) -> None:
    assert shares(shape, 6) == pytest.approx(expected)
    for count in range(1, 30):
        found = shares(shape, count)
        assert max(found) == 1
        assert min(found) > 0
    assert shares("hexagon", 9) == [0.25, 0.5, 0.75, 1, 1, 1, 0.75, 0.5, 0.25]


def test_an_unknown_shape_is_refused_with_the_nearest() -> None:
    with pytest.raises(GoodfitError, match=r"Dropout\.shape must be one of brick, .*got shape='funel'; did you mean funnel"):
        Dropout(shape="funel")


def test_before_a_norm_only_when_asked_and_aloud() -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1)
        ).double()

    assert list(rates(Dropout(0.5).build(net(), X))) == ["4.dropout"]
    with pytest.warns(GoodfitWarning, match=r"Dropout stands before a norm at 1: .*Li et al\. 2019"):
        assert list(rates(Dropout(0.5, before_norm=True).build(net(), X))) == ["1.dropout", "4.dropout"]
    last = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8)).double()
    assert list(rates(Dropout(0.5, before_norm=True).build(last, X))) == ["1.dropout"]  # nothing behind the last norm

    functional = Net(lambda m, x: m.c(m.n(F.relu(m.a(x)))), a=nn.Linear(6, 8), n=nn.LayerNorm(8), c=nn.Linear(8, 1)).double()
    with pytest.warns(GoodfitWarning, match="before a norm at n"):
        assert list(rates(Dropout(0.5, before_norm=True).build(functional, X))) == ["n.dropout"]


# -- the right axis --


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def added_sum(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(F.relu(m.b(F.relu(h)) + h))


AXES: dict[str, tuple[nn.Module, Tensor, dict[str, int]]] = {
    "rows": (mlp(depth=1), X, {"1": -1}),
    "linear on a series": (mlp(depth=1), SERIES, {"1": -1}),
    "series as long as wide": (mlp(depth=1), torch.randn(3, 6, 6), {"1": -1}),
    "conv1d": (nn.Sequential(nn.Conv1d(5, 6, 1), nn.ReLU(), nn.Conv1d(6, 2, 1)), SERIES, {"1": 1}),
    "conv1d, then linear on the length": (nn.Sequential(nn.Conv1d(5, 7, 1), nn.ReLU(), nn.Linear(6, 2)), SERIES, {"1": 1}),
    "linear, turned, conv1d": (
        nn.Sequential(nn.Linear(6, 5), Transposed(), nn.ReLU(), nn.Conv1d(5, 2, 1)),
        SERIES,
        {"2": 1},
    ),
    "conv2d with norm": (cnn(), MAPS, {"2": 1, "4": 1}),
    "conv3d": (nn.Sequential(nn.Conv3d(3, 4, 1), nn.ReLU(), nn.Conv3d(4, 2, 1)), MAPS[..., None], {"1": 1}),
    "residual": (Net(added_sum, **{n: nn.Conv2d(3, 3, 3, padding=1) for n in "abc"}), MAPS, {"b": 1, "c": 1}),
}


@pytest.mark.parametrize("case", AXES)
def test_channel_dropout_finds_the_axis_of_the_channels(case: str) -> None:
    model, example, expected = copy.deepcopy(AXES[case])
    model = model.double()
    ChannelDropout(0.5).build(model, example.double())
    found = {n.rpartition(".")[0]: m.axis for n, m in model.named_modules() if isinstance(m, SeededChannelDropout)}
    assert found == expected
    model.train()(example.double())


def test_a_layer_that_torch_does_not_define_is_known_by_its_matrix() -> None:
    class Conv1D(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(i, o))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    model = nn.Sequential(Conv1D(6, 8), nn.ReLU(), Conv1D(8, 6)).double()
    assert ChannelDropout(0.5).build(model, SERIES)[1].channeldropout.axis == -1


@pytest.mark.parametrize(
    ("model", "example", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3)), MAPS[0], "0 runs without a batch axis"),
        (nn.Sequential(nn.Conv1d(5, 4, 3), nn.ReLU(), nn.Conv1d(4, 1, 3)), SERIES[0], "0 runs without a batch axis"),
        (
            Net(lambda m, x: m.b(torch.relu(m.a(x)[0])), a=nn.LSTM(6, 5), b=nn.Linear(5, 1)),
            SERIES,
            "the batch may be on axis 1, since the model has a layer with batch_first=False",
        ),
    ],
)
def test_a_place_whose_channels_cannot_be_told_is_refused(model: nn.Module, example: Tensor, reason: str) -> None:
    with pytest.raises(GoodfitError, match=f"ChannelDropout has no place in .*, {reason}; leave it out"):
        ChannelDropout(0.5).build(model.double(), example)
    assert rates(model) == {}


def test_a_place_whose_channels_cannot_be_told_is_left_out_aloud_where_others_can() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.b(F.relu(m.a(x)))
        return m.c(m.act(h.transpose(1, 2) + h).flatten(1))

    model = Net(run, a=nn.Linear(6, 6), b=nn.Linear(6, 6), act=nn.ReLU(), c=nn.Linear(36, 1)).double()
    with pytest.warns(GoodfitWarning, match="ChannelDropout leaves out act: no layer beside it says which axis"):
        ChannelDropout(0.5).build(model, torch.randn(2, 6, 6))
    assert list(rates(model)) == ["b.channeldropout"]


def test_dropblock_takes_maps_alone() -> None:
    net = nn.Sequential(cnn(), nn.ReLU(), nn.Linear(2, 1)).double()
    DropBlock(0.1, 3).build(net, MAPS)
    assert list(rates(net)) == ["0.2.dropblock", "0.4.dropblock"]
    with pytest.raises(GoodfitError, match="DropBlock found no activation of a batch of feature maps"):
        DropBlock(0.1).build(mlp().double(), SERIES)


def test_alpha_dropout_warns_behind_another_activation() -> None:
    with pytest.warns(GoodfitWarning, match=r"behind SELU only, which does not stand at 1 \(relu\), 3 \(relu\): take Dropout"):
        AlphaDropout(0.1).build(mlp().double(), X)


# -- what is there already --


def test_each_kind_adjusts_torchs_layers_of_its_own_and_leaves_the_others() -> None:
    def net() -> nn.Module:
        convs = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*convs, nn.LazyLinear(6), nn.SELU(), nn.AlphaDropout(0.2), nn.Linear(6, 1)).double()

    assert rates(ChannelDropout(0.5).build(net(), MAPS)) == {"2": 0.5, "8": 0.2}
    assert rates(AlphaDropout(0.5).build(net(), MAPS)) == {"2": 0.1, "8": 0.5}
    assert rates(Dropout(0.5).build(net(), MAPS)) == {"2": 0.5, "8": 0.5}
    assert rates(GaussianDropout(0.5).build(net(), MAPS)) == {"2": 0.1, "4.gaussiandropout": 0.5, "8": 0.2}
    for order in ((Dropout(0.3), ChannelDropout(0.5)), (ChannelDropout(0.5), Dropout(0.3))):
        model = net()
        Run(order, model, example=MAPS)
        assert rates(model) == {"2": 0.5, "8": 0.3}


def test_a_kind_refuses_where_dropout_stands_at_each_place() -> None:
    with pytest.raises(GoodfitError, match=r"GaussianDropout finds dropout at each place of Sequential already"):
        GaussianDropout(0.5).build(mlp(nn.Dropout(0.1)).double(), X)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_number_of_a_recurrent_layer_is_set_where_it_acts(kind: Any) -> None:
    def net(layers: int) -> Any:
        recurrent = kind(6, 6, layers, batch_first=True)
        return Net(lambda m, x: m.b(F.relu(m.a(m.l(x)[0]))), l=recurrent, a=nn.Linear(6, 6), b=nn.Linear(6, 1)).double()

    deep = Dropout(0.5).build(net(2), SERIES)
    assert (deep.l.dropout, rates(deep)) == (0.5, {"b.dropout": 0.5})
    assert not torch.equal(deep.l.train()(SERIES)[0], deep.l(SERIES)[0])
    assert Dropout(0.5).build(net(1), SERIES).l.dropout == 0
    only = Net(lambda m, x: m.l(x)[0], l=kind(6, 6, 2)).double()
    assert Dropout(0.4).build(only, SERIES).l.dropout == 0.4


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.drop(x), 0.3, self.training)


class Functional(nn.Module):
    """Drops by functions in every manner: as a keyword, by position, nested, only in training, off by a zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.inner, self.broken = nn.Linear(6, 6), nn.Linear(6, 1), Inner(), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(F.relu(self.a(x)))
        if self.broken:
            raise RuntimeError("broken")
        if self.training:
            x = F.dropout(x, p=0.4)
        x = F.feature_alpha_dropout(x[..., None], 0.1, self.training)[..., 0]
        return self.b(F.dropout(x, 0.3 if self.training else 0.0))


class Heard(torch.overrides.TorchFunctionMode):
    """The rates that dropout functions get in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "dropout" in func.__name__ and (kwargs.get("training", True)):
            self.rates.append(args[1] if len(args) > 1 else kwargs["p"])
        return func(*args, **kwargs)


def heard(model: nn.Module, x: Tensor = X) -> list[float]:
    with Heard() as mode:
        model(x)
    return mode.rates


def test_functions_get_the_rate_and_the_innermost_module_decides() -> None:
    model = Functional().double()
    assert heard(model) == [0.2, 0.3, 0.4, 0.1, 0.3]
    assert list(model.modules()) == list(Dropout(0.7).build(model, X).modules())
    assert heard(model) == [0.7] * 5
    assert heard(model.eval()) == [0.0]
    model.train()
    Dropout(0.5, where=named("inner.dropout()")).build(model, X)
    assert heard(model) == [0.7, 0.5, 0.7, 0.7, 0.7]
    Dropout(0.6, where=named("inner.drop")).build(model, X)
    assert heard(model) == [0.6, 0.5, 0.7, 0.7, 0.7]
    AlphaDropout(0.05).build(model, X)
    assert heard(model) == [0.6, 0.5, 0.7, 0.05, 0.7]
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    Dropout(0.1, where=named("inner.dropout()")).build(other, X)
    assert heard(other) == [0.6, 0.1, 0.7, 0.05, 0.7]
    assert heard(model) == [0.6, 0.5, 0.7, 0.05, 0.7]


def test_a_function_keeps_no_rate_behind_a_model_that_fails() -> None:
    model = Dropout(0.7).build(Functional().double(), X)
    model.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        model(X)
    assert heard(Functional().double()) == [0.2, 0.3, 0.4, 0.1, 0.3]
    model.broken = False
    assert heard(model) == [0.7] * 5


def test_a_schedule_moves_functions_and_recurrent_layers_too() -> None:
    model = Functional().double()
    run = Run(Dropout(linear(0.0, 0.5, steps=2)), model, example=X, task="numbers")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(3):
        seen.append(heard(model))
        run.loss(X, X[:, 0]).backward()
        run.gradient(optimizer)
        optimizer.step()
        run.step(optimizer)
    assert seen == [[0.0] * 5, [0.25] * 5, [0.5] * 5]


# -- several in one cocktail --


def test_each_regularizer_moves_its_own_rates() -> None:
    def start() -> tuple[Run, nn.Module, torch.optim.Optimizer]:
        model = mlp().double()
        text = (
            "InputDropout(late(0.1, steps=2)), Dropout(linear(0.0, 0.4, steps=4), where=named('1')), "
            "Dropout(0.5, where=named('3')), GaussianDropout(early(0.2, steps=2), shape='funnel')"
        )
        run = Run(text, model, example=X, task="numbers")
        return run, model, torch.optim.SGD(model.parameters(), lr=0.1)

    def train(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Any]:
        seen = []
        for _ in range(steps):
            seen.append((rates(model), run.loss(X, X[:, 0]).detach()))
            optimizer.zero_grad()
            run.loss(X, X[:, 0]).backward()
            run.gradient(optimizer)
            optimizer.step()
            run.step(optimizer)
        return seen

    def at(i: float, a: float, b: float, g: float) -> dict[str, float]:
        gaussian = {"1.gaussiandropout": g, "3.gaussiandropout": g / 2}
        return {"1.dropout": a, "3.dropout": b, **gaussian, "inputdropout_input.layer": i}

    torch.manual_seed(0)
    run, model, optimizer = start()
    seen = train(run, model, optimizer, 2)
    saved, weights = run.state_dict(), copy.deepcopy(model.state_dict())
    seen += train(run, model, optimizer, 2)
    expected = [at(0.0, 0.0, 0.5, 0.2), at(0.0, 0.1, 0.5, 0.1), at(0.1, 0.2, 0.5, 0.0), at(0.1, 0.3, 0.5, 0.0)]
    assert [r for r, _ in seen] == [pytest.approx(e) for e in expected]
    again, other, second = start()
    other.load_state_dict(weights)
    again.load_state_dict(saved)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(train(again, other, second, 2), seen[2:], strict=True))


# -- inputs --


def test_input_dropout_drops_numbers_of_each_float_input_however_it_is_handed_over() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Identity()

        def forward(self, u: Tensor, tokens: Tensor, more: Any = None) -> Any:
            return u, tokens, more

    ones, tokens = torch.ones(100, 100), torch.ones(5, dtype=torch.long)
    nested = {"v": ones, "pair": [ones, 3]}
    for example in ((ones, tokens, nested), {"more": nested, "tokens": tokens, "u": ones}):
        model = Two()
        run = Run("InputDropout(0.3), InputDropout(0.6, where=named('more.pair.*'))", model, example=example)
        assert rates(model) == {
            "inputdropout_u.layer": 0.3,
            "inputdropout_more_v.layer": 0.3,
            "inputdropout_more_pair_0.layer": 0.6,
        }
        u, kept, more = model(ones, tokens, nested)
        assert run.model is model
        assert kept is tokens
        shares_ = [float((t == 0).double().mean()) for t in (u, more["v"], more["pair"][0])]
        assert shares_ == pytest.approx([0.3, 0.3, 0.6], abs=0.02)
        assert not torch.equal(u, more["v"])
        assert model.eval()(ones, tokens, nested)[0] is ones
        assert list(model.state_dict()) == []
        InputDropout(0.1).build(model, example)
        assert set(rates(model).values()) == {0.1}


def test_input_dropout_says_what_it_cannot_do() -> None:
    model = mlp().double()
    with pytest.raises(GoodfitError, match=r"InputDropout matched no input \(where=named\('y'\)\); Sequential takes: input\."):
        InputDropout(where=named("y")).build(model, X)
    words = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 1))
    with pytest.raises(GoodfitError, match="and Sequential takes none"):
        InputDropout().build(words, torch.tensor([[1, 2]]))
    dropped = nn.Sequential(nn.Dropout(0.2), *mlp()).double()
    with pytest.raises(GoodfitError, match=r"drops its inputs itself: Dropout\(p, where=named\('0'\)\) sets its rate"):
        InputDropout().build(dropped, X)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(6, 2, batch_first=True).double()

    def forward(self, x: Tensor, attn_mask: Tensor, bias: Any = None) -> Any:
        mask = attn_mask if bias is None else attn_mask + bias
        return x, attn_mask, self.a(x, x, x, attn_mask=mask)[0]


def test_input_dropout_leaves_masks_alone() -> None:
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    for mask, reason in ((causal, "which is not finite in the example"), (0 * causal.exp(), "a mask by its name")):
        model = Masked()
        with pytest.warns(GoodfitWarning, match=rf"^InputDropout leaves out attn_mask, {reason}"):
            InputDropout(0.5).build(model, (SERIES, mask))
        assert rates(model) == {"inputdropout_x.layer": 0.5}
        x, kept, out = model(SERIES, mask)
        assert kept is mask
        assert not torch.equal(x, SERIES)
        assert bool(out.isfinite().all())


def test_input_dropout_takes_a_finite_mask_where_its_very_name_asks_for_it() -> None:
    mask = torch.ones(5, 5, dtype=torch.float64)
    model = InputDropout(0.5, where=named("attn_mask")).build(Masked(), (SERIES, mask))
    assert rates(model) == {"inputdropout_attn_mask.layer": 0.5}
    for where in (named("attn_mask"), named("bias")):
        example = {"x": SERIES, "attn_mask": mask.log() - math.inf, "bias": mask * math.nan}
        with pytest.raises(GoodfitError, match=r"drops no masks, and Masked takes \w+, which is not finite in the example"):
            InputDropout(0.5, where=where).build(Masked(), example)
    with pytest.raises(GoodfitError, match=r"takes attn_mask, a mask by its name \(where=named\('attn_mask'\) takes it\)"):
        InputDropout(0.5, where=named("*mask")).build(Masked(), (SERIES, mask))


# -- schedules --


def test_schedules_by_hand() -> None:
    assert [early(0.4, steps=4).at(t) for t in range(6)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0, 0.0])
    assert [late(0.4, steps=2).at(t) for t in range(4)] == [0.0, 0.0, 0.4, 0.4]
    rate = curriculum(0.5, gamma=5.0, steps=100)
    assert [rate.at(t) for t in (0, 20, 100)] == pytest.approx([0, 0.5 * (1 - math.exp(-1)), 0.5 * (1 - math.exp(-5))])
    assert curriculum(0.5, epochs=2).in_steps(10) == curriculum(0.5, gamma=10.0, steps=20)
    for one in (early(0.1, epochs=3), late(0.1, steps=3), curriculum(0.2, gamma=2.0, epochs=1.5), linear(0.1, 0.2, steps=1)):
        assert gf.parse(repr(Dropout(one)))[0] == Dropout(one)
        assert gf.parse(repr(gf.L2(one)))[0] == gf.L2(one)


@pytest.mark.parametrize("make", [early, late, curriculum])
def test_schedules_say_what_is_wrong(make: Any) -> None:
    with pytest.raises(GoodfitError, match=rf"{make.__name__} needs one of steps= and epochs="):
        make(0.1)
    with pytest.raises(GoodfitError, match=rf"{make.__name__} must last a finite number of steps or epochs > 0, got"):
        make(0.1, steps=0)
    with pytest.raises(GoodfitError, match=r"Dropout\.p must be in \[0, 1\), got p="):
        Dropout(make(1.5, steps=2))
    with pytest.raises(GoodfitError, match="counts epochs"):
        Run(Dropout(make(0.5, epochs=2)), mlp().double(), example=X)


def test_what_no_number_or_no_text_can_be_is_refused_in_one_line() -> None:
    for make in (early, late, curriculum, lambda p, steps: linear(0.0, p, steps=steps)):
        with pytest.raises(GoodfitError, match=r"goes between numbers, got .*'a'.*steps=3\)\.$"):
            make("a", steps=3)
    with pytest.raises(GoodfitError, match=r"Dropout\.shape must be one of brick, .*, got shape=\['brick'\]"):
        Dropout(0.1, shape=["brick"])
    with pytest.raises(GoodfitError, match=r"counts epochs: give steps=\.\.\., or let gf\.fit count them\.$"):
        Run(Dropout(linear(0.0, 0.5, epochs=3)), mlp().double(), example=X)


def test_inserted_layers_are_the_models_until_it_is_made_anew() -> None:
    model = Run("Dropout(0.5)", mlp().double(), example=X).model
    Run("L2(0.1)", model, example=X)
    assert set(rates(model).values()) == {0.5}
    Run("Dropout(0.1)", model, example=X)
    assert set(rates(model).values()) == {0.1}
    fresh = mlp().double()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model.eval()(X))


def test_each_name_is_told_once() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    Dropout(0.1).build(model, X)
    with pytest.raises(GoodfitError, match=r"matched no place \(where=named\('x'\)\); Sequential has: 1\.$"):
        Dropout(0.1, where=named("x")).build(model, X)


def test_curriculum_needs_a_gamma_above_0() -> None:
    with pytest.raises(GoodfitError, match=r"curriculum\.gamma must be a finite number > 0, got curriculum\(0\.5, gamma=0"):
        curriculum(0.5, gamma=0, steps=3)


# -- hosts --


@each_kind
def test_half_precision_and_channels_last_stay(one: Any) -> None:
    model = cnn(nn.SELU).to(torch.bfloat16).to(memory_format=torch.channels_last)
    x = MAPS.to(torch.bfloat16).to(memory_format=torch.channels_last)
    hidden = one.build(model, x).train()[:5](x)
    assert hidden.dtype == torch.bfloat16
    assert bool(hidden.isfinite().all())
    assert hidden.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile asks for it
def test_a_model_is_compiled_after_building() -> None:
    model = mlp(depth=1).double()
    run = Run("Dropout(0.3), InputDropout(0.2)", model, example=X)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    first, second = compiled(X), compiled(X)
    assert not torch.equal(first, second)
    run._plan.clock.rewind()
    torch.testing.assert_close(model(X), first, rtol=1e-12, atol=1e-12)
    assert torch.equal(compiled.eval()(X), model.eval()(X))
