"""What acts around the code of a module: it leaves nothing behind, and acts on no code but the module's own."""

from __future__ import annotations

import copy
import inspect
import pickle
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import goodfit as gf
from goodfit import AttentionDropout, DropConnect, Dropout, GoodfitError
from goodfit.layers.connect import SeededDropConnect
from goodfit.surgery.within import Guard
from goodfit.where import named

X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = X.sum(1).sin()


class Drops(nn.Module):
    """Drops and attends by functions, and is cut off where it is told to: before its code, and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.runs, self.cut = 0, -1

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(torch.relu(self.a(x)), 0.1, self.training)
        h = F.scaled_dot_product_attention(h, h, h, dropout_p=0.1 if self.training else 0.0)
        self.runs += 1
        if self.runs == self.cut:
            raise KeyboardInterrupt
        return self.b(h)


class Cut(nn.Linear):
    """The same within a layer that DropConnect masks."""

    runs, cut = 0, -1

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.runs += 1
        if self.runs == self.cut:
            raise KeyboardInterrupt
        return y


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(Drops(), Cut(4, 1)).double()


KINDS = [Dropout(0.5), AttentionDropout(0.5), DropConnect(0.5)]
each_kind = pytest.mark.parametrize("one", KINDS, ids=lambda one: type(one).__name__)


def clean(model: nn.Module) -> None:
    """Nothing is left: weights are the parameters, no mode is on, and torch's functions do what they say."""
    assert torch.overrides._get_current_function_mode_stack() == []
    for module in model.modules():
        assert all(isinstance(p, nn.Parameter) for p in module._parameters.values() if p is not None)
    ones = torch.ones(1000)
    assert torch.equal(F.dropout(ones, 0.0), ones)
    assert set(F.dropout(ones, 0.2).unique().tolist()) == {0.0, 1.25}
    q = torch.randn(2, 3, 4)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q))


@each_kind
@pytest.mark.parametrize("where", [0, 1])
def test_an_interrupt_at_any_forward_of_a_fit_leaves_nothing_behind(one: Any, where: int) -> None:
    def fitted(cut: int) -> tuple[nn.Module, Any]:
        model = net()
        model[where].cut = cut
        with suppress(KeyboardInterrupt):  # nothing is to be kept of the first epoch
            gf.fit(model, (X[:8], Y[:8]), (X[8:], Y[8:]), gf.Cocktail(one), epochs=2, batch_size=4)
        return model, model[where]

    whole, place = fitted(-1)
    assert place.runs >= 6
    for cut in range(1, place.runs + 1):
        model, place = fitted(cut)
        clean(model)
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in whole.named_parameters()]
        place.cut = -1
        before = [p.detach().clone() for p in model.parameters()]
        model.train()(X).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert not all(map(torch.equal, model.parameters(), before))


@each_kind
@pytest.mark.parametrize("where", [0, 1])
def test_an_own_loop_goes_on_behind_an_interrupt_as_if_it_had_not_been(one: Any, where: int) -> None:
    def trained(cut: int) -> nn.Module:
        model = one.build(net(), X)
        model[where].runs, model[where].cut = 0, cut
        optimizer, step = torch.optim.SGD(model.parameters(), lr=0.1), 0
        for layer in model.modules():
            if isinstance(layer, SeededDropConnect):
                layer.bind(layer.name, 7, gf.noise.Clock())
        while step < 3:
            torch.manual_seed(step)
            try:
                loss = model(X).square().sum()
            except KeyboardInterrupt:
                clean(model)
                for layer in model.modules():
                    if isinstance(layer, SeededDropConnect):
                        layer._calls = step
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        return model

    whole = trained(-1)
    for cut in (1, 2, 3):
        other = trained(cut)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))


# -- parts under checkpointing --


