"""The laws, over every regularizer of the class tree (and a penalty without a slope of its own)."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from goodfit.cocktail import Cocktail, parse
from goodfit.errors import GoodfitError
from goodfit.hyper import hypers, lifted
from goodfit.noise import Noise
from goodfit.phases import Batch, Build, Epoch, Finish, Gradient, Loss, Penalty, Regularizer, Report, Step, phases_of
from goodfit.regularizers import catalogue
from goodfit.regularizers.attention_dropout import AttentionDropout
from goodfit.regularizers.confidence_penalty import ConfidencePenalty
from goodfit.regularizers.drop_path import DropPath
from goodfit.regularizers.label_smoothing import LabelSmoothing
from goodfit.regularizers.shake_drop import ShakeDrop
from goodfit.regularizers.shake_shake import ShakeShake
from goodfit.regularizers.skip_connections import SkipConnections
from goodfit.run import Run
from toys import Quartic

ALL = {**catalogue(), "Quartic": Quartic}
every = pytest.mark.parametrize("kind", ALL.values(), ids=ALL)
SWITCHED = [kind for kind in ALL.values() if kind.switch()]
switched = pytest.mark.parametrize("kind", SWITCHED, ids=[k.__name__ for k in SWITCHED])

X, Y = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3), torch.tensor([0.2, -0.1, 0.5, 0.3], dtype=torch.float64)
P = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
W = {"a.weight": torch.tensor([[1.0, -0.4], [0.02, 0.3]], dtype=torch.float64), "b": torch.tensor([0.7], dtype=torch.float64)}
G = {"a.weight": torch.tensor([[0.3, 0.1], [-0.2, 0.9]], dtype=torch.float64), "b": torch.tensor([-0.5], dtype=torch.float64)}
B = {"mean": torch.tensor([0.1, 0.2], dtype=torch.float64)}
SCORES = (0.9, 0.8, 0.85, 0.7, 0.71, 0.72, 0.73)


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def net(kind: type[Regularizer] = Build) -> nn.Module:
    """A model with a place for a kind of regularizer."""
    torch.manual_seed(3)
    if kind in (SkipConnections, ShakeShake):
        plain = nn.Sequential(nn.Linear(3, 8), *(m() for _ in range(2) for m in (nn.Tanh, lambda: nn.Linear(8, 8))), nn.Tanh())
        plain.append(nn.Linear(8, 1)).double()
        return plain if kind is SkipConnections else SkipConnections().build(plain, X)
    if kind in (DropPath, ShakeDrop):
        return nn.Sequential(nn.Linear(3, 8), Residual(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 1)).double()
    if kind is AttentionDropout:
        return nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (4, 2)), Attention(), nn.Flatten(), nn.Linear(8, 1)).double()
    maps = (nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 2, 3, padding=1), nn.SELU(), nn.Conv1d(2, 1, 1), nn.Flatten())
    outputs = 2 if kind in (ConfidencePenalty, LabelSmoothing) else 1
    return nn.Sequential(nn.Linear(3, 8), nn.SELU(), *maps, nn.Linear(4, 4), nn.SELU(), nn.Linear(4, outputs)).double()


def targets(kind: type[Regularizer]) -> torch.Tensor:
    """What a kind of regularizer can be given as y: probabilities, or reals."""
    return P if kind in (ConfidencePenalty, LabelSmoothing) else Y


def results(one: Regularizer) -> dict[str, torch.Tensor]:
    """What a regularizer makes of a fixed little world, phase by phase (all but Build)."""
    out: dict[str, torch.Tensor] = {}
    state = one.init(W, B)
    if isinstance(one, Batch):
        out["x"], out["y"] = one.batch(X, targets(type(one)), Noise(5, "here"))
    if isinstance(one, Loss):
        out["loss"] = one.loss(torch.tensor(0.05, dtype=torch.float64), X, Y)
    if isinstance(one, Penalty):
        out["penalty"] = one.penalty(W, state)
        out |= {f"slope.{n}": s for n, s in one.slope(W, state).items()}
    if isinstance(one, Gradient):

        def again(weights: dict[str, torch.Tensor], epsilon: object = 0.0) -> dict[str, torch.Tensor]:
            return {n: G[n] + 2 * (w - W[n]) + epsilon for n, w in weights.items()}

        grads, state = one.gradient(G, W, state, again, Noise(5, "here"))
        out |= {f"gradient.{n}": g for n, g in grads.items()}
    if isinstance(one, Step):
        lr = {n: torch.tensor(0.1, dtype=torch.float64) for n in W}
        rate = {n: w.abs() * 0 + 0.3 for n, w in W.items()}
        for _ in range(3):
            moved, state = one.step(W, lr, rate, state)
        out |= {f"step.{n}": w for n, w in moved.items()}
    if isinstance(one, Epoch):
        for i, score in enumerate(SCORES):
            go, state = one.epoch(Report(torch.tensor(score, dtype=torch.float64)), {n: w + i for n, w in W.items()}, B, state)
            out[f"go.{i}"] = go
    if isinstance(one, Finish):
        weights, buffers = one.finish({n: w + 9 for n, w in W.items()}, B, state)
        out |= {f"finish.{n}": t for n, t in {**weights, **buffers}.items()}
    return out


@every
def test_1_it_is_a_frozen_value_with_a_parsable_text(kind: type[Regularizer]) -> None:
    one = kind()
    assert type(one).__dataclass_params__.frozen
    assert kind.__subclasses__() == []
    assert hash(one) == hash(kind())
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, dataclasses.fields(kind)[0].name, 0.5)
    if kind.__name__ in catalogue():
        assert parse(repr(one))[0] == parse(str(one))[0] == one


@given(st.data())
def test_1_any_cocktail_of_any_numbers_reads_back(data: st.DataObject) -> None:
    def draw(kind: type[Regularizer]) -> Regularizer:
        ranges = {n: st.integers(int(k.low), int(k.high)) if k.integer else st.floats(k.low, k.high) for n, k in hypers(kind)}
        numbers = {n: s.filter(dict(hypers(kind))[n].admits) for n, s in ranges.items()}
        return kind(**{name: data.draw(number) for name, number in numbers.items()})

    kinds = data.draw(st.lists(st.sampled_from(list(catalogue().values())), max_size=4))
    cocktail = Cocktail(*map(draw, kinds))
    assert parse(repr(cocktail)) == parse(", ".join(map(repr, cocktail))) == cocktail


@every
def test_1_numbers_of_other_libraries_become_pythons_own(kind: type[Regularizer]) -> None:
    for name, known in hypers(kind):
        for number in (np.float32(known.default), np.float64(known.default), torch.tensor(known.default)):
            one = kind(**{name: number})
            assert type(getattr(one, name)) in (int, float)
            assert kind.__name__ not in catalogue() or parse(repr(one))[0] == one


@switched
def test_2_off_is_the_identity(kind: type[Regularizer]) -> None:
    off = kind(**{kind.switch(): dict(hypers(kind))[kind.switch()].off})
    assert off.off
    assert not kind().off
    same = results(off)
    expected = {"x": X, "y": targets(kind), "loss": torch.tensor(0.05)} | {f"step.{n}": w for n, w in W.items()}
    expected |= {f"finish.{n}": w + 9 for n, w in W.items()} | {f"finish.{n}": b for n, b in B.items()}
    expected |= {f"gradient.{n}": g for n, g in G.items()}
    expected |= {"penalty": torch.tensor(0.0)} | {f"slope.{n}": w * 0 for n, w in W.items()}
    expected |= {f"go.{i}": torch.tensor(True) for i in range(len(SCORES))}
    for name, value in same.items():
        assert torch.equal(value, expected[name].to(value.dtype)), name
    if issubclass(kind, Build):
        model, plain = off.build(net(kind), X), net(kind)
        assert torch.equal(model(X), plain(X))
        assert model.state_dict().keys() == plain.state_dict().keys()


@switched
def test_3_lifted_over_numbers_equals_the_loop(kind: type[Regularizer]) -> None:
    known = dict(hypers(kind))[kind.switch()]
    if kind is AttentionDropout:
        pytest.skip("torch's attention draws from torch's generator, which vmap refuses")
    draws = torch.tensor([known.low, known.default, known.high, known.off], dtype=torch.float64)
    if issubclass(kind, Build):
        models = [kind(**{kind.switch(): float(v)}).build(net(kind), X).train() for v in draws]
        torch.testing.assert_close(stacked(models), torch.stack([m(X) for m in fresh(models)]), rtol=1e-12, atol=1e-12)
        return
    together = vmap(lambda v: results(lifted(kind(), **{kind.switch(): v})))(draws)
    for i, v in enumerate(draws):
        for name, value in results(kind(**{kind.switch(): number(v, known)})).items():
            torch.testing.assert_close(together[name][i], value, rtol=1e-12, atol=1e-12, msg=name)


def number(v: torch.Tensor, known: object) -> float:
    return float(v) if not known.integer or math.isinf(v) else int(v)


def fresh(models: list[nn.Module]) -> list[nn.Module]:
    """The same models at their first draw of noise again."""
    for model in models:
        for layer in model.modules():
            if hasattr(layer, "clock"):
                layer.clock.rewind()
    return models


def stacked(models: list[nn.Module]) -> torch.Tensor:
    state = stack_module_state(fresh(models))
    return vmap(lambda p, b: functional_call(models[0], (p, b), (X,)), randomness="error")(*state)


@every
def test_4_a_members_result_does_not_depend_on_its_stack_mates(kind: type[Regularizer]) -> None:
    if kind is AttentionDropout:
        pytest.skip("torch's attention draws from torch's generator, which vmap refuses")
    if issubclass(kind, Build):

        def built(seed: int) -> nn.Module:
            model = kind().build(net(kind), X).train()
            for layer in model.modules():
                if hasattr(layer, "seed"):
                    layer.seed.fill_(seed)
                    layer.p = 0.5  # at a small rate two small masks may be the same by chance
            return model

        a, b, c = built(1), built(2), built(3)
        assert torch.equal(stacked([a, b])[0], stacked([c, a, c])[1])
        if any(hasattr(layer, "seed") for layer in a.modules()):
            assert not torch.equal(stacked([a, b])[0], stacked([a, b])[1])
        return
    switch = kind.switch()
    if switch is None:
        return
    low, high = dict(hypers(kind))[switch].low, dict(hypers(kind))[switch].high
    both = vmap(lambda v: results(lifted(kind(), **{switch: v})))(torch.tensor([low, high, high]))
    other = vmap(lambda v: results(lifted(kind(), **{switch: v})))(torch.tensor([high, low]))
    for name in both:
        assert torch.equal(both[name][0], other[name][1]), name


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_5_shape_dtype_and_device_are_kept(kind: type[Regularizer], dtype: torch.dtype) -> None:
    one = kind()
    weights, grads = ({n: t.to(dtype) for n, t in d.items()} for d in (W, G))
    state = one.init(weights, B)
    if isinstance(one, Build):
        model = one.build(net(kind).to(dtype), X.to(dtype)).to(dtype)
        assert model(X.to(dtype)).dtype == dtype
    moved: dict[str, torch.Tensor] = {}
    if isinstance(one, Batch):
        weights = {"x": X.to(dtype), "y": targets(kind).to(dtype)}
        moved = dict(zip("xy", one.batch(weights["x"], weights["y"], Noise(1, "x")), strict=True))
    if isinstance(one, Penalty):
        moved = one.slope(weights, state)
    if isinstance(one, Gradient):
        moved, _ = one.gradient(grads, weights, state, lambda w, e=None: dict(w), Noise(5, "here"))
    if isinstance(one, Step):
        lr = {n: torch.tensor(0.1, dtype=torch.float64) for n in weights}
        moved, state = one.step(weights, lr, {n: torch.ones_like(w) for n, w in weights.items()}, state)
    if isinstance(one, Finish):
        moved, _ = one.finish(weights, B, state)
    for name, tensor in moved.items():
        assert (tensor.shape, tensor.dtype, tensor.device) == (weights[name].shape, dtype, weights[name].device)


@every
def test_6_a_run_that_is_saved_and_reloaded_goes_on_identically(kind: type[Regularizer]) -> None:
    def start() -> tuple[Run, torch.optim.Optimizer]:
        model = net(kind)
        task = "classes" if kind is LabelSmoothing else "numbers"
        run = Run(Cocktail(kind()), model, example=X, task=task, seed=11)
        return run, torch.optim.Adam(model.parameters(), lr=0.05)

    def train(run: Run, optimizer: torch.optim.Optimizer, scores: tuple[float, ...]) -> list[bool]:
        heard = []
        torch.manual_seed(len(scores))  # AttentionDropout draws from torch's generator
        for score in scores:
            for _ in range(3):
                x, y = run.batch(X, targets(kind))
                optimizer.zero_grad()
                run.loss(x, y).backward()
                run.gradient(optimizer)
                optimizer.step()
                run.step(optimizer)
            heard.append(run.epoch(score))
        return heard

    whole, optimizer = start()
    train(whole, optimizer, SCORES[:3])
    saved = copy.deepcopy((whole.state_dict(), whole.model.state_dict(), optimizer.state_dict()))
    again, second = start()
    again.model.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    again.load_state_dict(saved[0])
    assert train(whole, optimizer, SCORES[3:]) == train(again, second, SCORES[3:])
    for one, other in zip(whole.finish().state_dict().values(), again.finish().state_dict().values(), strict=True):
        assert torch.equal(one, other)


@every
def test_7_the_docstring_has_its_parts_and_its_example_runs(kind: type[Regularizer]) -> None:
    text = kind.__doc__
    parts = ("Formula:", "Phase:", "Numbers:", "Errors:", "Source:", ">>> ")
    places = [text.find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)
    assert "off at" in text or kind.switch() is None
    for phase in phases_of(kind):
        assert phase in text
    torch.set_default_dtype(torch.float32)
    module = importlib.import_module(kind.__module__)
    example = doctest.DocTestFinder().find(kind, globs={"torch": torch, "nn": nn, **vars(module)})[0]
    outcome = doctest.DocTestRunner(verbose=False).run(example)
    assert outcome.attempted >= 1
    assert outcome.failed == 0


@pytest.mark.parametrize("kind", [k for k in ALL.values() if issubclass(k, Penalty)], ids=lambda k: k.__name__)
def test_8_the_slope_is_the_gradient_of_the_penalty(kind: type[Penalty]) -> None:
    state = kind().init({n: w / 2 for n, w in W.items()}, B)
    by_autograd = torch.func.grad(kind().penalty)(W, state)
    for name, slope in kind().slope(W, state).items():
        torch.testing.assert_close(slope, by_autograd[name], rtol=1e-14, atol=1e-14)


@every
def test_numbers_outside_their_range_are_refused_by_name(kind: type[Regularizer]) -> None:
    for name, known in hypers(kind):
        lower = float(known.valid[1:].split(",")[0])
        for wrong in (lower - 0.5, math.nan, "0.1", None, True):
            with pytest.raises(GoodfitError, match=rf"{kind.__name__}.{name} must be .*, got {name}="):
                kind(**{name: wrong})


@every
def test_the_default_lies_in_its_ranges(kind: type[Regularizer]) -> None:
    assert len([k for _, k in hypers(kind) if k.off is not None]) <= 1
    for _, known in hypers(kind):
        assert known.admits(known.default)
        assert known.admits(known.low)
        assert known.admits(known.high)
        assert known.low <= known.default <= known.high
