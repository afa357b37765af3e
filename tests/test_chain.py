"""The chain of K members is what vmap over functional_call computes, and what each member computes alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import goodfit as gf
from goodfit.chain.chain import Chain
from goodfit.chain.plan import chain_of
from goodfit.errors import GoodfitError
from goodfit.layers.dropout import SeededDropout
from goodfit.layers.seeded import Seeded
from goodfit.layers.skip import Carried, Skip, SkipStart

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": lambda: nn.ELU(0.7),
    "selu": nn.SELU,
    "softplus": lambda: nn.Softplus(2.0),
    "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.7),
}


def mlp(*widths: int, activation: Any = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def cocktail(model: nn.Module, x: Tensor, *ingredients: Any) -> nn.Module:
    for one in ingredients:
        one.build(model, x)
    return model


def members(model: nn.Module, count: int, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Different weights, statistics, rates and seeds for each; the first drops nothing."""
    at = torch.Generator().manual_seed(seed)
    params = {
        n: (p.detach() + 0.3 * torch.randn(count, *p.shape, generator=at)).requires_grad_(p.requires_grad)
        for n, p in model.named_parameters()
    }
    buffers = {}
    for name, b in model.named_buffers():
        stacked = b.detach().expand(count, *b.shape).clone()
        if name.endswith("rate"):
            stacked = torch.linspace(0, 0.6, count, dtype=b.dtype)
        elif name.endswith("seed"):
            stacked = torch.arange(count) * 7 + 1
        elif name.endswith(("mean", "var")):
            stacked += torch.rand(stacked.shape, generator=at)
        buffers[name] = stacked
    return params, buffers