class Part(nn.Module):
    """Checkpoints a part of its own code."""

    leaks = 0.0  # the rate in eval

    def __init__(self, how: str, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.how, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 4), how, reentrant

    def part(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if self.how == "drop":
            return self.b(F.dropout(h, 0.1, self.training))
        if self.how == "attend":
            return F.scaled_dot_product_attention(h, h, h, dropout_p=0.1 if self.training else self.leaks)
        return h @ self.b.weight  # read by this very module

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=self.reentrant)


CASES = [(Dropout(0.5), "drop"), (AttentionDropout(0.5), "attend"), (DropConnect(0.5, where=named("0.b.weight")), "read")]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("one", "how"), CASES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_part_that_its_module_checkpoints_is_refused(one: Any, how: str, reentrant: bool) -> None:
    model = one.build(nn.Sequential(Part(how, reentrant)).double(), X)
    with pytest.raises(GoodfitError, match=r"acts while its module runs, .* checkpoint the module as a whole"):
        model(X.clone().requires_grad_())
    clean(model)
    model.eval()(X.clone().requires_grad_()).sum().backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("one", "how"), CASES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_module_that_is_checkpointed_as_a_whole_has_the_plain_gradient(one: Any, how: str, reentrant: bool) -> None:
    class Plain(Part):
        def forward(self, x: Tensor) -> Tensor:
            return self.part(x)

    class Checked(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self[0], x, use_reentrant=reentrant)

    torch.manual_seed(0)
    plain, gradients, x = Plain(how, reentrant).double(), [], X.clone().requires_grad_()
    for kind in (nn.Sequential, Checked):
        model = one.build(kind(copy.deepcopy(plain)), X)
        torch.manual_seed(4)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_attention_that_drops_in_eval_is_refused_there_too_and_an_equal_rate_is_right() -> None:
    model = AttentionDropout(0.1).build(nn.Sequential(Part("attend", False)).double(), X)
    model(X.clone().requires_grad_()).sum().backward()
    model.eval()(X.clone().requires_grad_()).sum().backward()
    model[0].leaks = 0.1
    with torch.no_grad():
        assert torch.equal(model(X), model(X))
    with pytest.raises(GoodfitError, match="checkpoint the module as a whole"):
        model(X.clone().requires_grad_())


# -- whose code --


