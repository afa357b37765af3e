"""A stack: member k is what its cocktail gives alone, whatever the others are and do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import goodfit as gf
from goodfit.errors import GoodfitError, GoodfitWarning


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X = draw(80, 6, seed=1)
Y = (X[:, 0] * X[:, 1] + X[:, 2] > 0).long() + (X[:, 3] > 1).long()
P = F.one_hot(Y, 3).double()
TRAIN, VALID = [(X[i : i + 16], P[i : i + 16]) for i in range(0, 64, 16)], [(X[64:], P[64:])]


def net(seed: int = 0, *widths: int) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = [6, *(widths or (12, 12))]
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 3)).double()


def adamw(parameters: Any, lr: Any, step: int = 0) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr.at(step) if isinstance(lr, gf.schedules.Schedule) else lr, weight_decay=0.0)


def go_on(run: gf.Run, optimizer: Any, epochs: range, lr: Any = None, data: Sequence[Any] = TRAIN, valid: Any = VALID) -> int:
    """The reference loop; how many checks there were."""
    model, step = run.model, len(data) * epochs.start
    for epoch in epochs:
        model.train()
        for x, y in data:
            if isinstance(lr, gf.schedules.Schedule):
                optimizer.param_groups[0]["lr"] = lr.at(step)
            x, y = run.batch(x, y)
            optimizer.zero_grad()
            run.loss(x, y).backward()
            run.gradient(optimizer)
            optimizer.step()
            run.step(optimizer)
            step += 1
        with run.view(data):
            model.eval()
            with torch.no_grad():
                score = float(run._loss(model(valid[0][0]), valid[0][1]))
            if not run.epoch(score):
                return epoch + 1
    return epochs.stop


def alone(
    cocktail: Any, model: nn.Module, *, lr: Any = 1e-2, seed: int = 0, epochs: int = 12, make: Any = None, **how: Any
) -> nn.Module:
    data = how.pop("data", TRAIN)
    run = gf.Run(cocktail, model, example=data[0][0], seed=seed, **({"task": "classes"} | how.pop("run", {})))
    optimizer = make(model.parameters()) if make else adamw(model.parameters(), lr)
    go_on(run, optimizer, range(epochs), lr, data, **how)
    return run.finish(data)


def trained(stack: gf.Stack, epochs: range, data: Sequence[Any] = TRAIN, valid: Any = VALID) -> gf.Stack:
    for _ in epochs:
        for x, y in data:
            stack.learn(x, y)
        with stack.view(data):
            going = stack.epoch(stack.score(valid))
        if not going:
            break
    return stack


def far(one: nn.Module, other: nn.Module) -> float:
    """The largest difference, NaN being equal to NaN."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().nan_to_num(0.0 if bool(a.isnan().equal(b.isnan())) else 9e9).max()) for a, b in pairs)


def compare(
    cocktails: Sequence[Any], models: Sequence[nn.Module], *, lr: Any = 1e-2, seeds: Any = 0, epochs: int = 12, **how: Any
) -> gf.Stack:
    """Train a stack, and each member alone; all must be the same."""
    count = len(models)
    lrs, each = (one if isinstance(one, list) else [one] * count for one in (lr, seeds))
    solo = [copy.deepcopy(model) for model in models]
    make, of_run = how.get("make"), how.get("run", {"task": "classes"})
    options = ({"optimizer": make} if make else {"lr": lr}) | {"together": how.pop("together", None)}
    data, valid = how.get("data", TRAIN), how.get("valid", VALID)
    stack = gf.Stack(cocktails, models, example=data[0][0], seeds=seeds, **options, **of_run)
    trained(stack, range(epochs), data, valid)
    found = stack.finish(data)
    for k, model in enumerate(solo):
        single = alone(cocktails[k], model, lr=lrs[k], seed=each[k], epochs=epochs, **how)
        assert far(found[k], single) < 1e-9, f"member {k}: {cocktails[k]}"
        assert found[k] is models[k]
    return stack