def by_vmap(model: nn.Module, params: Any, buffers: Any, x: Tensor, own: bool) -> Tensor:
    def one(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return functional_call(model, (params, buffers), (x,))

    return torch.func.vmap(one, (0, 0, 0 if own else None))(params, buffers, x)


def by_loop(model: nn.Module, params: Any, buffers: Any, x: Tensor, own: bool) -> Tensor:
    outputs = []
    for k in range(len(next(iter(params.values())))):
        rewind(model)
        mine = {n: b[k] for n, b in buffers.items()}
        outputs.append(functional_call(model, ({n: p[k] for n, p in params.items()}, mine), (x[k] if own else x,)))
    return torch.stack(outputs)


def rewind(model: nn.Module) -> None:
    """Let the layers draw once more what they drew."""
    for layer in model.modules():
        if isinstance(layer, Seeded):
            layer.clock.rewind()


def result(way: Any, model: nn.Module, params: Any, buffers: Any, x: Tensor, *rest: Any) -> dict[str, Tensor]:
    """Outputs, statistics and gradients of one way, of a loss that looks at every output."""
    rewind(model)
    buffers = {n: b.clone() for n, b in buffers.items()}
    x = x.clone().requires_grad_(x.requires_grad)
    y = way(params, buffers, x) if isinstance(way, Chain) else way(model, params, buffers, x, *rest)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
    leaves = {n: p for n, p in (*params.items(), ("x", x)) if p.requires_grad}
    found = dict(zip(leaves, torch.autograd.grad((y.sin() * weights).sum(), list(leaves.values())), strict=True))
    return {"outputs": y.detach(), **{f"d {n}": g for n, g in found.items()}, **buffers}


def agree(model: nn.Module, x: Tensor, count: int, own: bool = False, tolerance: float = 1e-12, size: int = 0) -> None:
    chain = chain_of(model)
    assert chain is not None
    chain.part_bytes = size or chain.part_bytes
    params, buffers = members(model, count)
    ours = result(chain, model, params, buffers, x)
    cumulative = any(isinstance(m, nn.BatchNorm1d) and m.momentum is None and m.training for m in model.modules())
    for way in (by_loop,) if cumulative else (by_vmap, by_loop):  # vmap has no number of batches at hand
        theirs = result(way, model, params, buffers, x, own)
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            torch.testing.assert_close(ours[name], expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


FULL = (gf.BatchNorm(), gf.Dropout(0.3))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("size", [0, 1])  # one part for all members, and one for each
def test_a_full_cocktail(own: bool, count: int, size: int) -> None:
    x = torch.randn(count, 13, 4) if own else torch.randn(13, 4)
    agree(cocktail(mlp(4, 6, 5, 3), torch.zeros(3, 4), *FULL), x, count, own, size=size)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str, training: bool) -> None:
    for ingredients in ((), (gf.Dropout(0.3),), FULL):
        model = cocktail(mlp(4, 6, 5, 3, activation=ACTIVATIONS[name]), torch.zeros(3, 4), *ingredients)
        agree(model.train(training), torch.randn(9, 4, requires_grad=True), 3)


NORMS = {
    "plain": lambda n: nn.BatchNorm1d(n),
    "momentum": lambda n: nn.BatchNorm1d(n, momentum=0.3, eps=1e-3),
    "cumulative": lambda n: nn.BatchNorm1d(n, momentum=None),
    "no affine": lambda n: nn.BatchNorm1d(n, affine=False),
    "no statistics": lambda n: nn.BatchNorm1d(n, track_running_stats=False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", NORMS)
def test_norms_at_any_place(kind: str, training: bool) -> None:
    norm = NORMS[kind]
    for layers in (
        [nn.Linear(4, 5), norm(5), SeededDropout("d"), nn.Linear(5, 2)],
        [norm(4), nn.LeakyReLU(), SeededDropout("d"), nn.Linear(4, 5), nn.ReLU(), norm(5), nn.Linear(5, 2)],
        [nn.Linear(4, 5), nn.Tanh(), norm(5), nn.GELU(), SeededDropout("d"), nn.Linear(5, 2), norm(2)],
        [nn.Linear(4, 5, bias=False), norm(5), norm(5), nn.ReLU(), SeededDropout("d"), nn.ReLU()],
    ):
        agree(nn.Sequential(*layers).train(training), torch.randn(7, 4, requires_grad=True), 3)


@pytest.mark.parametrize("own", [False, True])
def test_dropout_of_the_input(own: bool) -> None:
    model = nn.Sequential(nn.Sequential(SeededDropout("in"), nn.Tanh()), nn.Linear(4, 3), nn.ReLU(), SeededDropout("d"))
    x = torch.randn(3, 8, 4) if own else torch.randn(8, 4)
    agree(model, x.requires_grad_(), 3, own)
    agree(cocktail(mlp(4, 5, 3), torch.zeros(2, 4), gf.InputDropout(0.2), gf.Dropout(0.4)), x, 3, own, size=1)


def deep(*ingredients: Any, start: int = 6) -> nn.Module:
    """Two blocks with a way around them."""
    return cocktail(mlp(start, 6, 6, 6, 6, 6, 3), torch.zeros(3, start), gf.SkipConnections(), *ingredients)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:Dropout stands before a norm")
def test_skip_connections(training: bool) -> None:
    for ingredients in (
        (),
        (gf.Dropout(0.2),),
        (gf.BatchNorm(), gf.DropPath(0.3), gf.Dropout(0.2, before_norm=True)),
        (gf.DropPath(0.5),),
    ):
        for own in (False, True):
            x = torch.randn(3, 9, 6, requires_grad=True) if own else torch.randn(9, 6, requires_grad=True)
            agree(deep(*ingredients).train(training), x, 3, own)
            agree(deep(*ingredients).train(training), x.detach(), 3, own, size=1)


@pytest.mark.parametrize("own", [False, True])
def test_a_branch_from_the_input_on(own: bool) -> None:
    carried = Carried()
    branch = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)]
    for before in ([], [nn.Tanh()], [SeededDropout("d")], [nn.Linear(4, 4), nn.ReLU()]):
        model = nn.Sequential(*before, SkipStart(carried), *branch, Skip(carried, 2, True), nn.GELU(), nn.Linear(4, 2))
        for needs in (False, True):
            agree(model, torch.randn((3,) * own + (7, 4), requires_grad=needs), 3, own)


def test_images_are_flattened() -> None:
    model = nn.Sequential(nn.Flatten(), *mlp(12, 5, 3))
    agree(cocktail(model, torch.zeros(2, 3, 2, 2), *FULL), torch.randn(6, 3, 2, 2, requires_grad=True), 4)
    agree(model, torch.randn(4, 6, 3, 2, 2), 4, own=True)
    chain = chain_of(model.eval())
    assert chain is not None
    one = torch.randn(4, 1, 12)
    torch.testing.assert_close(chain(*members(model, 4), one, own=True), by_vmap(model, *members(model, 4), one, True))


def test_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    model = cocktail(mlp(10, 32, 16, 4), torch.zeros(2, 10), *FULL)
    agree(model, torch.randn(33, 10), 6, tolerance=1e-5)
    agree(model, torch.randn(6, 33, 10), 6, own=True, tolerance=1e-5, size=1)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_architectures(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    layers, width = list[nn.Module](), data.draw(st.integers(1, 5))
    first = width
    for i in range(data.draw(st.integers(1, 9))):
        kind = data.draw(st.sampled_from(["linear", "norm", "activation", "dropout", "nested"]))
        if kind == "linear":
            after = data.draw(st.integers(1, 6))
            layers.append(nn.Linear(width, after, bias=data.draw(st.booleans())))
            width = after
        elif kind == "norm":
            layers.append(NORMS[data.draw(st.sampled_from(list(NORMS)))](width))
        elif kind == "activation":
            layers.append(ACTIVATIONS[data.draw(st.sampled_from(list(ACTIVATIONS)))]())
        elif kind == "dropout":
            layers.append(SeededDropout(f"d{i}"))
        else:
            layers = [nn.Sequential(*layers), nn.Identity()]
    model = nn.Sequential(*layers, nn.Linear(width, 2)).train(data.draw(st.booleans()))
    count, own = data.draw(st.integers(1, 4)), data.draw(st.booleans())
    shape = (count,) * own + (data.draw(st.integers(3, 9)), first)
    x = torch.randn(shape, requires_grad=data.draw(st.booleans()))
    agree(model, x, count, own, tolerance=1e-8, size=data.draw(st.sampled_from([0, 1])))


def test_a_member_of_nan_is_alone() -> None:
    model, x = cocktail(mlp(4, 6, 5, 3), torch.zeros(3, 4), *FULL), torch.randn(9, 4)
    chain = chain_of(model)
    assert chain is not None
    params, buffers = members(model, 4)
    good = result(chain, model, params, buffers, x)
    with torch.no_grad():
        params["0.weight"][2] = torch.nan
    bad = result(chain, model, params, buffers, x)
    others = [0, 1, 3]
    assert bad["outputs"][2].isnan().all()
    for name, expected in good.items():
        assert torch.equal(bad[name][others], expected[others]), name


def test_passes_do_not_write_over_one_another() -> None:
    """Memory is used again, but never that of a pass whose backward is still to come, nor what was handed out."""
    model, x = cocktail(mlp(4, 6, 5, 3), torch.zeros(3, 4), *FULL).train(), torch.randn(9, 4)
    chain = chain_of(model)
    assert chain is not None
    params, buffers = members(model, 3)
    leaves = [p for p in params.values() if p.requires_grad]
    expected = result(chain, model, params, buffers, x)
    rewind(model)
    first = chain(params, {n: b.clone() for n, b in buffers.items()}, x)
    chain(params, buffers, torch.randn(9, 4))
    with torch.no_grad():
        chain(params, buffers, torch.randn(9, 4))
    loss = (first.sin() * torch.linspace(0.5, 1.5, first.numel()).view(first.shape)).sum()
    for _ in range(2):
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
        chain(params, buffers, torch.randn(9, 4)).sum().backward()
    for name, got in zip((n for n, p in params.items() if p.requires_grad), gradients, strict=True):
        torch.testing.assert_close(got, expected[f"d {name}"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first.detach(), expected["outputs"], rtol=0, atol=0)
    torch.autograd.grad(loss, leaves)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_gradients_are_taken_and_not_copied() -> None:
    """A gradient that something else still looks at would be copied into .grad."""
    model = cocktail(mlp(4, 6, 5, 3), torch.zeros(3, 4), *FULL)
    chain = chain_of(model)
    assert chain is not None
    params, buffers = members(model, 3)
    chain(params, buffers, torch.randn(9, 4)).sum().backward()
    assert all(p.grad is not None and p.grad._base is None for p in params.values() if p.requires_grad)
    assert params["0.bias"].grad is None  # at rest before a norm


def test_weights_may_lie_in_any_order() -> None:
    model, x = cocktail(mlp(4, 6, 6, 3), torch.zeros(3, 4), *FULL), torch.randn(9, 4)
    chain = chain_of(model)
    assert chain is not None
    params, buffers = members(model, 3)
    expected = result(chain, model, params, buffers, x)
    moved = {
        n: p.detach().movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_(p.requires_grad) for n, p in params.items()
    }
    for name, found in result(chain, model, moved, buffers, x).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_the_last_part_may_be_short(training: bool) -> None:
    x = torch.randn(9, 4)
    model = cocktail(mlp(4, 6, 5, 3), torch.zeros(3, 4), *FULL).train(training)
    agree(model, x, 5, size=2 * 9 * 6 * 8)
    params, buffers = members(model, 5)
    chain = chain_of(model)
    assert chain is not None
    chain.part_bytes = 2 * 9 * 6 * 8
    rewind(model)
    with torch.no_grad():
        expected = by_loop(model, params, {n: b.clone() for n, b in buffers.items()}, x, False)
        rewind(model)
        torch.testing.assert_close(chain(params, buffers, x), expected, rtol=1e-12, atol=1e-12)


def test_parts_fill_the_cache_and_no_more() -> None:
    chain = chain_of(mlp(4, 64, 128, 3))
    assert chain is not None
    assert chain.at_once(128) == 16  # 16 · 128 · 128 numbers of four bytes are 1 MiB
    assert chain.at_once(128, torch.float64) == 8
    assert chain.at_once(10**6) == 1


def test_one_row_has_no_variance() -> None:
    model = cocktail(mlp(4, 6, 3), torch.zeros(3, 4), *FULL)
    chain = chain_of(model)
    assert chain is not None
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        chain(*members(model, 2), torch.randn(1, 4))


def test_other_shapes_are_refused() -> None:
    model = mlp(4, 6, 3)
    chain = chain_of(model)
    assert chain is not None
    for shape in ((5, 3), (3, 5, 4), (2, 5, 2, 4), (4,)):
        with pytest.raises(GoodfitError, match="takes"):
            chain(*members(model, 2), torch.randn(shape))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def hooked() -> nn.Module:
    model = mlp(4, 5, 2)
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    return model


def patched() -> nn.Module:
    model = mlp(4, 5, 2)
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    return model


def twice() -> nn.Module:
    same = nn.Linear(4, 4)
    return nn.Sequential(same, nn.ReLU(), same)


UNKNOWN = {
    "subclass": lambda: nn.Sequential(Doubled(4, 3)),
    "tied": tied,
    "hook": hooked,
    "patched": patched,
    "twice": twice,
    "parametrized": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
    "spectral": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))),
    "convolution": lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 3)),
    "softmax": lambda: nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)),
    "learned slope": lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU()),
    "torch's dropout": lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1)),
    "drop connect": lambda: cocktail(mlp(4, 5, 2), torch.zeros(2, 4), gf.DropConnect(0.2)),
    "alpha dropout": lambda: cocktail(mlp(4, 5, 2, activation=nn.SELU), torch.zeros(2, 4), gf.AlphaDropout(0.2)),
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)),
    "other flatten": lambda: nn.Sequential(nn.Linear(4, 3), nn.Flatten(0)),
    "doubled branches": lambda: deep(gf.ShakeShake()),
    "shaken branches": lambda: deep(gf.ShakeDrop(0.5)),
    "a sum without its start": lambda: nn.Sequential(nn.Linear(4, 4), Skip(Carried(), 1, True)),
    "nothing": lambda: nn.Sequential(nn.ReLU()),
    "leaf of its own": lambda: nn.LSTM(4, 3),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_no_chain(name: str) -> None:
    assert chain_of(UNKNOWN[name]()) is None


