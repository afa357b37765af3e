"""DropConnect: weights are masked in training, whole in eval, and the optimizer's parameters stay the model's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import goodfit as gf
from goodfit import DropConnect, GoodfitError, Run
from goodfit.layers.connect import SeededDropConnect
from goodfit.noise import Clock, Noise
from goodfit.where import named
from nets import Net

X = torch.randn(6, 3, dtype=torch.float64)
SERIES = torch.randn(4, 5, 3, dtype=torch.float64)
HIDDEN = named("*.weight_hh_l*")


def last(m: Any, x: Tensor) -> Tensor:
    return m.out(m.rnn(x)[0])


def recurrent(kind: str = "LSTM", **options: Any) -> nn.Module:
    width = 4 * (2 if options.get("bidirectional") else 1)
    return Net(last, rnn=getattr(nn, kind)(3, 4, batch_first=True, **options), out=nn.Linear(width, 1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def layers(model: nn.Module) -> list[SeededDropConnect]:
    return [m for m in model.modules() if isinstance(m, SeededDropConnect)]


def bound(one: DropConnect, model: nn.Module, example: Any, seed: int = 7) -> nn.Module:
    return Run(one, model, example=example, task="numbers", seed=seed).model


def mask(name: str, weight: Tensor, p: float, call: int = 0, seed: int = 7) -> Tensor:
    return (Noise(seed, name, 0, call).uniform(*weight.shape) >= p) / (1 - p)


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_outputs_and_gradients_by_hand(p: float) -> None:
    model = bound(DropConnect(p), mlp(), X)
    for call in range(2):
        model.zero_grad()
        y = model(X)
        y.square().sum().backward()
        a, c = (mask(f"{i}.drop_weight", model[i].weight, p, call) for i in (0, 2))
        w, b, v, d = (t.detach() for t in (model[0].weight, model[0].bias, model[2].weight, model[2].bias))
        h = torch.tanh(X @ (w * a).T + b)
        out = h @ (v * c).T + d
        torch.testing.assert_close(y, out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model[2].weight.grad, c * (2 * out.T @ h), rtol=1e-12, atol=1e-12)
        back = (2 * out) @ (v * c) * (1 - h.square())
        torch.testing.assert_close(model[0].weight.grad, a * (back.T @ X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_weight_drop_equals_an_lstm_that_is_written_by_hand(bidirectional: bool) -> None:
    model = bound(DropConnect(0.5, where=HIDDEN), recurrent(bidirectional=bidirectional), SERIES)
    parts = {n: t.detach() for n, t in model.rnn.named_parameters()}

    def direction(x: Tensor, suffix: str) -> Tensor:
        hidden = parts[f"weight_hh_l0{suffix}"]
        hidden = hidden * mask(f"rnn.drop_weight_hh_l0{suffix}", hidden, 0.5)
        h, c, seen = torch.zeros(4, 4), torch.zeros(4, 4), []
        for t in range(x.shape[1]):
            gates = x[:, t] @ parts[f"weight_ih_l0{suffix}"].T + h @ hidden.T
            i, f, g, o = (gates + parts[f"bias_ih_l0{suffix}"] + parts[f"bias_hh_l0{suffix}"]).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            seen.append(h)
        return torch.stack(seen, 1)

    sides = [direction(SERIES, "")]
    sides += [direction(SERIES.flip(1), "_reverse").flip(1)] if bidirectional else []
    torch.testing.assert_close(model(SERIES), model.out(torch.cat(sides, -1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_get_their_gradients_and_stay_whole_in_eval(kind: str) -> None:
    plain = recurrent(kind, num_layers=2)
    model = bound(DropConnect(0.5, where=HIDDEN), copy.deepcopy(plain), SERIES)
    model(SERIES).sum().backward()
    for i in range(2):
        weight = getattr(model.rnn, f"weight_hh_l{i}")
        dropped = mask(f"rnn.drop_weight_hh_l{i}", weight, 0.5) == 0
        assert weight.is_leaf
        assert torch.equal(weight.grad == 0, dropped)
        assert any(weight is one for one in model.rnn._flat_weights)
    assert torch.equal(model.eval()(SERIES), plain.eval()(SERIES))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model(SERIES), plain(SERIES))


def test_eval_and_p_zero_are_the_identity_and_keys_stay() -> None:
    plain = recurrent()
    model = DropConnect(0.5).build(copy.deepcopy(plain), SERIES)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert not torch.equal(model(SERIES), plain(SERIES))
    assert torch.equal(model.eval()(SERIES), plain.eval()(SERIES))
    DropConnect(0.0).tune(model)
    assert torch.equal(model.train()(SERIES), plain(SERIES))
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())


def test_one_mask_serves_a_forward_pass_and_the_next_draws_anew() -> None:
    twice = Net(lambda m, x: m.a(m.a(x)), a=nn.Linear(3, 3, bias=False))
    model = bound(DropConnect(0.5), twice, X)
    for call in range(2):
        w = model.a.weight * mask("a.drop_weight", model.a.weight, 0.5, call)
        torch.testing.assert_close(model(X), X @ w.T @ w.T, rtol=1e-12, atol=1e-12)


def test_a_cell_has_one_mask_for_all_time_steps() -> None:
    def steps(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            h = m.cell(x[:, t], h)
        return h

    model = bound(DropConnect(0.5, where=named("*.weight_hh")), Net(steps, cell=nn.GRUCell(3, 4)), SERIES)
    plain = copy.deepcopy(model)
    DropConnect(0.0).tune(plain)
    with torch.no_grad():
        plain.cell.weight_hh.mul_(mask("cell.drop_weight_hh", plain.cell.weight_hh, 0.5))
    torch.testing.assert_close(model(SERIES), plain.eval()(SERIES), rtol=1e-12, atol=1e-12)


def test_attention_is_masked_where_it_reads_its_projections() -> None:
    attend = Net(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(4, 2, batch_first=True))
    x = torch.randn(2, 3, 4)
    model = bound(DropConnect(0.5), attend, x)
    assert [layer.weight for layer in layers(model)] == ["in_proj_weight", "out_proj.weight"]
    plain = nn.MultiheadAttention(4, 2, batch_first=True)
    plain.load_state_dict(model.a.state_dict())
    with torch.no_grad():
        plain.in_proj_weight.mul_(mask("a.drop_in_proj_weight", plain.in_proj_weight, 0.5))
        plain.out_proj.weight.mul_(mask("a.drop_out_proj_weight", plain.out_proj.weight, 0.5))
    torch.testing.assert_close(model(x), plain(x, x, x)[0], rtol=1e-12, atol=1e-12)


def test_a_transformer_layer_of_torch_drops_in_training_alone() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), nn.Linear(4, 1))
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 4)
    DropConnect(0.5).build(model, x)
    assert len(layers(model)) == 5
    assert not torch.equal(model(x), plain(x))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-12, atol=1e-12)


class Raises(nn.Linear):
    """Fails in the middle of its forward when it is told to."""

    fails = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.fails:
            raise RuntimeError("on purpose")
        return y


def test_an_exception_puts_the_weight_back() -> None:
    model = DropConnect(0.5).build(nn.Sequential(nn.Linear(3, 3), Raises(3, 1)), X)
    weight = model[1].weight
    model[1].fails = True
    with pytest.raises(RuntimeError, match="on purpose"):
        model(X)
    assert model[1].weight is weight
    assert isinstance(model[1]._parameters["weight"], nn.Parameter)
    model[1].fails = False
    assert not torch.equal(model(X), model(X))


def test_a_failure_of_a_hook_before_ours_changes_nothing() -> None:
    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("on purpose")

    model = DropConnect(0.5).build(mlp(), X)
    model[0].register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(X)
    assert isinstance(model[0]._parameters["weight"], nn.Parameter)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks_again(reentrant: bool) -> None:
    class Checked(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for one in self:
                x = checkpoint(one, x, use_reentrant=reentrant)
            return x

    gradients, plain, x = [], mlp(), X.clone().requires_grad_()
    for kind in (nn.Sequential, Checked):
        model = DropConnect(0.5).build(kind(*copy.deepcopy(plain)), X)
        for layer in layers(model):
            layer.bind(layer.name, 3, Clock())
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weights_that_one_module_alone_does_not_read_are_refused() -> None:
    outside = Net(lambda m, x: m.a(x) + F.linear(x, m.b.weight), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    both = Net(lambda m, x: m.a(x) + F.linear(x, m.a.weight), a=nn.Linear(3, 3))
    old = nn.utils.weight_norm(nn.Linear(3, 2))  # type: ignore[no-untyped-call]
    cases = {
        "tied": (tied(), r"0\.weight is read by '0' and '1': leave it out of where"),
        "used from outside": (both, r"a\.weight is read by '' and 'a'"),
        "parametrized": (nn.Sequential(weight_norm(nn.Linear(3, 2))), r"0\.parametrizations\.weight\.original\d is parametr"),
        "the old way": (nn.Sequential(old), r"0\.weight_. is parametrized: leave it out of where"),
        "lazy": (nn.Sequential(nn.LazyLinear(1)), r"0\.weight is lazy: run the model on a batch once"),
    }
    for model, message in cases.values():
        with pytest.raises(GoodfitError, match=message):
            DropConnect(0.5).build(model, X)
        assert layers(model) == []
    DropConnect(0.5).build(outside, X)  # read by the root alone
    assert [(layer.name, layer.weight) for layer in layers(outside)] == [
        ("a.drop_weight", "weight"),
        ("drop_b_weight", "b.weight"),
    ]
    assert not torch.equal(outside(X), outside(X))


def test_where_picks_weights_by_role_and_name() -> None:
    assert [m.name for m in layers(DropConnect(0.5).build(mlp(), X))] == ["0.drop_weight", "2.drop_weight"]
    biased = DropConnect(0.5, where=named("0.*") & gf.where.biases).build(mlp(), X)
    assert [m.name for m in layers(biased)] == ["0.drop_bias"]
    with pytest.raises(GoodfitError, match=r"matched no weights \(where=named\('x'\)\); the model has: 0\.weight, 0\.bias,"):
        DropConnect(0.5, where=named("x")).build(mlp(), X)


def test_two_regularizers_and_a_schedule_move_their_own_layers() -> None:
    model = mlp()
    cocktail = (
        DropConnect(gf.schedules.linear(0.0, 0.4, steps=2), where=named("0.weight")),
        DropConnect(0.1, named("2.weight")),
    )
    run = Run(cocktail, model, example=X, task="numbers")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    rates = []
    for _ in range(3):
        rates.append([m.p for m in layers(model)])
        run.loss(X, torch.randn(6)).backward()
        run.gradient(optimizer)
        optimizer.step()
        run.step(optimizer)
    assert rates == [[0.0, 0.1], [0.2, 0.1], [0.4, 0.1]]


def test_building_twice_masks_once() -> None:
    model = DropConnect(0.2).build(mlp(), X)
    DropConnect(0.5).build(model, X)
    assert [m.p for m in layers(model)] == [0.5, 0.5]
    assert [len(m._forward_pre_hooks) for m in (model, model[0], model[2])] == [1, 1, 1]
    for layer in layers(model):
        layer.bind(layer.name, 7, Clock())
    kept = {*(model[0].weight * 2).flatten().tolist(), 0.0}
    seen: list[Tensor] = []

    class Seen(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.weight)
            return super().forward(x)

    model[0].__class__ = Seen
    model(X)
    assert set(seen[0].flatten().tolist()) <= kept


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_act_by_themselves(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = DropConnect(0.5).build(recurrent(), SERIES)
    model(SERIES)
    other = copied(model)
    assert torch.equal(model(SERIES), other(SERIES))
    DropConnect(0.0).tune(other)
    assert [m.p for m in layers(other)] == [0.0] * 3
    assert torch.equal(other(SERIES), model.eval()(SERIES))
    assert {m.p for m in layers(model)} == {0.5}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_works_in_any_precision_and_memory_format(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 5).to(dtype)
    model = DropConnect(0.5).build(nn.Sequential(nn.Conv2d(3, 4, 3)).to(dtype).to(memory_format=torch.channels_last), x)
    y = model(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert 0 < int((model[0].weight.grad == 0).sum()) < model[0].weight.numel()


def test_torchs_generator_and_modes_stay() -> None:
    model = mlp()
    model[0].eval()
    state = torch.get_rng_state()
    DropConnect(0.5).build(model, X)
    model(X)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in layers(model)] == [False, True]
    with pytest.raises(GoodfitError, match="must run on the example"):
        DropConnect(0.5).build(mlp(), torch.randn(3, 5))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_wrapped_and_bare_models_are_refused_and_compiling_afterwards_is_right() -> None:
    for wrapped in (nn.DataParallel(mlp()), torch.compile(mlp(), backend="eager"), torch.jit.script(mlp())):
        with pytest.raises(GoodfitError, match="give the model first"):
            DropConnect(0.5).build(wrapped, X)
    with pytest.raises(GoodfitError, match="single Linear"):
        DropConnect(0.5).build(nn.Linear(3, 1), X)
    model = DropConnect(0.5).build(mlp(), X)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager")
    for _ in range(3):
        assert torch.equal(compiled(X), model(X))
    assert torch.equal(compiled.eval()(X), model.eval()(X))
    assert isinstance(twin[0]._parameters["weight"], nn.Parameter)