MIX = [
    "L2(1e-3), Dropout(0.2), BatchNorm(), EarlyStopping(2)",
    "L1(1e-3), Dropout(0.5), BatchNorm(), EarlyStopping(3)",
    "WeightDecay(0.1), Dropout(0.1), BatchNorm(), EMA(0.9), EarlyStopping(4)",
    "MixUp(0.4), Dropout(0.1), BatchNorm(), SAM(0.1), ClipNorm(0.5), EMA(0.8), EarlyStopping(2)",
    "MixUp(0.8), Dropout(0.4), BatchNorm(), SAM(0.05), GradientNoise(0.01), EarlyStopping(3)",
    "MixUp(0.8), LabelSmoothing(0.1), Lookahead(0.5), GradientNoise(0.01)",
    "FGSM(0.1), L2(1e-3), SWA(), Orthogonal(0.01)",
    "SAM(0.05), MaxNorm(1.0), Flooding(0.2), BatchNorm(), Dropout(linear(0, 0.5, steps=30))",
    "GroupLasso(1e-3), ElasticNet(1e-3), ConfidencePenalty(0.1), InputNoise(0.1), CutMix(0.5)",
]


@pytest.mark.parametrize("lr", [1e-2, [1e-2 * (1 + k / 5) for k in range(len(MIX))]], ids=["one lr", "many"])
def test_a_member_is_what_its_cocktail_gives_alone(lr: Any) -> None:
    compare(MIX, [net(k) for k in range(len(MIX))], lr=lr, seeds=list(range(len(MIX))), epochs=14)


NUMBERS = {
    "L2": (1e-4, 1e-1),
    "L1": (1e-5, 1e-2),
    "WeightDecay": (1e-3, 0.5),
    "MaxNorm": (0.5, 3.0),
    "ClipNorm": (0.01, 2.0),
    "ClipValue": (0.01, 0.5),
    "GradientNoise": (1e-4, 0.1),
    "EMA": (0.5, 0.99),
    "SWA": (1.0, 1.0),
    "Lookahead": (0.3, 0.9),
    "MixUp": (0.05, 2.0),
    "CutMix": (0.1, 1.0),
    "CutOut": (0.1, 1.0),
    "LabelSmoothing": (0.01, 0.3),
    "InputNoise": (0.01, 0.5),
    "Flooding": (0.01, 0.8),
    "ConfidencePenalty": (0.01, 1.0),
    "Orthogonal": (1e-4, 1e-2),
    "GroupLasso": (1e-4, 1e-2),
    "ElasticNet": (1e-4, 1e-2),
    "L2SP": (1e-3, 1.0),
}


@st.composite
def cocktails(make: Callable[..., Any]) -> list[str]:
    """Of a few members: so that some are of one kind, they are built alike, with other numbers."""
    built = make(st.sampled_from([[], ["BatchNorm()"], ["Dropout({})"], ["BatchNorm()", "Dropout({})"]]))
    first = make(st.sampled_from([[], [], ["SAM({})"], ["FGSM({})"]]))

    def member() -> str:
        kinds = make(st.lists(st.sampled_from(sorted(NUMBERS)), unique=True, max_size=5))
        last = make(st.sampled_from([[], ["EarlyStopping(1)"], ["EarlyStopping(3)"], ["EarlyStopping(Patience(2) | GL(20))"]]))
        text = [one.format(make(st.floats(0.01, 0.6))) for one in (*built, *first)]
        text += [
            f"{kind}({make(st.floats(*NUMBERS[kind]))!r})" for kind in sorted(kinds) if kind != "SWA" or "EMA" not in kinds
        ]
        return ", ".join([*text, *last]) or "L2(0.0)"

    return [member() for _ in range(make(st.integers(2, 5)))]


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(cocktails(), st.lists(st.integers(2, 9), min_size=1, max_size=3), st.data())
def test_random_cocktails_on_random_networks(mixes: list[str], widths: list[int], data: Any) -> None:
    count = len(mixes)
    lrs = data.draw(st.sampled_from([1e-2, [1e-2 * (1 + k) for k in range(count)]]))
    seeds = data.draw(st.sampled_from([0, list(range(count))]))
    compare(mixes, [net(k, *widths) for k in range(count)], lr=lrs, seeds=seeds, epochs=5)


def test_cocktails_of_the_paper_side_by_side() -> None:
    drawn = [str(gf.spaces.COCKTAIL.draw(seed)).replace("epochs=79", "steps=8") for seed in range(24)]
    mixes = [gf.parse(text) + gf.parse("EarlyStopping(4)") for text in drawn]
    compare(mixes, [net(k, *(8,) * 5) for k in range(24)], seeds=list(range(24)), epochs=6)