def test_a_norm_held_still_is_no_chain() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert chain_of(model) is not None
    gf.freeze_batchnorm(model)
    assert chain_of(model) is None


def test_torchs_dropout_is_for_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2)).eval()
    agree(model, torch.randn(5, 4), 2)
    chain = chain_of(model)
    assert chain is not None
    model.train()
    with pytest.raises(GoodfitError, match="eval mode"):
        chain(*members(model, 2), torch.randn(5, 4))
    assert chain_of(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0))) is not None


def test_rates_and_seeds_may_change_between_passes() -> None:
    model, x = cocktail(mlp(4, 6, 3), torch.zeros(3, 4), gf.Dropout(0.3)), torch.randn(9, 4)
    chain = chain_of(model)
    assert chain is not None
    params, buffers = members(model, 3)
    for rates, seeds in (([0.0, 0.0, 0.0], [1, 2, 3]), ([0.5, 0.0, 0.2], [1, 2, 3]), ([0.5, 0.0, 0.2], [4, 5, 6])):
        buffers["1.dropout.rate"].copy_(torch.tensor(rates))
        buffers["1.dropout.seed"].copy_(torch.tensor(seeds))
        ours, theirs = (result(way, model, params, buffers, x, *rest) for way, rest in ((chain, ()), (by_vmap, (False,))))
        torch.testing.assert_close(ours["outputs"], theirs["outputs"], rtol=1e-12, atol=1e-12)


def test_draws_of_a_step_are_counted_as_the_layer_counts_them() -> None:
    """Two passes of one step draw apart, as two passes of the layer do."""
    model, x = cocktail(mlp(4, 16, 3), torch.zeros(3, 4), gf.Dropout(0.5)), torch.randn(9, 4)
    chain = chain_of(model)
    assert chain is not None
    params, buffers = members(model, 2)
    both = []
    for way in (lambda: chain(params, buffers, x), lambda: by_vmap(model, params, buffers, x, False)):
        rewind(model)
        both.append((way(), way()))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(both[0][0][1], both[0][1][1])
