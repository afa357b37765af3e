"""Spectral norm: torch's numbers, in a run, beside what else reads weights by name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import remove_parametrizations

import goodfit as gf
from goodfit import (
    L1,
    L2,
    BatchNorm,
    DropConnect,
    EarlyStopping,
    GoodfitError,
    Run,
    ShakeShake,
    SkipConnections,
    SpectralNorm,
    WeightDecay,
    fit,
    fold_batchnorm,
    shrink,
)
from goodfit.where import everything, kernels, named
from nets import settled

ROWS, IMAGES = torch.randn(6, 4, dtype=torch.float64), torch.randn(2, 3, 6, 6, dtype=torch.float64)


def mlp(depth: int = 2) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [layer for i in range(depth) for layer in (nn.Linear(8 if i else 4, 8), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(8, 1)).double()


def test_the_largest_singular_value_is_one_after_enough_iterations() -> None:
    model, raw = mlp(), mlp()
    SpectralNorm(iterations=3).build(model, ROWS)
    for _ in range(100):
        model(ROWS)
    for layer, plain in zip(model.eval()[::2], raw[::2], strict=True):
        expected = plain.weight / torch.linalg.svdvals(plain.weight)[0]
        torch.testing.assert_close(layer.weight, expected, rtol=1e-9, atol=1e-9)
        assert float(torch.linalg.svdvals(layer.weight.detach())[0]) == pytest.approx(1, abs=1e-9)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 5), (4, 8)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, groups=1), (2, 3, 6, 6)),
    "up": (lambda: nn.ConvTranspose2d(3, 4, 2), (2, 3, 6, 6)),
    "bilinear": (lambda: nn.Bilinear(4, 4, 5), (3, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_numbers_and_gradients_are_torchs(kind: str) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(2)
    plain, x = make().double(), torch.randn(shape, dtype=torch.float64)
    inputs = (x, x) if kind == "bilinear" else (x,)
    ours = SpectralNorm(iterations=2).build(nn.ModuleList([copy.deepcopy(plain)]), None)[0]
    peer = parametrizations.spectral_norm(copy.deepcopy(plain), n_power_iterations=2)
    peer.load_state_dict(ours.state_dict())
    for _ in range(3):
        a, b = ours(*inputs), peer(*inputs)
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
        a.square().sum().backward(), b.square().sum().backward()
    for p, q in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-13, atol=1e-13)
    for t, u in zip(ours.state_dict().values(), peer.state_dict().values(), strict=True):
        torch.testing.assert_close(t, u, rtol=1e-14, atol=1e-14)


def test_eval_rests_and_one_build_is_that_of_another() -> None:
    one, model = SpectralNorm().build(mlp(), ROWS), mlp().eval()
    state = torch.get_rng_state()
    other = SpectralNorm().build(model, ROWS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert torch.equal(other(ROWS), other(ROWS))
    assert torch.equal(one.eval()(ROWS), other(ROWS))
    before = copy.deepcopy(one.train().state_dict())
    one(ROWS)
    assert [n for n, t in one.state_dict().items() if not torch.equal(t, before[n])]


def test_keys_change_as_torchs_and_the_weight_is_the_same_parameter() -> None:
    model = mlp()
    weight = model[0].weight
    SpectralNorm(where=named("0.*") & kernels).build(model, ROWS)
    assert model[0].parametrizations.weight.original is weight
    inside = {f"0.parametrizations.weight.{n}" for n in ("original", "0._u", "0._v")}
    assert model.state_dict().keys() - mlp().state_dict().keys() == inside
    assert mlp().state_dict().keys() - model.state_dict().keys() == {"0.weight"}
    remove_parametrizations(model[0].eval(), "weight")
    assert model.state_dict().keys() == mlp().state_dict().keys()


def test_kernels_are_then_the_originals_and_the_function_does_not_shrink_with_them() -> None:
    model = mlp()
    run = Run((SpectralNorm(), L2(0.1), WeightDecay(0.1)), model, example=ROWS, task="numbers")
    originals = [m.parametrizations.weight.original for m in model[::2]]
    assert run.penalty() == pytest.approx(0.05 * sum(float(w.detach().square().sum()) for w in originals))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    lengths = [float(w.detach().norm()) for w in originals]
    model.eval()
    before = model(ROWS).detach()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    run.gradient(optimizer)
    optimizer.step()
    run.step(optimizer)
    assert all(float(w.detach().norm()) < 0.96 * length for w, length in zip(originals, lengths, strict=True))
    torch.testing.assert_close(model(ROWS), before, rtol=1e-12, atol=1e-12)
    table = str(gf.explain("L2(0.1)", model))
    assert "0.parametrizations.weight.original" in table


def test_a_table_is_trained_saved_and_restored() -> None:
    x = torch.randn(60, 4)
    y = x.square().sum(1).sqrt()
    model = mlp()
    cocktail = (SpectralNorm(), L2(1e-3), EarlyStopping(3))
    result = fit(model, (x[:40], y[:40]), (x[40:], y[40:]), cocktail, epochs=8, batch_size=8, progress=False)
    history = [row["valid_loss"] for row in result.history]
    assert min(history) < history[0]
    with torch.no_grad():
        kept = float((model.eval()(x[40:]).squeeze(1) - y[40:]).square().mean())
    assert kept == pytest.approx(min(history), rel=1e-9)
    other = SpectralNorm().build(mlp(), x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model(x))
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))


def test_an_interrupted_run_goes_on_with_the_same_bits() -> None:
    def start() -> tuple[Run, torch.optim.Optimizer]:
        run = Run((SpectralNorm(), L2(1e-2), EarlyStopping(5)), mlp(), example=ROWS, task="numbers")
        return run, torch.optim.Adam(run.model.parameters(), lr=0.05)

    def train(run: Run, optimizer: torch.optim.Optimizer, score: float) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            run.loss(ROWS, ROWS.sum(1, keepdim=True)).backward()
            run.gradient(optimizer)
            optimizer.step()
            run.step(optimizer)
        run.epoch(score)

    (whole, first), (again, second) = start(), start()
    train(whole, first, 1.0)
    best = copy.deepcopy(whole.model.state_dict())
    saved = copy.deepcopy((whole.state_dict(), whole.model.state_dict(), first.state_dict()))
    again.load_state_dict(saved[0]), again.model.load_state_dict(saved[1]), second.load_state_dict(saved[2])
    train(whole, first, 2.0), train(again, second, 2.0)
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(t, best[n]) for n, t in whole.finish().state_dict().items())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "where", "message"),
    [
        (lambda: nn.Sequential(nn.LSTM(4, 4)), kernels, r"0\.weight_ih_l0, which a recurrent layer reads past its name: leave"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), everything, r"cannot norm 0\.bias, which has one axis"),
        (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), kernels, r"original1?, which is parametrized"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), named("x"), r"matched no weights \(where=named\('x'\)\); the model has: 0\.w"),
        (lambda: (lambda m: nn.Sequential(m, tied(m)))(nn.Linear(4, 4)), kernels, r"0\.weight, which is tied to another"),
        (lambda: zeroed(nn.Sequential(nn.Linear(4, 4))), kernels, r"0\.weight, which is zero"),
        (lambda: DropConnect(0.1).build(nn.Sequential(nn.Linear(4, 4)).double(), ROWS), kernels, r"which DropConnect masks"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), kernels, r"0\.weight is lazy"),
        (lambda: nn.Linear(4, 4), kernels, r"single Linear"),
    ],
)
def test_what_cannot_be_normed_is_refused(make: Callable[[], nn.Module], where: gf.where.Where, message: str) -> None:
    model = make()
    names = list(model.state_dict())
    with pytest.raises(GoodfitError, match=message):
        SpectralNorm(where).build(model, ROWS)
    assert list(model.state_dict()) == names


def tied(layer: nn.Linear) -> nn.Linear:
    other = nn.Linear(4, 4)
    other.weight = layer.weight
    return other


def zeroed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


def test_a_later_run_keeps_it_and_what_cannot_act_on_it_says_so() -> None:
    model = SpectralNorm().build(mlp(), ROWS)
    state = list(model.state_dict())
    SpectralNorm(iterations=3).build(model, ROWS)
    assert list(model.state_dict()) == state
    with pytest.raises(GoodfitError, match=r"L1 makes zeros, but 0\.parametrizations\.weight\.original is divided"):
        Run(L1(0.1), model, example=ROWS)
    with pytest.raises(GoodfitError, match="is parametrized"):
        Run(DropConnect(0.1), model, example=ROWS)
    with pytest.raises(GoodfitError, match="matched no branch"):
        Run((SpectralNorm(), SkipConnections(), gf.DropPath(0.1, where=named("x"))), plain := mlp(3), example=ROWS)
    assert list(plain.state_dict()) == list(mlp(3).state_dict())
    assert type(plain[0]) is nn.Linear


def test_it_stands_beside_the_other_structure() -> None:
    model = mlp(3)
    Run((SkipConnections(), ShakeShake(), SpectralNorm()), model, example=ROWS)
    assert "5.skip.twin.0.parametrizations.weight.original" in dict(model.named_parameters())
    with pytest.raises(GoodfitError, match="put that behind ShakeShake"):
        Run((SkipConnections(), SpectralNorm(), ShakeShake()), mlp(3), example=ROWS)
    model = mlp(3)
    Run((BatchNorm(), SpectralNorm()), model, example=ROWS)
    before = settled(model).eval()(ROWS).detach()
    shrink(model, ROWS)
    torch.testing.assert_close(model(ROWS), before, rtol=1e-10, atol=1e-10)


def test_attention_is_normed_where_it_is_read() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    model = SpectralNorm(iterations=5).build(nn.Sequential(layer), None)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    for _ in range(60):
        y = model(x)
    attention = model[0].self_attn
    for weight in (attention.in_proj_weight, attention.out_proj.weight, model[0].linear1.weight):
        assert float(torch.linalg.svdvals(weight.detach())[0]) == pytest.approx(1, abs=1e-6)
    y.sum().backward()
    assert attention.parametrizations.in_proj_weight.original.grad is not None
    assert model.eval()(x).shape == x.shape


def test_folding_says_what_it_keeps() -> None:
    model = mlp(2)
    Run((SpectralNorm(), BatchNorm()), model, example=ROWS)
    before = settled(model).eval()(ROWS).detach()
    with pytest.raises(GoodfitError):
        fold_batchnorm(model, ROWS)
    torch.testing.assert_close(model(ROWS), before, rtol=1e-12, atol=1e-12)