def test_what_stops_leaves_and_the_rest_is_computed_alone() -> None:
    stack = gf.Stack([f"EarlyStopping({p})" for p in (1, 2, 9, 9)], [net(k) for k in range(4)], task="classes", example=X[:8])
    seen = []
    for epoch in range(6):
        stack.epoch([0.5 + 0.1 * epoch] * len(stack.members))
        seen.append(list(stack.members))
        assert stack.score(VALID).shape == (len(stack.members),)
    assert seen == [[0, 1, 2, 3], [1, 2, 3], [2, 3], [2, 3], [2, 3], [2, 3]]
    assert stack.learn(*TRAIN[0]).shape == (2,)
    stack.stop([2])
    assert stack.members == [3]
    assert next(iter(stack._parts.all[0].work.members.weights.values())).shape[0] == 1


def test_a_member_that_diverges_touches_no_other() -> None:
    mix, lrs = "L2(1e-3), BatchNorm(), ClipNorm(1.0), EMA(0.9)", [1e-2, 1e300, 1e-2, 1e-3]
    stack = gf.Stack([mix] * 4, [net(k) for k in range(4)], task="classes", example=X[:8], lr=lrs)
    trained(stack, range(6))
    assert stack.members == [0, 2, 3]
    assert "recalibrate met NaN" in stack.stopped[1]
    with pytest.warns(GoodfitWarning, match="Members 1 stay as they are: recalibrate met NaN"):
        stack.finish(TRAIN)
    for k in (0, 2, 3):
        assert far(stack.models[k], alone(mix, net(k), lr=lrs[k], epochs=6)) < 1e-9


def test_a_member_whose_loss_is_nan_is_heard_by_its_patience() -> None:
    lrs = [1e-2, 1e200, 1e-2]
    stack = compare(["L2(1e-3), EarlyStopping(3)"] * 3, [net(k) for k in range(3)], lr=lrs)
    assert 1 in stack.stopped


def test_one_member_and_many() -> None:
    compare(["MixUp(0.2), BatchNorm(), Dropout(0.3), EMA(0.9), EarlyStopping(2)"], [net()])
    mixes = [f"L2({k / 1e5}), Dropout({k / 1000}), EarlyStopping({1 + k % 4})" for k in range(300)]
    stack = gf.Stack(mixes, [net(k, 3) for k in range(300)], task="classes", example=X[:8], seeds=list(range(300)))
    found = trained(stack, range(4)).finish(TRAIN)
    for k in (0, 7, 150, 299):
        assert far(found[k], alone(mixes[k], net(k, 3), lr=1e-3, seed=k, epochs=4)) < 1e-9


def test_members_of_other_shapes_and_orders_are_parts_of_one_stack() -> None:
    mixes = ["ClipNorm(0.5), GradientNoise(0.1)", "GradientNoise(0.1), ClipNorm(0.5)", "ClipNorm(0.2)", "L2(0.1)"]
    compare(mixes, [net(0), net(1), net(2, 5), net(3)])
    models = [net(0), net(1), net(2, 5), net(3)]
    stack = gf.Stack(mixes, models, task="classes", example=X[:8])
    assert [part.members for part in stack._parts.all] == [[0, 3], [1], [2]]
    outputs = stack.outputs(X[:5])
    for k, model in enumerate(models):
        torch.testing.assert_close(outputs[k], model.eval()(X[:5]))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


