"""Skip connections: the sums stand where the paper has them, whatever was built before or is built behind."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from goodfit import (
    BatchNorm,
    Dropout,
    DropPath,
    EarlyStopping,
    GoodfitError,
    GoodfitWarning,
    Run,
    SkipConnections,
    fit,
    fold_batchnorm,
    shrink,
)
from goodfit.layers.skip import Skip
from goodfit.surgery.residuals import residuals
from goodfit.where import named
from nets import Net, settled

ROWS, IMAGES = torch.randn(6, 8, dtype=torch.float64), torch.randn(2, 3, 6, 6, dtype=torch.float64)


def mlp(depth: int = 5, act: Callable[[], nn.Module] = nn.ReLU, width: int = 8) -> nn.Sequential:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), act())]
    return nn.Sequential(*layers, nn.Linear(width, 1)).double()


def called(depth: int, shared: bool = False) -> nn.Module:
    """The same with activations that are functions, or one module for all."""
    layers = {f"l{i}": nn.Linear(8, 8) for i in range(depth)} | {"head": nn.Linear(8, 1)}
    layers |= {"relu": nn.ReLU()} if shared else {}

    def run(m: Any, x: Tensor) -> Tensor:
        for i in range(depth):
            x = (m.relu if shared else F.relu)(m.get_submodule(f"l{i}")(x))
        return m.head(x)

    return Net(run, **layers).double()


called_with: dict[str, Callable[[], nn.Module]] = {"functions": lambda: called(5), "one": lambda: called(5, shared=True)}


def hosts(model: nn.Module) -> list[str]:
    return [name.rpartition(".")[0] for name, m in model.named_modules() if isinstance(m, Skip)]


def by_hand(linears: list[nn.Module], x: Tensor) -> Tensor:
    """What comes to the last layer of five and a head."""
    x = F.relu(linears[0](x))
    for a, b in ((1, 2), (3, 4)):
        x = F.relu(x + linears[b](F.relu(linears[a](x))))
    return x


@pytest.mark.parametrize("train", [True, False])
def test_the_sums_are_those_of_the_paper(train: bool) -> None:
    plain = mlp()
    model = SkipConnections().build(copy.deepcopy(plain), ROWS).train(train)
    assert hosts(model) == ["5", "9"]
    torch.testing.assert_close(model(ROWS), plain[-1](by_hand(list(plain[::2]), ROWS)), rtol=1e-14, atol=1e-14)
    assert not torch.allclose(model(ROWS), plain(ROWS))
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("kind", called_with)
def test_an_activation_without_a_module_of_its_own_takes_the_sum_too(kind: str) -> None:
    plain = called_with[kind]()
    model = SkipConnections().build(copy.deepcopy(plain), ROWS)
    assert hosts(model) == ["l2", "l4"]
    linears = [m for m in plain.children() if isinstance(m, nn.Linear)]
    torch.testing.assert_close(model(ROWS), linears[-1](by_hand(linears, ROWS)), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("layers", "expected"), [(1, ["3", "5", "7", "9"]), (3, ["7"]), (4, ["9"])])
def test_blocks_have_so_many_layers(layers: int, expected: list[str]) -> None:
    assert hosts(SkipConnections(layers).build(mlp(), ROWS)) == expected


def test_one_layer_is_a_branch_by_hand() -> None:
    plain = mlp(2)
    model = SkipConnections(1).build(copy.deepcopy(plain), ROWS)
    h = F.relu(plain[0](ROWS))
    torch.testing.assert_close(model(ROWS), plain[4](F.relu(h + plain[2](h))), rtol=1e-14, atol=1e-14)


def test_widths_that_change_and_pooling_are_gone_around() -> None:
    widths = (8, 8, 6, 6, 6, 4, 4)
    layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.Tanh())]
    assert hosts(SkipConnections().build(nn.Sequential(*layers, nn.Linear(4, 1)).double(), ROWS)) == ["7"]
    conv = lambda i, o: (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True))  # noqa: E731
    cnn = nn.Sequential(*conv(3, 4), *conv(4, 4), *conv(4, 4), nn.MaxPool2d(2), *conv(4, 4), *conv(4, 4), nn.Flatten())
    cnn.append(nn.Linear(36, 2)).double()
    plain = settled(copy.deepcopy(cnn)).eval()
    model = SkipConnections().build(copy.deepcopy(plain), IMAGES)
    assert hosts(model) == ["8", "15"]
    h = plain[:3](IMAGES)
    h = plain[9](F.relu(h + plain[3:8](h)))
    torch.testing.assert_close(model(IMAGES), plain[16:](F.relu(h + plain[10:15](h))), rtol=1e-13, atol=1e-13)


NETS = pytest.mark.parametrize("net", [mlp, *called_with.values()], ids=["modules", *called_with])


@NETS
@pytest.mark.parametrize("norm", [BatchNorm(), BatchNorm(zero_residual=True), BatchNorm(calibrate="identity")], ids=str)
def test_a_batch_norm_is_in_the_branch_in_either_order(net: Callable[[], nn.Module], norm: BatchNorm) -> None:
    model = net()
    skipped = SkipConnections().build(copy.deepcopy(model), ROWS).eval()(ROWS)
    Run((SkipConnections(), norm), model, example=ROWS)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    gammas = [float(m.batchnorm.weight.detach().abs().max()) for m in linears[:-1]]
    if norm.calibrate:
        torch.testing.assert_close(model.eval()(ROWS), skipped, rtol=1e-9, atol=1e-9)
    else:
        assert gammas == [1, 1, float(not norm.zero_residual), 1, float(not norm.zero_residual)]
    layers = [Net(lambda m, x: m.n(F.linear(x, m.l.weight, m.l.bias)), l=m, n=m.batchnorm) for m in linears[:-1]]
    expected = by_hand(layers, ROWS)
    torch.testing.assert_close(model(ROWS), linears[-1](expected), rtol=1e-12, atol=1e-12)
    if not norm.calibrate and not norm.zero_residual:
        other = net()
        other.load_state_dict({n: t for n, t in model.state_dict().items() if "batchnorm" not in n})
        Run((norm, SkipConnections()), other, example=ROWS)
        torch.testing.assert_close(other(ROWS), model(ROWS), rtol=1e-12, atol=1e-12)


@NETS
def test_drop_path_finds_every_branch(net: Callable[[], nn.Module]) -> None:
    model = SkipConnections().build(net(), ROWS)
    assert [r.branch for r in residuals(model, ROWS)] == [f"{host}.skip.branch" for host in hosts(model)]
    DropPath(0.4).build(model, ROWS)
    assert [m.branch.drop_path.p for m in model.modules() if isinstance(m, Skip)] == pytest.approx([0.2, 0.4])
    picked = SkipConnections().build(mlp(), ROWS)
    DropPath(0.4, where=named("9.*")).build(picked, ROWS)
    assert not hasattr(picked[5].skip.branch, "drop_path")


@NETS
def test_dropout_goes_where_it_would_have_gone(net: Callable[[], nn.Module]) -> None:
    plain, model = net(), SkipConnections().build(net(), ROWS)
    for one in (plain, model):
        Dropout(0.3).build(one, ROWS)
    places = [[n.replace("skip_start.", "") for n, m in one.named_modules() if hasattr(m, "rate")] for one in (plain, model)]
    assert places[0] == places[1]


def test_what_comes_behind_can_be_folded_and_shrunk() -> None:
    model = mlp()
    Run((BatchNorm(), SkipConnections()), model, example=ROWS)
    before = settled(model).eval()(ROWS).detach()
    assert len(fold_batchnorm(model, ROWS).folded) == 5
    torch.testing.assert_close(model(ROWS), before, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        for p in (model[2].weight[0], model[2].bias[:1]):
            p.zero_()
    before = model(ROWS).detach()
    shrink(model, ROWS)
    assert model[2].weight.shape == (7, 8)
    torch.testing.assert_close(model(ROWS), before, rtol=1e-9, atol=1e-9)


def test_building_again_changes_nothing_and_tells_other_layers() -> None:
    model = SkipConnections().build(mlp(), ROWS)
    before, modules = model(ROWS), [id(m) for m in model.modules()]
    SkipConnections().build(model, ROWS)
    with pytest.warns(GoodfitWarning, match=r"as they are, around 2 layers and not 1"):
        SkipConnections(1).build(model, ROWS)
    assert [id(m) for m in model.modules()] == modules
    assert torch.equal(model(ROWS), before)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "too short": (lambda: mlp(2), r"found no 2 linear or convolution layers in a row in Sequential .*; say layers=1\."),
    "changing": (
        lambda: nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 1)).double(),
        r"leave them out of the cocktail\.",
    ),
    "no activation": (lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))).double(), "leave them out"),
    "residual": (lambda: Net(lambda m, x: x + m.a(x), a=mlp(3).append(nn.Linear(1, 8)).double()), "adds x .* already; leave"),
    "shared": (lambda: (lambda b: nn.Sequential(nn.Linear(8, 8), *b, *b, nn.Linear(8, 1)))(mlp(1)[:2]).double(), "leave them"),
    "leaf": (lambda: nn.Linear(8, 8).double(), "single Linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_without_a_block_is_refused_and_stays_as_it_was(case: str) -> None:
    make, message = REFUSED[case]
    model = make()
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(GoodfitError, match=message):
        SkipConnections().build(model, ROWS)
    assert [n for n, _ in model.named_modules()] == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_cocktail_that_is_refused_takes_them_out_again() -> None:
    model = mlp()
    before = model(ROWS)
    with pytest.raises(GoodfitError, match="matched no branch"):
        Run((SkipConnections(), DropPath(0.1, where=named("x"))), model, example=ROWS)
    assert torch.equal(model(ROWS), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_act_by_themselves_and_hold_nothing(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = SkipConnections().build(mlp(), ROWS)
    with pytest.raises(RuntimeError):
        model[:5](ROWS[:, :3])
    model[:4](ROWS)  # the branch is begun, and no sum comes
    other = copied(model)
    assert torch.equal(model(ROWS), other(ROWS))
    with torch.no_grad():
        other[2].weight.zero_()
    assert not torch.equal(model(ROWS), other(ROWS))
    with pytest.raises(GoodfitError, match="without the start of its branch"):
        other[5](ROWS)


def test_threads_do_not_meet() -> None:
    model = SkipConnections().build(mlp(), ROWS).eval()
    inputs = [torch.randn(6, 8) for _ in range(4)]
    expected = [model(x) for x in inputs]
    found: dict[int, bool] = {}
    gate = threading.Barrier(4)

    def meet(*_: Any) -> None:
        gate.wait(10)

    model[3].register_forward_hook(meet)  # all are within the first branch at once

    def work(i: int) -> None:
        found[i] = torch.equal(model(inputs[i]), expected[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == dict.fromkeys(range(4), True)


class Checked(nn.Sequential):
    """Checkpoints its layers, cut at some of them."""

    cuts: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        for start, stop in zip((0, *self.cuts), (*self.cuts, len(self)), strict=True):
            x = checkpoint(lambda x, part=self[start:stop]: nn.Sequential.forward(part, x), x, use_reentrant=False)
        return x


def test_a_checkpoint_holds_whole_blocks_or_is_refused() -> None:
    plain = mlp()
    model = SkipConnections().build(copy.deepcopy(plain), ROWS)
    model(ROWS).square().sum().backward()
    checked = SkipConnections().build(Checked(*copy.deepcopy(plain)), ROWS)
    checked.cuts = (6,)
    checked(ROWS).square().sum().backward()
    for a, b in zip(model.parameters(), checked.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    checked.cuts = (3,)
    with pytest.raises(GoodfitError, match="checkpoint the layers of a branch and the activation behind it together"):
        checked(ROWS).square().sum().backward()


def test_it_compiles_afterwards() -> None:
    model = SkipConnections().build(mlp(3), ROWS)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(ROWS), model(ROWS), rtol=1e-14, atol=1e-14)


def test_a_table_is_trained_and_the_best_restored() -> None:
    x = torch.randn(60, 8)
    y = x.square().sum(1).sqrt()
    cocktail = (SkipConnections(), BatchNorm(), DropPath(0.2), EarlyStopping(2))
    result = fit(mlp(), (x[:40], y[:40]), (x[40:], y[40:]), cocktail, epochs=6, batch_size=8, progress=False)
    history = [row["valid_loss"] for row in result.history]
    assert min(history) < history[0]