class Heard(torch.overrides.TorchFunctionMode):
    """The rates that functions get in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "dropout":
            self.rates.append(args[1] if len(args) > 1 else kwargs["p"])
        if func.__name__ == "scaled_dot_product_attention":
            self.rates.append(kwargs["dropout_p"])
        return func(*args, **kwargs)


def heard(model: nn.Module) -> list[Any]:
    with Heard() as mode:
        model(X)
    return mode.rates


class Calls(nn.Module):
    """Drops and attends in its own code, around that of another."""

    def __init__(self, inner: nn.Module | None = None, sometimes: bool = False) -> None:
        super().__init__()
        self.inner, self.sometimes, self.now = inner or nn.Identity(), sometimes, True

    def forward(self, x: Tensor) -> Tensor:
        if not self.sometimes or self.now:
            x = F.dropout(x, 0.1, self.training)
            x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.2)
        return self.inner(x)


def test_where_reaches_the_code_of_the_module_that_it_names_alone() -> None:
    model = nn.Sequential(Calls(nn.Sequential(Calls(Calls()))))
    assert heard(Dropout(0.8, where=named("0.dropout()")).build(model, X)) == [0.8, 0.2, 0.1, 0.2, 0.1, 0.2]
    assert heard(AttentionDropout(0.7, where=named("0.inner.0")).build(model, X)) == [0.8, 0.2, 0.1, 0.7, 0.1, 0.2]
    assert heard(Dropout(0.6, where=named("0.inner.0.inner.dropout()")).build(model, X)) == [0.8, 0.2, 0.1, 0.7, 0.6, 0.2]
    assert heard(AttentionDropout(0.5).build(model, X)) == [0.8, 0.5, 0.1, 0.5, 0.6, 0.5]


def test_code_that_did_not_run_on_the_example_keeps_its_rates_too() -> None:
    model = nn.Sequential(Calls(Calls(sometimes=True)))
    model[0].inner.now = False
    Dropout(0.8).build(model, X)
    AttentionDropout(0.7).build(model, X)
    model[0].inner.now = True
    assert heard(model) == [0.8, 0.7, 0.1, 0.2]


def test_an_owner_drops_the_softmax_that_another_module_makes() -> None:
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x @ x.mT, -1)

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = Scores()

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.scores(x), 0.1, self.training) @ x

    assert heard(AttentionDropout(0.7).build(nn.Sequential(Owner()), X)) == [0.7]


# -- what stands in for forward --


def test_a_forward_of_the_users_own_runs_within() -> None:
    def doubled(self: nn.Module, x: Tensor, scale: float = 2.0) -> Tensor:
        return scale * type(self).forward(self, x)

    model = net()
    model[0].forward = types.MethodType(doubled, model[0])
    plain = copy.deepcopy(model).eval()
    Dropout(0.8, where=named("0.dropout()")).build(model, X)
    assert heard(model) == [0.8, 0.1]
    assert str(inspect.signature(model[0].forward)) == "(x: 'Tensor', scale: 'float' = 2.0) -> 'Tensor'"
    model[0].b.eval()
    AttentionDropout(0.0).build(model.eval(), X)
    whole = net().eval()
    AttentionDropout(0.0).build(whole, X)
    torch.testing.assert_close(model[0](X), 2 * whole[0](X), rtol=1e-12, atol=1e-12)
    assert isinstance(plain[0].forward, types.MethodType)


def test_rates_move_where_others_have_put_a_forward_around_ours() -> None:
    model = Dropout(0.8).build(net(), X)
    inner = model[0].forward
    model[0].forward = lambda x: inner(x)
    Dropout(0.4).tune(model)
    Dropout(0.4).build(model, X)
    assert heard(model) == [0.4, 0.1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_run_their_own_code(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    for one in KINDS:
        one.build(model, X)
    other = copied(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert not other(X).eq(0).all()
    Dropout(0.3).tune(other)
    assert (heard(model), heard(other)) == ([0.5, 0.5], [0.3, 0.5])


@each_kind
def test_a_copy_that_shares_its_code_is_refused(one: Any) -> None:
    model = one.build(net(), X)
    host = next(m for m in model.modules() if any(isinstance(h, Guard) for h in m._forward_pre_hooks.values()))
    for shared in (copy.copy(host), host._replicate_for_data_parallel()):
        with pytest.raises(GoodfitError, match=r"shallow copy of, .* DistributedDataParallel"):
            shared(X)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiling_afterwards_is_right_and_scripting_fails_loudly() -> None:
    model = net()
    for one in KINDS:
        one.build(model, X)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="eager")
    for seed in range(2):
        torch.manual_seed(seed)
        expected = model(X)
        torch.manual_seed(seed)
        assert torch.equal(compiled(X), expected)
    assert torch.equal(compiled.eval()(X), model.eval()(X))
    clean(twin)
    with pytest.raises(AttributeError, match="_Within"):
        torch.jit.script(Dropout(0.5).build(nn.Sequential(Calls()), X))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_is_refused_by_name() -> None:
    every = [*KINDS, gf.BatchNorm(), gf.DropPath(0.1), gf.InputDropout(0.1), gf.ChannelDropout(0.1)]
    for one in every:
        model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 1))
        with pytest.raises(GoodfitError, match=f"{type(one).__name__} edits plain layers, got the scripted '1'"):
            one.build(model.double(), X)


def test_batch_norms_fold_where_weights_and_functions_drop() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.n(self.a(x)), 0.1, self.training)

    model = nn.Sequential(Block(), nn.Linear(4, 1)).double()
    Dropout(0.5).build(model, X)
    DropConnect(0.5).build(model, X)
    model(X), model.eval()
    before = model(X)
    assert gf.fold_batchnorm(model, X).folded == (("0.n", "0.a"),)
    torch.testing.assert_close(model(X), before, rtol=1e-10, atol=1e-10)
    assert not torch.equal(model.train()(X), model(X))
