"""Attention dropout: modules and functions get the rate in training, and nothing drops in eval."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import goodfit as gf
from goodfit import AttentionDropout, Dropout, GoodfitError, GoodfitWarning, Run
from goodfit.layers.attention import AttentionRate
from goodfit.where import named

X = torch.randn(3, 5, 8, dtype=torch.float64)


class Attention(nn.Module):
    """Self-attention as people write it, with their own rate."""

    def __init__(self, how: str, p: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.how, self.p = nn.Linear(8, 24), how, p
        if how == "layer":
            self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.how == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.p)  # drops in eval
        if self.how == "positions":
            return F.scaled_dot_product_attention(q, k, v, None, self.p if self.training else 0.0)
        weights = torch.softmax((q @ k.mT).float() * 8**-0.5, -1).to(q.dtype)
        if self.how == "layer":
            weights = self.drop(weights)
        if self.how == "function":
            weights = F.dropout(weights, self.p, self.training)
        return weights @ v


def net(how: str = "sdpa", p: float = 0.0, count: int = 1) -> nn.Module:
    return nn.Sequential(*(Attention(how, p) for _ in range(count)), nn.Linear(8, 1)).double()


def rates(model: nn.Module) -> list[AttentionRate]:
    return [m for m in model.modules() if isinstance(m, AttentionRate)]


def masked(model: nn.Module, p: float) -> Tensor:
    """The slow reference: what one attention makes of X with torch's next mask."""
    q, k, v = model[0].qkv(X).chunk(3, -1)
    weights = torch.softmax(q @ k.mT * 8**-0.5, -1)
    return model[-1](F.dropout(weights, p) @ v)


@pytest.mark.parametrize("how", ["sdpa", "positions", "function", "layer"])
@pytest.mark.parametrize("own", [0.0, 0.3])
def test_probabilities_are_dropped_in_training_by_the_new_rate_and_never_in_eval(how: str, own: float) -> None:
    model = AttentionDropout(0.6).build(net(how, own), X)
    whole = net("plain")
    whole.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    dropped = model(X)
    torch.manual_seed(1)
    torch.testing.assert_close(dropped, masked(model, 0.6), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model.eval()(X), whole(X), rtol=1e-6, atol=1e-7)
    assert torch.equal(model(X), model(X))
    assert model.state_dict().keys() == net(how).state_dict().keys()


def test_attention_that_drops_in_eval_is_mended() -> None:
    plain = net("sdpa", 0.5).eval()
    assert not torch.equal(plain(X), plain(X))
    state = torch.get_rng_state()
    model = AttentionDropout(0.1).build(plain, X)
    assert torch.equal(model(X), model(X))
    assert torch.equal(torch.get_rng_state(), state)


def test_p_zero_is_the_identity() -> None:
    plain = net("sdpa")
    model = AttentionDropout(0.0).build(copy.deepcopy(plain), X)
    assert torch.equal(model(X), plain(X))


def test_its_rate_acts_when_it_is_in_training_alone() -> None:
    model = AttentionDropout(0.5).build(net("sdpa"), X).eval()
    kept = model(X)
    rates(model)[0].training = True  # as sampling does
    assert not torch.equal(model(X), kept)
    model.train()
    rates(model)[0].training = False
    assert torch.equal(model(X), kept)


def test_torchs_attention_gets_its_number() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = AttentionDropout(0.4).build(nn.Sequential(layer, nn.Linear(8, 1)).double(), X)
    assert layer.self_attn.dropout == 0.4
    assert rates(model) == []
    assert not torch.equal(model(X), model(X))
    assert torch.equal(model.eval()(X), model(X))


def test_where_picks_and_what_it_does_not_pick_keeps_its_rate() -> None:
    model = AttentionDropout(0.4, where=named("1")).build(net("positions", count=2), X)
    assert [m.name for m in rates(model)] == ["1.attention_dropout"]
    with pytest.raises(GoodfitError, match=r"matched no place \(where=named\('x'\)\); Sequential has: 0, 1\."):
        AttentionDropout(0.4, where=named("x")).build(model, X)