class Reads(nn.Module):
    """It looks at a number, which no vmap allows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (2.0 if float(x.detach().sum()) > 1e9 else 1.0) + float(self.body[0].bias.detach()[0]) * 0


@pytest.mark.parametrize("mix", ["BatchNorm(), CutMix(0.5), SAM(0.1)", "ChannelDropout(0.3), L2(1e-3), EMA(0.9)"])
def test_convolutions(mix: str) -> None:
    images = draw(48, 1, 8, 8, seed=3)
    data = [(images[i : i + 12], P[i : i + 12]) for i in (0, 12, 24)]
    models = []
    for k in range(3):
        torch.manual_seed(k)
        models.append(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        )
    models = [model.double() for model in models]
    compare([mix] * 3, models, seeds=[1, 2, 3], epochs=4, data=data, valid=[(images[36:], P[36:48])], together=True)


def test_what_cannot_be_computed_at_once_is_trained_one_after_the_other_and_told() -> None:
    with pytest.warns(GoodfitWarning, match="2 members are trained one after the other: vmap: It looks like you're"):
        stack = gf.Stack(
            ["L2(1e-3)", "EMA(0.9), EarlyStopping(2)", "L2(0.1)"], [Reads(), Reads(), net()], task="classes", example=X[:8]
        )
    found = trained(stack, range(5)).finish()
    for k, (mix, model) in enumerate((("L2(1e-3)", Reads()), ("EMA(0.9), EarlyStopping(2)", Reads()), ("L2(0.1)", net()))):
        assert far(found[k], alone(mix, model, lr=1e-3, epochs=5)) < 1e-9


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
    ids=["SGD", "Adam", "RMSprop", "Adagrad"],
)
def test_other_optimizers(make: Any) -> None:
    compare(
        ["L1(1e-3), Dropout(0.1)", "GroupLasso(1e-3), Dropout(0.3)", "ElasticNet(1e-2), WeightDecay(0.1)"],
        [net(k) for k in range(3)],
        make=make,
    )


def test_an_optimizer_whose_numbers_may_depend_on_each_other_is_used_alone() -> None:
    with pytest.warns(GoodfitWarning, match="2 members are trained one after the other: a number of Rprop may"):
        compare(["L2(1e-3)", "L2(1e-2)"], [net(0), net(1)], make=lambda p: torch.optim.Rprop(p, lr=0.01))


@pytest.mark.parametrize("many", [False, True])
def test_schedules_of_the_learning_rate(many: bool) -> None:
    lr: Any = gf.schedules.cosine(0.02, 0.0, steps=40)
    lr = [lr, gf.schedules.linear(0.01, 0.05, steps=9), 0.01] if many else lr
    compare(["L1(1e-3), Dropout(0.1)", "WeightDecay(0.3)", "L2(0.1)"], [net(k) for k in range(3)], lr=lr)


def test_several_batches_in_a_step_and_batches_of_their_own() -> None:
    mixes = ["MixUp(0.3), Dropout(0.3)", "Dropout(0.2), LabelSmoothing(0.1)"]
    models = [net(0), net(1)]
    solo = [copy.deepcopy(model) for model in models]
    stack = gf.Stack(mixes, models, task="classes", example=X[:8], seeds=[5, 6], lr=1e-2)
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    runs = [
        gf.Run(mix, model, task="classes", example=X[:8], seed=5 + k)
        for k, (mix, model) in enumerate(zip(mixes, solo, strict=True))
    ]
    optimizers = [adamw(model.parameters(), 1e-2) for model in solo]
    for i in range(0, 64, 16):
        stack.zero_grad()
        for j in (i, i + 8):
            rows = torch.stack([order[j : j + 8] for order in orders])
            stack.loss(*stack.batch(X[rows], P[rows], own=True)).sum().backward()
        stack.gradient()
        stack.move()
        stack.step()
        for run, optimizer, order in zip(runs, optimizers, orders, strict=True):
            optimizer.zero_grad()
            for j in (i, i + 8):
                run.loss(*run.batch(X[order[j : j + 8]], P[order[j : j + 8]])).backward()
            run.gradient(optimizer)
            optimizer.step()
            run.step(optimizer)
    for one, other in zip(stack.finish(), solo, strict=True):
        assert far(one, other) < 1e-12


@pytest.mark.parametrize("lr", [1e-2, [1e-2, 2e-2, 3e-2, 1e-2]], ids=["one lr", "many"])
def test_a_stack_is_saved_and_goes_on(lr: Any, tmp_path: Any) -> None:
    mixes = [*MIX[:3], "L1(1e-3), Lookahead(0.5), EarlyStopping(1, min_delta=0.05)"]

    def start() -> gf.Stack:
        return gf.Stack(mixes, [net(k) for k in range(4)], task="classes", example=X[:8], lr=lr, seeds=[1, 2, 3, 4])

    whole = trained(start(), range(14)).finish(TRAIN)
    first = trained(start(), range(9))
    assert first.members == [0, 1, 2]
    assert "no improvement" in first.stopped[3]
    gf.Checkpoints(tmp_path).watch(stack=first).save(9)
    again = start()
    assert gf.Checkpoints(tmp_path).watch(stack=again).restore() == 9
    assert again.members == first.members
    for one, other in zip(trained(again, range(9, 14)).finish(TRAIN), whole, strict=True):
        assert far(one, other) == 0.0


def test_a_member_goes_on_alone() -> None:
    for lr in (1e-2, [1e-2, 2e-2, 3e-2]):
        mixes = ["L2(1e-3), Dropout(0.3), EMA(0.9)", "L1(1e-3), Dropout(0.1)", "BatchNorm()"]
        stack = trained(
            gf.Stack(mixes, [net(k) for k in range(3)], task="classes", example=X[:8], lr=lr, seeds=[1, 2, 3]), range(4)
        )
        run, optimizer = stack.alone(1)
        assert stack.members == [0, 2]
        go_on(run, optimizer, range(4, 9))
        single = alone(mixes[1], net(1), lr=lr[1] if isinstance(lr, list) else lr, seed=2, epochs=9)
        assert far(run.finish(), single) < 1e-9
        trained(stack, range(4, 9))
        first = alone(mixes[0], net(0), lr=lr[0] if isinstance(lr, list) else lr, seed=1, epochs=9)
        assert far(stack.finish(TRAIN)[0], first) < 1e-9


def test_numbers_and_a_loss_of_ones_own() -> None:
    y = X[:, :1].sin()
    data = [(X[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]

    def models() -> list[nn.Module]:
        return [nn.Sequential(net(k), nn.Linear(3, 1)).double() for k in range(2)]

    def own(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).abs().pow(1.5).mean() + outputs.square().mean() * (0.1 if y.shape[0] > 1 else 0.0)

    def reads(outputs: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(outputs, y) * (2.0 if float(y.sum()) > -1e9 and float(outputs.detach().sum()) < 1e9 else 1.0)

    for run in ({"task": "numbers"}, {"loss": own}, {"loss": reads}):
        compare(["L2(1e-3), Dropout(0.2)", "SAM(0.1)"], models(), data=data, valid=[(X[64:], y[64:])], run=run, epochs=4)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: gf.Stack(["L2(0.1)"] * 2, [net()], task="classes", example=X),
            "as many models as cocktails, one or more, got 1 and 2",
        ),
        (lambda: gf.Stack([], [], task="classes", example=X), "got 0 and 0"),
        (lambda: gf.Stack(["L2(0.1)"] * 2, [net()] * 2, task="classes", example=X), "needs a model of its own, got one twice"),
        (lambda: gf.Stack(["L2(0.1)"], [net()], task="classes"), "Stack needs an example batch"),
        (lambda: gf.Stack(["L2(0.1)"], [net()], example=X), "task must be 'classes' or 'numbers'"),
        (
            lambda: gf.Stack(["L2(0.1)"], [net()], task="classes", example=X, lr=[1, 2]),
            "takes one of lr for each of the 1 members",
        ),
        (
            lambda: gf.Stack(["L2(0.1)"], [net()], task="classes", example=X, lr=1.0, optimizer=torch.optim.Adam),
            "leave one out",
        ),
        (
            lambda: gf.Stack(["MixUp(0.1)"], [net()], task="classes", example=X).batch(X, Y),
            "MixUp needs y as probabilities or reals",
        ),
        (
            lambda: gf.Stack(["L2(0.1)"], [net()], task="classes", example=X).epoch([1.0, 2.0]),
            "one score for each of the 1 members",
        ),
        (
            lambda: gf.Stack(["L2(0.1)"], [net()], task="classes", example=X).load_state_dict({}),
            "what a stack of 1 members gave",
        ),
        (lambda: gf.Stack(["L2(0.1)"], [net()], task="classes", example=X).alone(3), "Member 3 does not go on in this stack"),
    ],
)
def test_what_makes_no_stack_is_refused(make: Callable[[], Any], line: str) -> None:
    with pytest.raises(GoodfitError, match=line):
        make()


def test_members_that_do_not_fit_at_a_time_are_parts_of_their_own() -> None:
    def start(memory: float | None) -> gf.Stack:
        models = [net(k) for k in range(7)]
        return gf.Stack(["Dropout(0.2)"] * 7, models, task="classes", example=X[:64], seeds=list(range(7)), memory=memory)

    weights = 8 * sum(p.numel() for p in net().parameters())
    whole = start(None)
    assert repr(whole).startswith("Stack of 7 members, 7 going on: 7 at once, by hand (Linear, Activation, Linear")
    kept = 64 * 12 * 8 * 8
    few = start(7 * 5 * weights + 3 * kept)
    assert 2 <= len(few._parts.all) <= 4
    assert sorted(k for part in few._parts.all for k in part.members) == list(range(7))
    losses = [stack.learn(*TRAIN[0]) for stack in (whole, few)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    for one, other in zip(whole.finish(), few.finish(), strict=True):
        assert far(one, other) < 1e-12
    with pytest.raises(GoodfitError, match=r"7 members need .* GB for weights, gradients and moments, and 1e-06 GB are to be"):
        start(1e3)


def test_a_stack_tells_its_parts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="goodfit"):
        stack = gf.Stack(["L2(0.1)"] * 2, [net(0), net(1, 3)], task="classes", example=X[:8])
    assert caplog.messages == [repr(stack)] == ["Stack of 2 members, 2 going on: 1 one after the other; 1 one after the other"]
    stack.stop([0, 1])
    assert repr(stack) == "Stack of 2 members, 0 going on: all have left"
    assert gf.Stack(["L2(0.1)"] * 2, [net(0), net(1)], task="classes", example=X[:8], together=False)._parts.all[0].why == ""


class Private(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor, self.body = factor, net(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self._factor


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.runs, self.body = 0, net(1)
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.training:
            self.runs += 1
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y * (1 if self.runs < 5 else 3) - self.mean


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(10, 6, padding_idx=0), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.words(x).mean(1))


def scaled(factor: float) -> nn.Module:
    model = net(1)
    model[2].register_forward_hook(lambda module, args, output: output * factor)
    return model


def held(model: nn.Module) -> nn.Module:
    model[0].weight.register_hook(lambda g: g * 0)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: [Private(1.0), Private(3.0)],
        lambda: [scaled(1.0), scaled(3.0)],
        lambda: [Counts(), Counts()],
        lambda: [held(net(0)), net(0)],
        lambda: [nn.Sequential(net(k), nn.Dropout(0.0)) for k in (0, 1)],
    ],
    ids=["private field", "hook", "state", "gradient hook", "torch's dropout"],
)
@pytest.mark.filterwarnings("ignore:[12] members are trained")
def test_what_is_not_the_same_is_not_taken_for_it(make: Any) -> None:
    models, others = make(), make()
    stack = gf.Stack(["L2(1e-3)", "Dropout(linear(0, 0.5, steps=4))"], models, task="classes", example=X[:8], lr=1e-2)
    trained(stack, range(4))
    alone("L2(1e-3)", others[0], epochs=4)
    assert far(stack.finish()[0], others[0]) < 1e-9


@pytest.mark.filterwarnings("ignore:2 members are trained")
def test_padding_stays_padding() -> None:
    words, targets = torch.randint(0, 10, (2, 16, 5)), torch.randint(0, 3, (2, 16))
    models = [Words(), Words()]
    stack = gf.Stack(["L2(0.0)"] * 2, models, task="classes", example=words[0])
    stack.learn(words, targets, own=True)
    assert all(not model.words.weight[0].any() for model in models)


def test_torchs_dropout_follows_its_schedule() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 3)).double()

    models = [make(), make()]
    with pytest.warns(GoodfitWarning, match="moves numbers of layers that are torch's own"):
        stack = gf.Stack(["Dropout(linear(0, 0.9, steps=4))"] * 2, models, task="classes", example=X[:8])
    trained(stack, range(2))
    assert models[0][2].p == pytest.approx(0.9)


def test_losses_of_other_shapes_and_ignored_classes_stay_those_of_one_member() -> None:
    y = torch.stack([torch.zeros(16), torch.full((16,), 100.0)]).double()
    models = [nn.Sequential(net(k), nn.Linear(3, 1)).double() for k in (0, 1)]
    stack = gf.Stack(["L2(0.0)"] * 2, models, loss=F.mse_loss, example=X[:4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the shapes
        losses = stack.loss(*stack.batch(X[:32].view(2, 16, 6), y, own=True))
        each = [F.mse_loss(model(X[16 * k : 16 * k + 16]), y[k]) for k, model in enumerate(models)]
    torch.testing.assert_close(losses, torch.stack(each))
    ignoring = Y.clone()
    ignoring[::3] = -100
    for target in (ignoring, Y[:, None], Y.to(torch.int32)):
        models = [net(0), net(1)]
        stack = gf.Stack(["L2(0.0)"] * 2, models, task="classes", example=X[:8])
        run = gf.Run("L2(0.0)", copy.deepcopy(models[1]), task="classes")
        torch.testing.assert_close(stack.loss(X, target)[1], run.loss(X, target))


def test_scores_are_heard_as_precisely_as_they_are() -> None:
    stack = gf.Stack(["EarlyStopping(2)"] * 2, [net(0), net(1)], task="classes", example=X[:8])
    assert all(stack.epoch([0.5 - 1e-9 * check, 1e39]) for check in range(2))
    assert stack.epoch([0.5 - 3e-9, 1e39])
    assert stack.members == [0]


def made(stack: gf.Stack, call: str) -> None:
    if call == "loss":
        stack.loss(*TRAIN[0]).sum().backward()
    else:
        getattr(stack, call)()


def test_calls_come_in_their_order_and_none_is_forgotten() -> None:
    def start(mix: str = "L2(0.1), L1(0.1)") -> gf.Stack:
        return gf.Stack([mix] * 2, [net(0), net(1)], task="classes", example=X[:8])

    for calls, line in (
        (["move"], r"stack.move\(\) needs stack.gradient\(\) before it"),
        (["gradient"], r"stack.gradient\(\) needs stack.loss\(x, y\).sum\(\).backward\(\)"),
        (["loss", "gradient", "gradient"], "needs stack.loss"),
        (["loss", "gradient", "move", "loss"], r"call stack.step\(\)"),
        (["loss", "state_dict"], "stack.state_dict comes between two steps"),
        (["loss", "finish"], "stack.finish comes between two steps"),
    ):
        stack = start()
        for call in calls[:-1]:
            made(stack, call)
        with pytest.raises(GoodfitError, match=line):
            made(stack, calls[-1])
    stack = start()
    stack.loss(*TRAIN[0])
    stack.zero_grad()
    stack.learn(*TRAIN[0])
    with pytest.raises(GoodfitError, match=r"MixUp acts in stack.batch, which was not called"):
        start("MixUp(0.2)").loss(*TRAIN[0])
    batch = stack.batch(*TRAIN[0])
    stack.stop([0])
    with pytest.raises(GoodfitError, match="made for members of which some have left"):
        stack.loss(*batch)
    with pytest.raises(GoodfitError, match=r"stack\.stop got 0, which does not go on; those that do: 1"):
        stack.stop([0])
    assert stack.stopped == {0: "stopped by stack.stop"}
    with stack.view(), pytest.raises(GoodfitError, match=r"stack.alone comes behind `with stack.view"):
        stack.alone(1)
    stack.finish()
    for call in (lambda: stack.learn(*TRAIN[0]), lambda: stack.score(VALID), lambda: stack.outputs(X)):
        with pytest.raises(GoodfitError, match="No member of this stack goes on"):
            call()
    with pytest.raises(GoodfitError, match="A stack cannot be copied"):
        copy.deepcopy(stack)


def test_a_mistake_that_all_members_share_is_raised() -> None:
    stack = gf.Stack(["EMA(0.9), BatchNorm()"] * 2, [net(0), net(1)], task="classes", example=X[:8])
    stack.learn(*TRAIN[0])
    with pytest.raises(GoodfitError, match="averages weights, for which batch norms need other statistics"), stack.view():
        pass
    assert stack.members == [0, 1]
    stack = gf.Stack(["EarlyStopping(2)", "EarlyStopping(PQ(0.5, 3))"], [net(0), net(1)], task="classes", example=X[:8])
    with pytest.raises(GoodfitError, match="train_loss"):
        stack.epoch([1.0, 1.0])
    assert stack.epoch([1.0, 1.0], train_loss=[1.0, 1.0])
    assert stack.epoch([1.0, 1.0], train_loss=[1.0, 1.0])
    assert stack.members == [0, 1]


def test_a_state_is_a_copy_and_goes_into_a_stack_of_the_same_optimizer() -> None:
    def start(**how: Any) -> gf.Stack:
        return gf.Stack(["L2(0.1)"] * 2, [net(0), net(1)], task="classes", example=X[:8], **({"lr": 1e-2} | how))

    first = trained(start(), range(2))
    saved = first.state_dict()
    trained(first, range(2))
    again = start()
    again.load_state_dict(saved)
    assert all(far(a, b) == 0.0 for a, b in zip(trained(again, range(2)).finish(), first.finish(), strict=True))
    other = start(lr=1e-3, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    with pytest.raises(GoodfitError, match=r"saved with the optimizer AdamW.*goes on with the optimizer SGD"):
        other.load_state_dict(saved)
    with pytest.warns(GoodfitWarning, match=r"lr=\[0.01, 0.01\], and goes on with .* lr=\[0.5, 0.5\]"):
        start(lr=0.5).load_state_dict(saved)


def test_a_member_that_was_apart_goes_on_alone() -> None:
    stack = trained(
        gf.Stack(["Dropout(0.1), MixUp(0.2)"], [net(2)], task="classes", example=X[:8], lr=1e-2, seeds=[3]), range(3)
    )
    run, optimizer = stack.alone(0)
    go_on(run, optimizer, range(3, 6))
    assert far(run.finish(), alone("Dropout(0.1), MixUp(0.2)", net(2), seed=3, epochs=6)) < 1e-12


def test_an_optimizer_that_looks_at_shapes_is_used_alone() -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        given = list(parameters)
        matrices, others = ([p for p in given if (p.ndim > 1) == which] for which in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others}]
        return torch.optim.SGD(groups, lr=0.1)

    with pytest.warns(GoodfitWarning, match="their optimizer looks at the shape of the weights"):
        compare(["L1(1e-3)", "MaxNorm(1.0)"], [net(0), net(1)], make=make, epochs=4)


STRUCTURES = ["SkipConnections(), DropPath(0.2)", "SkipConnections(), ShakeShake()", "SpectralNorm()", "DropConnect(0.3)"]


@pytest.mark.parametrize("mix", STRUCTURES)
def test_structures_are_computed_at_once(mix: str) -> None:
    stack = compare([mix] * 3, [net(k, 8, 8, 8, 8) for k in range(3)], seeds=[1, 2, 3], epochs=3)
    assert stack.stopped == {}
    again = gf.Stack([mix] * 3, [net(k, 8, 8, 8, 8) for k in range(3)], task="classes", example=X[:8])
    assert len(again._parts.all) == 1


class Shared(nn.Module):
    """One buffer by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net(1)
        self.register_buffer("a", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("c", self.a)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.a.add_(0.1 * x.mean(0) + 0.1)
        return self.body(x + self.c)


class Tied(nn.Module):
    def __init__(self, other: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6).double() for _ in range(3))
        for layer in (self.a, self.b, self.c):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.c.bias = getattr(self, other).bias
        self.last = nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.c(self.b(self.a(x).relu())).tanh())


