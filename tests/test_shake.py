"""Shake-Shake and Shake-Drop: rows are shaken as the formulas say, in both directions, and the mean is what eval says."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import goodfit as gf
from goodfit import (
    BatchNorm,
    Dropout,
    DropPath,
    EarlyStopping,
    GoodfitError,
    Run,
    ShakeDrop,
    ShakeShake,
    SkipConnections,
    fit,
)
from goodfit.layers.path import SeededShake, SeededShakeDrop
from goodfit.noise import Noise
from goodfit.where import named
from nets import Net

ROWS = torch.randn(6, 8, dtype=torch.float64)
BOTH = (SkipConnections(), ShakeShake())


def mlp(depth: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(8, 1))


def built(cocktail: tuple[gf.phases.Regularizer, ...], model: nn.Module | None = None, seed: int = 0) -> nn.Module:
    return Run(cocktail, mlp() if model is None else model, example=ROWS, task="numbers", seed=seed).model


@pytest.mark.parametrize("train", [True, False])
def test_shake_shake_mixes_two_branches_row_by_row(train: bool) -> None:
    model = built(BOTH, seed=7).train(train)
    skip, x = model[5].skip, torch.tanh(model[0](ROWS))
    f, g = model[4](model[3](model[2](x))), skip.twin[2](torch.tanh(skip.twin[0](x)))
    alpha = Noise(7, "5.skip.shake").uniform(2, 6, 1)[0] if train else torch.full((6, 1), 0.5)
    expected = model[6](torch.tanh(x + alpha * f + (1 - alpha) * g))
    torch.testing.assert_close(model(ROWS), expected, rtol=1e-13, atol=1e-13)
    assert train == (not torch.equal(model(ROWS), model(ROWS)))


def test_shake_shake_flows_back_by_other_numbers() -> None:
    layer, f, g = SeededShake(), torch.randn(5, 3, 2, requires_grad=True), torch.randn(5, 3, 2, requires_grad=True)
    alpha, beta = Noise(0, "shake").uniform(2, 5, 1, 1).double()
    y, slope = layer(f, g), torch.randn(5, 3, 2)
    y.backward(slope)
    assert torch.equal(y, alpha * f + (1 - alpha) * g)
    torch.testing.assert_close(f.grad, beta * slope, rtol=1e-15, atol=0)
    torch.testing.assert_close(g.grad, (1 - beta) * slope, rtol=1e-15, atol=0)
    assert not torch.allclose(alpha, beta)


def test_shake_drop_shakes_rows_in_both_directions() -> None:
    layer, x = SeededShakeDrop(p=0.4), torch.randn(50, 3, requires_grad=True)
    u = Noise(0, "drop_path").uniform(3, 50, 1).double()
    b = (u[0] >= 0.4).double()
    alpha, beta = 2 * u[1] - 1, u[2]
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, x * (b + alpha - b * alpha))
    torch.testing.assert_close(x.grad, (b + beta - b * beta).expand(50, 3), rtol=1e-14, atol=0)
    assert 0.4 < float(b.mean()) < 0.8
    torch.testing.assert_close(layer.eval()(x), 0.6 * x, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("p", "value", "slope"), [(0.0, 1.0, 1.0), (0.3, 0.7, 0.85), (1.0, 0.0, 0.5)])
def test_the_mean_over_many_draws_is_that_of_eval(p: float, value: float, slope: float) -> None:
    n = 40_000
    layer, x = SeededShakeDrop(p=p), torch.ones(n, 1, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert float(y.detach().mean()) == pytest.approx(value, abs=5 * p**0.5 / n**0.5)
    assert float(x.grad.mean()) == pytest.approx(slope, abs=5 * p**0.5 / n**0.5)
    torch.testing.assert_close(layer.eval()(x), torch.full((n, 1), value), rtol=1e-15, atol=1e-15)
    assert torch.equal(layer.train()(x), x) == (p == 0)


def test_the_mean_of_shake_shake_is_that_of_eval() -> None:
    n = 40_000
    f, g = torch.full((n, 1), 3.0, requires_grad=True), torch.full((n, 1), -1.0, requires_grad=True)
    layer = SeededShake()
    y = layer(f, g)
    y.sum().backward()
    spread = 5 * 12**-0.5 / n**0.5
    assert float(y.detach().mean()) == pytest.approx(float(layer.eval()(f, g).detach().mean()), abs=4 * spread)
    assert float(f.grad.mean()) == pytest.approx(0.5, abs=spread)
    assert torch.equal(f.grad + g.grad, torch.ones(n, 1))


def test_shake_drop_stands_behind_branches_with_rates_by_depth_and_keys_stay() -> None:
    plain = mlp(5)
    model = built((SkipConnections(), ShakeDrop(0.6)), copy.deepcopy(plain))
    assert [m.p for m in model.modules() if isinstance(m, SeededShakeDrop)] == pytest.approx([0.3, 0.6])
    assert model.state_dict().keys() == plain.state_dict().keys()
    x = torch.tanh(model[0](ROWS))
    for i, rate in ((2, 0.3), (6, 0.6)):
        x = torch.tanh(x + (1 - rate) * model[i + 2](torch.tanh(model[i](x))))
    torch.testing.assert_close(model.eval()(ROWS), model[-1](x), rtol=1e-13, atol=1e-13)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    other = ShakeDrop(0.5).build(nn.Sequential(block), torch.randn(3, 4, 8))
    assert [other[0].dropout1.shake_drop.p, other[0].dropout2.shake_drop.p] == [0.25, 0.5]
    again = ShakeDrop(0.2).build(model, ROWS)
    assert [m.p for m in again.modules() if isinstance(m, SeededShakeDrop)] == pytest.approx([0.1, 0.2])


def test_shake_drop_lets_the_rest_of_a_tuple_pass_and_finds_rows_on_the_second_axis() -> None:
    layer = SeededShakeDrop(p=1.0, axis=1)
    first, second = layer((torch.ones(4, 30, 5), torch.ones(3)))
    assert torch.equal(second, torch.ones(3))
    assert len(first.unique()) == 30
    assert all(len(row.unique()) == 1 for row in first.unbind(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_numbers_keep_their_precision(dtype: torch.dtype) -> None:
    x = torch.randn(9, 4, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    for y in (SeededShakeDrop(p=0.5)(x), SeededShakeDrop(p=0.5).eval()(x), SeededShake()(x, x + 1), SeededShake().eval()(x, x)):
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("cocktail", [BOTH, (SkipConnections(), ShakeDrop(0.7))])
def test_stacked_models_with_their_gradients_are_those_of_a_loop(cocktail: tuple[gf.phases.Regularizer, ...]) -> None:
    models = [built(cocktail, seed=seed) for seed in (1, 2)]

    def loss(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return functional_call(models[0], (p, b), (ROWS,)).square().sum()

    grads = vmap(torch.func.grad(loss), randomness="error")(*stack_module_state(models))
    for i, model in enumerate(built(cocktail, seed=seed) for seed in (1, 2)):
        model(ROWS).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(grads[name][i], p.grad, rtol=1e-11, atol=1e-12)
    assert not torch.equal(grads["4.bias"][0], grads["4.bias"][1])


def test_a_twin_has_weights_of_its_own_and_old_keys_stay() -> None:
    plain = mlp(5)
    model = built(BOTH, copy.deepcopy(plain))
    new = model.state_dict().keys() - plain.state_dict().keys()
    assert new == {f"{host}.skip.twin.{i}.{kind}" for host in (5, 9) for i in (0, 2) for kind in ("weight", "bias")}
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in plain.state_dict().items())
    assert not torch.equal(model[2].weight, model[5].skip.twin[0].weight)
    assert float(model[5].skip.twin[0].weight.detach().abs().max()) < 8**-0.5
    other = built(BOTH, mlp(5))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(ROWS), model.eval()(ROWS))
    ShakeShake().build(other, ROWS)
    assert other.state_dict().keys() == model.state_dict().keys()


def test_norms_and_dropout_in_a_branch_come_with_it() -> None:
    twin = built((SkipConnections(), BatchNorm(gamma=0.5), ShakeShake()))[5].skip.twin
    assert [float(twin[i].batchnorm.weight.detach().mean()) for i in (0, 2)] == [0.5, 0.5]
    assert not twin[2].bias.requires_grad
    assert not hasattr(twin[0], "skip_start")
    rising = Dropout(gf.schedules.linear(0.1, 0.5, steps=2))
    model = mlp()
    run = Run((SkipConnections(), rising, ShakeShake()), model, example=ROWS, task="numbers")
    twin = model[5].skip.twin
    assert (twin[1].dropout.name, twin[1].dropout.p) == ("5.skip.twin.1.dropout", 0.1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        run.loss(ROWS, torch.randn(6, 1)).backward()
        run.gradient(optimizer)
        optimizer.step()
        run.step(optimizer)
    assert (model[3].dropout.p, twin[1].dropout.p) == (0.5, 0.5)


def test_where_picks_and_drop_path_acts_on_the_mixture() -> None:
    model = built((SkipConnections(), ShakeShake(where=named("5.*")), DropPath(0.5)), mlp(5))
    assert (model[5].skip.doubled, model[9].skip.doubled) == (True, False)
    assert [m.skip.branch.drop_path.p for m in (model[5], model[9])] == [0.25, 0.5]
    torch.testing.assert_close(model.eval()(ROWS), model(ROWS))


def functional() -> nn.Module:
    layers = {f"l{i}": nn.Linear(8, 8) for i in range(3)} | {"head": nn.Linear(8, 1)}
    return Net(lambda m, x: m.head(F.relu(m.l2(F.relu(m.l1(F.relu(m.l0(x))))))), **layers)


def normed() -> nn.Module:
    model = mlp()
    weight_norm(model[2])
    return model


def test_a_sum_behind_the_last_layer_is_doubled_too() -> None:
    layers = {f"l{i}": nn.Linear(8, 8) for i in range(3)} | {"head": nn.Linear(8, 1), "act": nn.ReLU()}
    model = built(BOTH, Net(lambda m, x: m.head(m.act(m.l2(m.act(m.l1(m.act(m.l0(x))))))), **layers)).eval()
    x, twin = F.relu(model.l0(ROWS)), model.l2.skip.twin
    f = F.linear(F.relu(model.l1(x)), model.l2.weight, model.l2.bias)
    expected = model.head(F.relu(x + (f + twin[2](F.relu(twin[0](x)))) / 2))
    torch.testing.assert_close(model(ROWS), expected, rtol=1e-13, atol=1e-13)
    assert [type(m) for m in twin] == [nn.Linear, nn.ReLU, nn.Linear]
    assert not list(twin[2].children())


@pytest.mark.parametrize(
    ("make", "cocktail", "message"),
    [
        (mlp, (ShakeShake(),), r"ShakeShake doubles the branches of SkipConnections, and Sequential has none: write"),
        (functional, BOTH, r"branches of modules alone, but on the way to l2\.skip a function acts"),
        (normed, BOTH, r"copies plain layers, but 2 is parametrized"),
        (mlp, (SkipConnections(), ShakeShake(where=named("x"))), r"matched no branch .*; Sequential has: 5\.skip\.branch\."),
        (
            mlp,
            (SkipConnections(), DropPath(0.1), ShakeDrop(0.1)),
            r"ShakeDrop finds SeededDropPath at 5\.skip\.branch\.drop_path",
        ),
        (mlp, (SkipConnections(), ShakeDrop(0.1), DropPath(0.1)), r"DropPath finds SeededShakeDrop at .*: leave one out, or"),
        (mlp, (ShakeDrop(0.1),), r"ShakeDrop found no residual addition x \+ f\(x\) in Sequential"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    make: Callable[[], nn.Module], cocktail: tuple[gf.phases.Regularizer, ...], message: str
) -> None:
    model = make()
    names, before = [n for n, _ in model.named_modules()], model(ROWS)
    with pytest.raises(GoodfitError, match=message):
        built(cocktail, model)
    assert [n for n, _ in model.named_modules()] == names
    assert torch.equal(model(ROWS), before)


def test_rows_that_do_not_show_are_refused_and_so_is_a_schedule() -> None:
    model = Net(lambda m, x: m.body(x.flatten(0, 1)), body=mlp())
    with pytest.raises(GoodfitError, match=r"cannot tell the rows of body\.5\.skip\.branch in Net"):
        Run(BOTH, model, example=torch.randn(3, 5, 8))
    with pytest.raises(GoodfitError, match=r"ShakeDrop\.p is fixed before training starts"):
        ShakeDrop(gf.schedules.linear(0.0, 0.5, steps=3))
    model = built((SkipConnections(), DropPath(0.2, where=named("5.*")), ShakeDrop(0.2, where=named("9.*"))), mlp(5))
    assert (model[5].skip.branch.drop_path.p, model[9].skip.branch.shake_drop.p) == (0.1, 0.2)


@pytest.mark.parametrize("cocktail", [BOTH, (SkipConnections(), ShakeDrop(0.7))])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_draw_the_same_and_act_by_themselves(
    cocktail: tuple[gf.phases.Regularizer, ...], copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = built(cocktail)
    other = copied(model)
    assert torch.equal(model(ROWS), other(ROWS))
    with torch.no_grad():
        [m for m in other.modules() if isinstance(m, nn.Linear)][2].bias.add_(1)
    assert not torch.equal(model.eval()(ROWS), other.eval()(ROWS))


@pytest.mark.parametrize("cocktail", [BOTH, (SkipConnections(), ShakeDrop(0.7))])
def test_noise_is_drawn_again_in_checkpointing(cocktail: tuple[gf.phases.Regularizer, ...]) -> None:
    grads = []
    for checked in (False, True):
        model = built(cocktail, seed=3)
        body = model[:6]
        y = checkpoint(body, ROWS, use_reentrant=False) if checked else body(ROWS)
        model[6](y).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("cocktail", [BOTH, (SkipConnections(), ShakeDrop(0.5))])
def test_a_table_is_trained_and_the_best_restored(cocktail: tuple[gf.phases.Regularizer, ...]) -> None:
    x = torch.randn(60, 8)
    y = x.square().sum(1).sqrt()
    model = mlp(5)
    result = fit(
        model, (x[:40], y[:40]), (x[40:], y[40:]), (*cocktail, EarlyStopping(3)), epochs=8, batch_size=8, progress=False
    )
    history = [row["valid_loss"] for row in result.history]
    assert min(history) < history[0]
    with torch.no_grad():
        kept = float(F.mse_loss(model.eval()(x[40:]).squeeze(1), y[40:]))
    assert kept == pytest.approx(min(history), rel=1e-9)