class Outer(nn.Module):
    """Attends itself, and runs another that does, and itself once more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.again = Attention("sdpa"), False

    def forward(self, x: Tensor, deeper: bool = True) -> Tensor:
        x = F.scaled_dot_product_attention(x, x, x)
        if deeper:
            x = self(x, deeper=False)
        return F.scaled_dot_product_attention(self.inner(x), x, x)


def test_nested_and_reentrant_hosts_each_have_their_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Outer()).double()
    AttentionDropout(0.3).build(model, X)
    rates(model)[0].p, rates(model)[1].p = 0.1, 0.2
    seen = []
    real = torch._C._nn.scaled_dot_product_attention
    model[0].inner.register_forward_hook(lambda m, args, out: seen.append("inner"))

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (real, F.scaled_dot_product_attention):
                seen.append((kwargs or {}).get("dropout_p", 0.0))
            return func(*args, **(kwargs or {}))

    with Watch():
        model(X)
    by_name = {m.name: m.p for m in rates(model)}
    outer, inner = by_name["0.attention_dropout"], by_name["0.inner.attention_dropout"]
    assert seen == [outer, outer, inner, "inner", outer, inner, "inner", outer]


def test_an_exception_leaves_no_mode_behind() -> None:
    class Fails(Attention):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("on purpose")

    model = nn.Sequential(Attention("sdpa"), Attention("sdpa"))
    AttentionDropout(0.5).build(model.double(), X)
    model[1].__class__ = Fails
    with pytest.raises(RuntimeError, match="on purpose"):
        model(X)
    assert torch.overrides._get_current_function_mode_stack() == []
    q = torch.randn(2, 3, 4)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q))


def test_a_failure_of_a_hook_before_ours_pops_nothing_of_others() -> None:
    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("on purpose")

    model = AttentionDropout(0.5).build(nn.Sequential(Outer()).double(), X)
    handle = model[0].inner.register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(X)
    assert torch.overrides._get_current_function_mode_stack() == []
    handle.remove()
    assert not torch.equal(model(X), model(X))


def test_models_without_attention_are_refused_and_attention_without_dropout_is_told() -> None:
    with pytest.raises(GoodfitError, match="found no attention in Sequential: use nn"):
        AttentionDropout(0.5).build(nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Dropout()).double()[:2], X)
    with pytest.raises(GoodfitError, match="'0' has a softmax without dropout on it"):
        AttentionDropout(0.5).build(net("plain"), X)
    mixed = nn.Sequential(Attention("plain"), Attention("layer")).double()
    with pytest.warns(GoodfitWarning, match="leaves out 0: the code has a softmax without dropout on it"):
        AttentionDropout(0.5).build(mixed, X)
    assert mixed[1].drop.p == 0.5

    class TalkingHeads(Attention):
        def forward(self, x: Tensor) -> Tensor:
            heads = torch.softmax(x[:, None] @ x[:, None].mT, -1).expand(-1, 2, -1, -1)
            return super().forward(F.dropout(heads.sin(), 0.1, self.training).sum(1) @ x)

    with pytest.warns(GoodfitWarning, match="leaves out 0: the code has a softmax"):
        AttentionDropout(0.5).build(nn.Sequential(TalkingHeads("sdpa")).double(), X)


def test_the_root_itself_may_attend() -> None:
    class Root(Attention):
        attention_dropout = 0.0  # the number of others

    model = AttentionDropout(0.5).build(Root("positions").double(), X)
    assert [m.name for m in rates(model)] == ["inserted_attention_dropout"]
    assert not torch.equal(model(X), model(X))


def test_a_schedule_moves_numbers_layers_and_functions() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.25, batch_first=True)
    model = nn.Sequential(layer, Attention("layer"), Attention("function"), Attention("sdpa"), nn.Linear(8, 1)).double()
    run = Run(AttentionDropout(gf.schedules.linear(0.0, 0.4, steps=2)), model, example=X, task="numbers")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(3):
        seen.append({layer.self_attn.dropout, model[1].drop.p, *(m.p for m in rates(model))})
        run.loss(X, torch.randn(3, 5)).backward()
        run.gradient(optimizer)
        optimizer.step()
        run.step(optimizer)
    assert seen == [{0.0}, {0.2}, {0.4}]
    assert layer.dropout1.p == 0.25


@pytest.mark.parametrize("first", [0, 1])
def test_beside_dropout_the_attention_has_its_own_rate(first: int) -> None:
    model = nn.Sequential(Attention("function", 0.2), nn.Dropout(0.2), nn.Linear(8, 1)).double()
    cocktail = (AttentionDropout(0.6), Dropout(0.1))
    for one in (cocktail[first], cocktail[1 - first]):
        one.build(model, X)
    assert model[1].p == 0.1
    model[1].eval()
    torch.manual_seed(1)
    dropped = model(X)
    torch.manual_seed(1)
    torch.testing.assert_close(dropped, masked(model, 0.6), rtol=1e-6, atol=1e-7)


def test_building_twice_hangs_one_rate() -> None:
    model = AttentionDropout(0.2).build(net("sdpa"), X)
    AttentionDropout(0.5).build(model, X)
    assert [m.p for m in rates(model)] == [0.5]
    assert len(model[0]._forward_pre_hooks) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_act_by_themselves(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = AttentionDropout(0.5).build(net("sdpa"), X)
    other = copied(model)
    AttentionDropout(0.0).tune(other)
    assert torch.equal(other(X), model.eval()(X))
    assert [m.p for m in rates(model)] == [0.5]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks_again(reentrant: bool) -> None:
    class Checked(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for one in self:
                x = checkpoint(one, x, use_reentrant=reentrant)
            return x

    gradients, plain, x = [], net("sdpa"), X.clone().requires_grad_()
    for kind in (nn.Sequential, Checked):
        model = AttentionDropout(0.5).build(kind(*copy.deepcopy(plain)), X)
        torch.manual_seed(4)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_a_part_of_a_module_is_refused(reentrant: bool) -> None:
    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(attend, x, use_reentrant=reentrant)

    model = AttentionDropout(0.5).build(nn.Sequential(Part()), X)
    with pytest.raises(GoodfitError, match="checkpoint the module as a whole"):
        model(X.clone().requires_grad_())
    assert torch.equal(model.eval()(X), attend(X))


TINY: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
WORDS = torch.tensor([[1, 2, 3, 4], [4, 5, 6, 1]])


def peer(kind: str, implementation: str) -> tuple[nn.Module, Any]:
    t: Any = transformers
    dry = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    made = {
        "bert": lambda: (t.BertModel(t.BertConfig(vocab_size=9, hidden_dropout_prob=0.0, **TINY)), WORDS),
        "gpt2": lambda: (t.GPT2Model(t.GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2, **dry)), WORDS),
        "llama": lambda: (t.LlamaModel(t.LlamaConfig(vocab_size=9, num_key_value_heads=2, **TINY)), WORDS),
    }  # fmt: skip
    model, example = made[kind]()
    model.set_attn_implementation(implementation)
    return model.double().train(), example


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_models_drop_attention_in_training_alone(kind: str, implementation: str) -> None:
    model, example = peer(kind, implementation)
    before = model.eval()(example).last_hidden_state
    AttentionDropout(0.5).build(model, example)
    assert len(rates(model)) == 2
    assert torch.equal(model(example).last_hidden_state, before)
    model.train()
    assert not torch.equal(model(example).last_hidden_state, model(example).last_hidden_state)
    AttentionDropout(0.0).tune(model)
    torch.testing.assert_close(model(example).last_hidden_state, before, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_wrapped_models_are_refused_and_compiling_afterwards_is_right() -> None:
    for wrapped in (nn.DataParallel(net()), torch.compile(net(), backend="eager")):
        with pytest.raises(GoodfitError, match="give the model first"):
            AttentionDropout(0.5).build(wrapped, X)
    model = AttentionDropout(0.5).build(net("sdpa", 0.3), X)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager")

    def same() -> bool:
        torch.manual_seed(2)
        expected = model(X)
        torch.manual_seed(2)
        return torch.equal(compiled(X), expected)

    assert same()
    for one in (model, twin):
        AttentionDropout(0.2).tune(one)
    assert same()
    model.eval(), compiled.eval()
    assert same()
    assert torch.equal(compiled(X), compiled(X))