class Activated(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act, self.first, self.last = act, net(1, 8)[0], nn.Linear(8, 3).double()
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


@pytest.mark.parametrize("together", [None, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: [Shared(), Shared()],
        lambda: [Tied("a"), Tied("b")],
        lambda: [Activated(partial(F.leaky_relu, negative_slope=s)) for s in (0.01, 0.5)],
        lambda: [Activated({"f": f}.get("f")) for f in (torch.tanh, F.relu)],
    ],
    ids=["a buffer of two names", "tied otherwise", "partial", "functions"],
)
@pytest.mark.filterwarnings("ignore:[12] members are trained")
def test_what_only_training_would_show_is_seen(make: Any, together: Any) -> None:
    torch.manual_seed(0)
    models = make()
    solo = copy.deepcopy(models)
    stack = gf.Stack(["L2(1e-3)", "L2(1e-2)"], models, task="classes", example=X[:8], lr=1e-2, together=together)
    found = trained(stack, range(4)).finish()
    for k, mix in enumerate(("L2(1e-3)", "L2(1e-2)")):
        assert far(found[k], alone(mix, solo[k], epochs=4)) < 1e-9


def test_loops_that_are_right_are_not_refused() -> None:
    def start() -> gf.Stack:
        return gf.Stack(["SAM(0.1)", "SAM(0.2)"], [net(0), net(1)], task="classes", example=X[:8], lr=1e-2)

    stack, others = start(), [net(0), net(1)]
    for i, (x, y) in enumerate(TRAIN):
        loss = stack.loss(*stack.batch(x, y))
        stack.zero_grad()
        if i == 1:
            continue  # a step that is left out before its backward
        loss.sum().backward()
        if i == 2:
            stack.zero_grad()
            continue  # and behind it
        stack.gradient()
        stack.move()
        stack.step()
        with torch.no_grad():
            stack.loss(x, y)
        with stack.view():
            stack.epoch(stack.score(VALID))
    for k, model in enumerate(others):
        run = gf.Run(f"SAM({0.1 * (k + 1)})", model, task="classes", example=X[:8])
        go_on(run, adamw(model.parameters(), 1e-2), range(1), data=[TRAIN[0], TRAIN[3]])
        assert far(stack.models[k], model) < 1e-9


def test_autocast_is_refused_where_it_would_be_left_out() -> None:
    stack = gf.Stack(["L2(0.1)"] * 2, [net(0).float(), net(1).float()], task="classes", example=X[:8].float())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(GoodfitError, match="computes in the precision of its weights"):
        stack.loss(X.float(), Y)
