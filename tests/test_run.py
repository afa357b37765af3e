"""One run, three ways to call it, and everything that it refuses rather than drops."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import goodfit as gf
from goodfit.schedules import linear
from toys import Quartic

DRAW = torch.Generator().manual_seed(5)
X = torch.randn(24, 3, generator=DRAW, dtype=torch.float64)
Y = torch.randn(24, 1, generator=DRAW, dtype=torch.float64)
BATCHES = [(X[i : i + 6], Y[i : i + 6]) for i in range(0, 24, 6)]
FULL = (
    gf.L2(0.01),
    gf.L1(1e-3),
    gf.WeightDecay(0.05),
    gf.Dropout(0.3),
    gf.BatchNorm(),
    gf.EarlyStopping(2),
    gf.ClipNorm(0.5),
    gf.EMA(0.8, warmup=False),
)
OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: optim.Adam(p, lr=0.02),
    "AdamW": lambda p: optim.AdamW(p, lr=0.02, weight_decay=0.0),
}


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))


def line(*weights: float) -> nn.Module:
    """One linear unit without a bias, of known weights."""
    model = nn.Sequential(nn.Linear(len(weights), 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([weights]))
    return model


def start(*cocktail: Any, make: Callable = OPTIMIZERS["SGD"], **options: Any) -> tuple[gf.Run, optim.Optimizer]:
    run = gf.Run(gf.Cocktail(*cocktail), net(), **{"example": X[:6], "loss": F.mse_loss, "seed": 4, **options})
    return run, make(run.model.parameters())


def explicit(run: gf.Run, optimizer: optim.Optimizer, batches: list = BATCHES) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        x, y = run.batch(x, y)
        run.loss(x, y).backward()
        run.gradient(optimizer)
        optimizer.step()
        run.step(optimizer)


def hooked(run: gf.Run, optimizer: optim.Optimizer, batches: list = BATCHES) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        F.mse_loss(run.model(x), y).backward()
        optimizer.step()


def closed(run: gf.Run, optimizer: optim.Optimizer, batches: list = BATCHES) -> None:
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            x, y = run.batch(x, y)
            loss = run.loss(x, y)
            loss.backward()
            return loss

        optimizer.step(closure)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(s, t) for (a, s), (b, t) in pairs)


# One loop, three ways


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_eight_calls_the_hooks_and_a_closure_give_the_same_bits(make: Callable) -> None:
    made = []
    for way in (explicit, hooked, closed):
        run, optimizer = start(*FULL, make=make)
        if way is not explicit:
            run.attach(optimizer)
        slower = optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        went = []
        for score in (0.9, 0.5, 0.6, 0.7):
            way(run, optimizer)
            slower.step()
            with run.view(BATCHES):
                went.append(run.epoch(score))
        assert went == [True, True, True, False]
        assert "2 checks" in run.stopped
        made.append(run.finish(batches=BATCHES))
    assert same(made[0], made[1])
    assert same(made[0], made[2])
    assert not same(made[0], start(*FULL)[0].model)


def test_what_the_cocktail_says_happens_in_the_order_of_the_phases() -> None:
    """By hand: slope, clip to 1, decay, SGD with lr 0.1, shrink by 0.1 · 0.2."""
    model = line(1.0, -0.1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    gf.Run(gf.Cocktail(gf.L1(0.2), gf.ClipNorm(1.0), gf.WeightDecay(0.5), gf.L2(2.0)), model).attach(optimizer)
    model(torch.tensor([[1.0, 4.2]])).sum().backward()
    optimizer.step()
    w = torch.tensor([1.0, -0.1])
    g = torch.tensor([1.0, 4.2]) + 2 * w  # (3, 4), of length 5
    w = w * (1 - 0.1 * 0.5) - 0.1 * g / 5
    torch.testing.assert_close(model[0].weight.detach()[0], w - torch.tensor([0.02, -0.02]), rtol=1e-14, atol=0)


def test_an_empty_cocktail_changes_nothing() -> None:
    run, optimizer = start()
    hooked(run.attach(optimizer), optimizer)
    bare = net()
    optimizer = optim.SGD(bare.parameters(), lr=0.1, momentum=0.9)
    for x, y in BATCHES:
        optimizer.zero_grad()
        F.mse_loss(bare(x), y).backward()
        optimizer.step()
    assert same(run.model, bare)


def test_a_scheduler_and_param_groups_reach_the_steps() -> None:
    """Each group's own lr, as scheduled, multiplies the decay; `maximize` climbs against the penalty."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer in model:
        nn.init.ones_(layer.weight)
    optimizer = optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters(), "lr": 0.2, "maximize": True}]
    )
    gf.Run(gf.Cocktail(gf.L2(0.3), gf.WeightDecay(0.5)), model).attach(optimizer)
    halved = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    a = b = 1.0
    for step in range(3):
        optimizer.zero_grad()
        (0 * model(torch.ones(1, 1))).sum().backward()
        optimizer.step()
        halved.step()
        lr = 0.5**step
        a = a * (1 - 0.1 * lr * 0.5) - 0.1 * lr * 0.3 * a
        b = b * (1 - 0.2 * lr * 0.5) - 0.2 * lr * 0.3 * b
    assert model[0].weight.item() == pytest.approx(a, rel=1e-14)
    assert model[1].weight.item() == pytest.approx(b, rel=1e-14)


def test_several_optimizers_on_one_model_each_move_their_own() -> None:
    cocktail = (gf.L2(0.1), gf.L1(1e-3), gf.WeightDecay(0.1), gf.Dropout(0.3))
    run, whole = start(*cocktail)
    hooked(run.attach(whole), whole)
    split, _ = start(*cocktail)
    a, b = (optim.SGD(split.model[i:j].parameters(), lr=0.1, momentum=0.9) for i, j in ((0, 2), (2, 5)))
    split.attach(a, b)
    for x, y in BATCHES:
        split.model.zero_grad()
        F.mse_loss(split.model(x), y).backward()
        a.step()
        b.step()
    assert same(run.model, split.model)


def test_a_refused_optimizer_leaves_no_trace() -> None:
    run, good = start(gf.L2(linear(0.0, 1.0, steps=4)))
    expected, same_optimizer = start(gf.L2(linear(0.0, 1.0, steps=4)))
    with pytest.raises(gf.GoodfitError, match=r"lacks the trainable parameter 0\.weight.*attach\(a, b\)"):
        run.attach(optim.SGD(run.model[2:].parameters(), lr=0.1))
    hooked(run.attach(good), good)
    hooked(expected.attach(same_optimizer), same_optimizer)
    assert same(run.model, expected.model)
    with pytest.raises(gf.GoodfitError, match="This SGD is attached already"):
        run.attach(good)


# Which weights


def test_weights_without_a_gradient_and_frozen_ones_are_left_alone() -> None:
    model = nn.ModuleDict({"used": nn.Linear(1, 1), "unused": nn.Linear(1, 1), "frozen": nn.Linear(1, 1)})
    model["frozen"].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    gf.Run(gf.Cocktail(gf.L2(0.1), gf.L1(0.1), gf.WeightDecay(0.1)), model).attach(optimizer)
    model["frozen"](model["used"](torch.ones(2, 1))).sum().backward()
    optimizer.step()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"used.weight", "used.bias"}
    assert model["unused"].weight.grad is None


def test_a_tied_weight_is_penalised_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    run = gf.Run(gf.Cocktail(gf.L2(1.0)), model)
    assert run.penalty() == pytest.approx(float(before.square().sum()) / 2, rel=1e-14)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    (0 * model(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before * (1 - 0.1), rtol=1e-14, atol=0)


def test_a_sparse_gradient_is_refused_by_the_name_of_its_weight() -> None:
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    gf.Run(gf.L2(0.1, where=gf.where.everything), model).attach(optimizer)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(gf.GoodfitError, match=r"0\.weight has a sparse gradient"):
        optimizer.step()


def test_a_selector_that_matches_nothing_lists_what_there_is() -> None:
    with pytest.raises(
        gf.GoodfitError, match=r"L2 matched no weights \(where=named\('conv\*'\)\); the model has: 0.weight, 0.bias"
    ):
        gf.Run(gf.L2(0.1, where=gf.where.named("conv*")), net())


# The loss stays the data's loss


def test_the_penalty_is_told_apart_from_the_loss() -> None:
    model = line(1.0, 2.0)
    run = gf.Run(gf.Cocktail(gf.L2(0.1), Quartic(0.4), gf.L1(0.5)), model, loss=F.mse_loss)
    x, y = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0], [1.0]])
    assert run.loss(x, y).item() == (2.0**2 + 1.0**2) / 2
    assert run.penalty() == pytest.approx(0.1 / 2 * 5 + 0.4 / 4 * 17 + 0.5 * 3, rel=1e-14)


def test_loss_regularizers_act_on_the_loss_and_batch_regularizers_on_the_batch() -> None:
    run = gf.Run(gf.Cocktail(gf.Flooding(9.0), gf.InputNoise(0.5)), line(1.0), loss=F.mse_loss)
    x = torch.ones(2, 1)
    assert run.loss(x, torch.zeros(2, 1)).item() == 17.0  # |1 − 9| + 9
    blurred, y = run.batch(x, torch.zeros(2, 1))
    assert 0 < (blurred - x).abs().max() < 2.5
    assert torch.equal(y, torch.zeros(2, 1))


def test_run_loss_wants_a_loss_function() -> None:
    with pytest.raises(gf.GoodfitError, match=r"run\.loss needs a loss function: Run\(cocktail, model, loss=f\)"):
        gf.Run((), net()).loss(X, Y)


# Noise and time


def masks(run: gf.Run) -> list[Tensor]:
    """The first dropout's mask of every forward pass from now on."""
    seen: list[Tensor] = []
    layer = next(m for m in run.model.modules() if isinstance(m, nn.Dropout))
    layer.register_forward_hook(lambda module, args, output: seen.append(output == 0))
    return seen


def test_micro_batches_get_masks_of_their_own_and_the_same_ones_again() -> None:
    def accumulate() -> tuple[nn.Module, list[Tensor]]:
        run, optimizer = start(gf.Dropout(0.5))
        seen = masks(run)
        run.attach(optimizer)
        run.model[0].weight.data.zero_()  # every unit alive on every row
        run.model[0].bias.data.fill_(1.0)
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(3):
                (run.loss(X[:6], Y[:6]) / 3).backward()
            optimizer.step()
        return run.model, seen

    (one, seen), (other, again) = accumulate(), accumulate()
    assert same(one, other)
    assert all(torch.equal(a, b) for a, b in zip(seen, again, strict=True))
    assert all(not torch.equal(seen[i], seen[j]) for i in range(6) for j in range(i))


def test_batch_noise_differs_between_micro_batches_whoever_computes_the_loss() -> None:
    run, optimizer = start(gf.InputNoise(0.5))
    drawn = [run.batch(X[:6], Y[:6])[0] for _ in range(3)]
    assert not any(torch.equal(drawn[i], drawn[j]) for i in range(3) for j in range(i))
    fresh, _ = start(gf.InputNoise(0.5))
    assert torch.equal(fresh.batch(X[:6], Y[:6])[0], drawn[0])
    run.attach(optimizer)
    run.loss(drawn[0], Y[:6]).backward()
    optimizer.step()
    assert not torch.equal(run.batch(X[:6], Y[:6])[0], drawn[0])


def test_noise_neither_reads_nor_moves_torchs_generator() -> None:
    made = []
    for seed in (1, 2):
        run, optimizer = start(gf.Dropout(0.5), gf.InputNoise(0.3))
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        explicit(run, optimizer)
        assert torch.equal(torch.get_rng_state(), before)
        made.append(run.model)
    assert same(*made)
    other, optimizer = start(gf.Dropout(0.5), gf.InputNoise(0.3), seed=5)
    explicit(other, optimizer)
    assert not same(other.model, made[0])


def test_a_scheduled_penalty_equals_the_loop_by_hand() -> None:
    run, optimizer = start(gf.L2(linear(0.0, 0.1, steps=10)))
    hooked(run.attach(optimizer), optimizer, BATCHES * 4)
    model = net()
    by_hand = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step, (x, y) in enumerate(BATCHES * 4):
        by_hand.zero_grad()
        F.mse_loss(model(x), y).backward()
        for layer in (model[0], model[2], model[4]):
            layer.weight.grad += 0.1 * min(step, 10) / 10 * layer.weight.detach()
        by_hand.step()
    for one, other in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_scheduled_dropout_moves_the_layers_it_has_inserted() -> None:
    run, optimizer = start(gf.Dropout(linear(0.0, 0.4, steps=4)))
    layers = [m for m in run.model.modules() if isinstance(m, nn.Dropout)]
    assert len(layers) == 2
    rates = []
    for batch in BATCHES * 2:
        rates.append({layer.p for layer in layers})
        explicit(run, optimizer, [batch])
    assert rates == [{0.4 * min(t, 4) / 4} for t in range(8)]


def test_a_schedule_in_epochs_is_refused_where_their_steps_are_unknown() -> None:
    with pytest.raises(gf.GoodfitError, match=r"linear\(0.0, 0.1, epochs=3\) counts epochs"):
        gf.Run(gf.L2(linear(0.0, 0.1, epochs=3)), net())


# Going on after a kill


def test_a_resumed_run_draws_the_masks_of_the_whole_one() -> None:
    cocktail = (gf.Dropout(0.5), gf.L2(linear(0.0, 0.1, steps=6)), gf.InputNoise(0.1))
    whole, optimizer = start(*cocktail)
    explicit(whole, optimizer)
    saved = copy.deepcopy((whole.model.state_dict(), optimizer.state_dict(), whole.state_dict()))
    seen = masks(whole)
    explicit(whole, optimizer)
    again, second = start(*cocktail)
    again.model.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    resumed = masks(again)
    explicit(again, second)
    assert all(torch.equal(a, b) for a, b in zip(seen, resumed, strict=True))
    assert same(whole.model, again.model)


def test_a_state_goes_back_only_where_it_came_from() -> None:
    saved = start(gf.EarlyStopping(3), gf.L2(0.1))[0].state_dict()
    with pytest.raises(gf.GoodfitError, match=r"another cocktail or model: '0\.EarlyStopping\.best'"):
        start(gf.L2(0.1))[0].load_state_dict(saved)
    with pytest.raises(gf.GoodfitError, match="saved under another seed: make the run with seed=4"):
        start(gf.EarlyStopping(3), gf.L2(0.1), seed=5)[0].load_state_dict(saved)
    wider = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 1))
    with pytest.raises(gf.GoodfitError, match=r"0\.weight' must have shape \(9, 3\), got \(8, 3\)"):
        gf.Run(gf.Cocktail(gf.EarlyStopping(3), gf.L2(0.1)), wider, seed=4).load_state_dict(saved)


def test_a_run_that_was_killed_after_its_last_epoch_can_still_finish() -> None:
    whole, _ = start(gf.EarlyStopping(3))
    best = copy.deepcopy(whole.model)
    whole.epoch(0.5)
    again, _ = start(gf.EarlyStopping(3))
    again.load_state_dict(whole.state_dict())
    with torch.no_grad():
        again.model[0].weight.add_(1.0)
    assert same(again.finish(), best)


def test_what_was_not_called_is_refused_after_a_resume_too() -> None:
    whole, optimizer = start(gf.InputNoise(0.1))
    explicit(whole, optimizer)
    again, second = start(gf.InputNoise(0.1))
    again.load_state_dict(whole.state_dict())
    with pytest.raises(gf.GoodfitError, match=r"InputNoise acts in run\.batch"):
        hooked(again.attach(second), second)


# A second gradient


def uphill_by_hand(w: Tensor, x: Tensor, y: Tensor, rho: float) -> Tensor:
    """SAM on a linear model and squared error: the gradient at w + rho · g(w) / |g(w)|."""

    def slope(w: Tensor) -> Tensor:
        return 2 * (x.T @ (x @ w - y)) / len(x)

    return slope(w + rho * slope(w) / slope(w).norm())


@pytest.mark.parametrize("way", [explicit, closed])
def test_a_second_gradient_is_taken_uphill_on_the_same_batch(way: Callable) -> None:
    model = line(0.5, -1.0, 2.0)
    w = model[0].weight.detach().clone().T
    run = gf.Run(gf.SAM(0.1), model, loss=F.mse_loss)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    if way is closed:
        run.attach(optimizer)
    for x, y in BATCHES:
        way(run, optimizer, [(x, y)])
        w = w - 0.1 * uphill_by_hand(w, x, y, 0.1)
        torch.testing.assert_close(model[0].weight.detach().T, w, rtol=1e-12, atol=1e-12)


def test_a_second_pass_uses_the_same_noise_and_leaves_the_statistics_alone() -> None:
    seen: dict[str, list[Tensor]] = {}
    runs = {}
    for way in (explicit, closed):
        run, optimizer = start(gf.BatchNorm(), gf.Dropout(0.5), gf.InputNoise(0.4), gf.SAM(0.1))
        inputs = seen.setdefault(way.__name__, [])
        run.model[0].register_forward_pre_hook(lambda m, args, inputs=inputs: inputs.append(args[0]))
        dropped = masks(run)
        if way is closed:
            run.attach(optimizer)
        way(run, optimizer, BATCHES[:2])
        assert len(inputs) == len(dropped) == 4
        assert torch.equal(inputs[0], inputs[1])
        assert torch.equal(inputs[2], inputs[3])
        assert run.model[0].batchnorm.num_batches_tracked == 2
        runs[way] = run.model
    assert same(runs[explicit], runs[closed])
    once, optimizer = start(gf.BatchNorm(), gf.Dropout(0.5), gf.InputNoise(0.4))
    explicit(once, optimizer, BATCHES[:1])
    twice, optimizer = start(gf.BatchNorm(), gf.Dropout(0.5), gf.InputNoise(0.4), gf.SAM(0.1))
    explicit(twice, optimizer, BATCHES[:1])
    norms = [m[0].batchnorm for m in (once.model, twice.model)]
    assert torch.equal(norms[0].running_mean, norms[1].running_mean)
    assert torch.equal(norms[0].running_var, norms[1].running_var)
    assert not same(once.model, twice.model)


def test_with_the_same_masks_a_step_uphill_of_length_zero_changes_nothing() -> None:
    plain, optimizer = start(gf.Dropout(0.5), gf.BatchNorm())
    explicit(plain, optimizer)
    uphill, optimizer = start(gf.Dropout(0.5), gf.BatchNorm(), gf.SAM(linear(0.0, 0.1, steps=10**9)))
    explicit(uphill, optimizer, BATCHES[:1])
    first, optimizer = start(gf.Dropout(0.5), gf.BatchNorm())
    explicit(first, optimizer, BATCHES[:1])
    assert same(uphill.model, first.model)


def test_a_second_gradient_leaves_the_other_optimizers_gradients_alone() -> None:
    run = gf.Run(gf.SAM(0.1), net(), loss=F.mse_loss)
    first = optim.SGD(run.model[:2].parameters(), lr=0.1)
    run.loss(X, Y).backward()
    before = run.model[2].weight.grad.clone()
    run.gradient(first)
    assert torch.equal(run.model[2].weight.grad, before)


@pytest.mark.parametrize("losses", [0, 2])
def test_a_second_gradient_that_cannot_be_taken_is_refused(losses: int) -> None:
    run, optimizer = start(gf.SAM(0.1))
    run.attach(optimizer)
    for _ in range(losses):
        run.loss(X, Y).backward()
    if not losses:
        F.mse_loss(run.model(X), Y).backward()
    before = copy.deepcopy(run.model)
    with pytest.raises(gf.GoodfitError, match=rf"SAM needs a second gradient.*seen: {losses}.*optimizer\.step\(closure\)"):
        optimizer.step()
    assert same(run.model, before)


# Refusals


@pytest.mark.parametrize(("one", "call"), [(gf.InputNoise(0.1), "run.batch"), (gf.Flooding(0.1), "run.loss")], ids=str)
def test_what_hooks_cannot_serve_is_refused_at_the_first_step(one: Any, call: str) -> None:
    run, optimizer = start(gf.L2(0.1), one)
    run.attach(optimizer)
    before = copy.deepcopy(run.model)
    with pytest.raises(
        gf.GoodfitError, match=rf"{type(one).__name__} acts in {call}, which was not called; add: .* = {call}\(x, y\)"
    ):
        hooked(run, optimizer)
    assert same(run.model, before)
    bare = gf.Run(one, net(), loss=F.mse_loss)
    with pytest.raises(gf.GoodfitError, match=call):
        bare.gradient(optim.SGD(bare.model.parameters(), lr=0.1))


def test_an_optimizer_made_before_the_model_was_built_is_refused() -> None:
    model = net()
    early = optim.SGD(model.parameters(), lr=0.1)
    run = gf.Run(gf.BatchNorm(), model, example=X, loss=F.mse_loss)
    with pytest.raises(gf.GoodfitError, match=r"lacks the trainable parameter 0\.batchnorm\.weight: make it after the run"):
        run.attach(early)
    with pytest.raises(gf.GoodfitError, match=r"lacks the trainable parameter 0\.batchnorm\.weight"):
        explicit(run, early)


def test_without_an_example_the_first_forward_builds() -> None:
    run = gf.Run(gf.Dropout(0.5), net(), seed=4)
    optimizer = optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(
        gf.GoodfitError, match=r"Dropout\(0.5\) is not built: Sequential has not run yet, or was refused; give Run an example="
    ):
        run.gradient(optimizer)
    assert not any(isinstance(m, nn.Dropout) for m in run.model.modules())
    hooked(run.attach(optimizer), optimizer)
    built, second = start(gf.Dropout(0.5))
    hooked(built.attach(second), second)
    assert same(run.model, built.model)
    norm = gf.Run(gf.BatchNorm(), net())
    optimizer = optim.SGD(norm.model.parameters(), lr=0.1)
    norm.attach(optimizer)
    with pytest.raises(gf.GoodfitError, match=r"lacks the trainable parameter 0\.batchnorm\.weight"):
        hooked(norm, optimizer)


class Twice(nn.Module):
    """No residual addition, and dropout of its own by a layer, a function and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.rnn = nn.Linear(3, 4), nn.Dropout(0.1), nn.GRU(4, 4, 2, batch_first=True, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.drop(F.relu(self.a(x))), 0.1, self.training)
        return self.rnn(h[:, None])[0]


def held(model: nn.Module) -> list[Any]:
    """All that modules hold, and what their hooks do."""
    names = ("p", "dropout", "rate", "seed", "name", "training")
    return [
        (
            name,
            [list(d) for d in (m._modules, m._parameters, m._forward_hooks, m._forward_pre_hooks)],
            [str(vars(m).get(n, m._buffers.get(n))) for n in names],
            [str(vars(h)) for h in m._forward_pre_hooks.values() if hasattr(h, "__dict__")],
            copy.deepcopy(vars(m).get("goodfit_rates")),
            [p.requires_grad for p in m.parameters()],
        )
        for name, m in model.named_modules()
    ]


def said(model: nn.Module) -> Tensor:
    """What it makes of a batch in training, without that it has run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return copy.deepcopy(model)(X)


@pytest.mark.parametrize("built", ["", "Dropout(0.3)", "Dropout(0.3), InputDropout(0.2)"])
@pytest.mark.parametrize(("make", "more"), [(net, "InputDropout(0.6), BatchNorm(), "), (lambda: Twice().double(), "")])
def test_a_refused_cocktail_leaves_no_part_of_it_in_the_model(make: Callable, more: str, built: str) -> None:
    model = make()
    if built:
        gf.Run(built, model, example=X, seed=3)
    before, output, state = held(model), said(model), torch.get_rng_state()
    for wrong in ("DropPath(0.2)", "L2(0.1, where=named('nothing'))"):
        with pytest.raises(gf.GoodfitError, match=r"found no residual addition|matched no weights"):
            gf.Run(f"Dropout(0.7), {more}{wrong}", model, example=X)
        assert held(model) == before
        assert torch.equal(said(model), output)
    assert torch.equal(torch.get_rng_state(), state)
    gf.Run("Dropout(0.7)", model, example=X)
    assert not torch.equal(said(model), output)
    assert 0.7 in [getattr(m, "p", 0.0) for m in model.modules()]


def test_a_cocktail_refused_at_the_first_batch_is_refused_until_it_is_built() -> None:
    model = net()
    run = gf.Run("Dropout(0.5), DropPath(0.2)", model)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    for _ in range(2):
        with pytest.raises(gf.GoodfitError, match="DropPath found no residual addition"):
            model(X)
        assert not any(isinstance(m, nn.Dropout) for m in model.modules())
        with pytest.raises(gf.GoodfitError, match=r"Dropout\(0\.5\) is not built: Sequential has not run yet, or was refused"):
            optimizer.step()
    fitting = gf.Run(gf.Dropout(0.5), net())
    with pytest.raises(gf.GoodfitError, match="must run on the example"):
        fitting.model(X[:, :2])
    fitting.model(X)
    assert [type(m).__name__ for m in fitting.model[1].children()] == ["SeededDropout"]


def test_calls_by_hand_beside_the_hooks_are_refused() -> None:
    run, optimizer = start(gf.L2(0.1))
    run.attach(optimizer)
    for call in (run.gradient, run.step):
        with pytest.raises(gf.GoodfitError, match=rf"run\.{call.__name__} acts by itself since run\.attach"):
            call(optimizer)


def test_half_of_the_calls_by_hand_is_refused() -> None:
    run, optimizer = start(gf.L1(0.1))
    with pytest.raises(gf.GoodfitError, match=r"run\.step needs run\.gradient before it"):
        run.step(optimizer)
    run.loss(X, Y).backward()
    run.gradient(optimizer)
    optimizer.step()
    with pytest.raises(gf.GoodfitError, match=r"run\.step was not called in the step before"):
        run.gradient(optimizer)


@pytest.mark.parametrize("one", [gf.L1(0.1), gf.L2(0.1), gf.WeightDecay(0.1), gf.ClipNorm(1.0)], ids=str)
def test_lbfgs_is_refused(one: Any) -> None:
    with pytest.raises(gf.GoodfitError, match="LBFGS"):
        start(one)[0].attach(optim.LBFGS(net().parameters()))
    run, optimizer = start(gf.Dropout(0.1), make=optim.LBFGS)
    run.attach(optimizer)  # dropout has nothing beside the step


def test_a_closure_that_is_called_twice_is_refused() -> None:
    class Greedy(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    run, optimizer = start(gf.L2(0.1), make=lambda p: Greedy(p, lr=0.1))
    with pytest.raises(gf.GoodfitError, match="Greedy calls its closure several times"):
        closed(run.attach(optimizer), optimizer)


def test_an_optimizer_that_unscales_inside_its_step_is_refused() -> None:
    run, optimizer = start(gf.L2(0.1), make=lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.0, fused=True))
    run.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(F.mse_loss(run.model(X), Y)).backward()
    before = copy.deepcopy(run.model)
    with pytest.raises(gf.GoodfitError, match="A fused AdamW unscales fp16 gradients inside its step"):
        scaler.step(optimizer)
    assert same(run.model, before)


def test_a_scaler_that_unscales_before_the_step_is_served() -> None:
    made = []
    for scaled in (False, True):
        run, optimizer = start(gf.L2(0.1), gf.L1(1e-3), gf.ClipNorm(0.5))
        run.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
        for x, y in [*BATCHES, (X * torch.inf, Y)] if scaled else BATCHES:  # the scaler skips what is not finite
            optimizer.zero_grad()
            scaler.scale(F.mse_loss(run.model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        made.append(run.model)
        assert run.state_dict()["step"] == 4
    assert same(*made)


def test_decaying_twice_is_warned_of() -> None:
    run, optimizer = start(gf.WeightDecay(0.1), make=optim.AdamW)
    with pytest.warns(gf.GoodfitWarning, match="Weights decay twice"):
        run.attach(optimizer)
    run, optimizer = start(gf.L2(0.1), make=optim.AdamW)
    with pytest.warns(gf.GoodfitWarning, match=r"by L2\(0.1\) of the cocktail and by the weight_decay of AdamW"):
        run.attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run, optimizer = start(gf.L1(0.1), make=optim.AdamW)
        run.attach(optimizer)


def test_integer_targets_are_refused_where_a_batch_regularizer_would_mix_them() -> None:
    run, _ = start(gf.MixUp(0.1))
    with pytest.raises(
        gf.GoodfitError, match=r"MixUp needs y as probabilities or reals, got torch.int64 of shape \(3,\).*one_hot"
    ):
        run.batch(X[:3], torch.tensor([0, 1, 2]))
    for one in (gf.L2(0.1), gf.InputNoise(0.1), gf.CutOut(1.0)):
        run, _ = start(one)
        assert run.batch(X[:3], torch.tensor([0, 1, 2]))[1].tolist() == [0, 1, 2]


def test_finishing_without_a_score_is_refused() -> None:
    run, _ = start(gf.EarlyStopping(3))
    with pytest.raises(gf.GoodfitError, match=r"EarlyStopping has heard no score; call run\.epoch\(score\)"):
        run.finish()
    run, _ = start(gf.Dropout(0.1))
    assert run.finish() is run.model


def test_a_run_that_no_optimizer_step_has_reached_is_refused_at_its_end() -> None:
    run, optimizer = start(gf.L2(0.1), gf.EarlyStopping(3))
    run.attach(optimizer)
    assert run.epoch(1.0)
    with pytest.raises(gf.GoodfitError, match=r"L2\(0.1\) has not acted: no optimizer step has reached this run"):
        run.epoch(0.9)
    with pytest.raises(gf.GoodfitError, match="no optimizer step has reached this run"):
        run.finish()


def test_attach_takes_the_optimizer_out_of_a_hosts_wrapper_and_refuses_what_is_none() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    run, optimizer = start(gf.L2(0.1))
    run.attach(Wrapper(optimizer))
    run, optimizer = start(gf.L2(0.1))
    for wrong in ([optimizer], run.model, None):
        with pytest.raises(gf.GoodfitError, match=r"run\.attach takes torch optimizers"):
            run.attach(wrong)


@pytest.mark.parametrize("score", ["a", None, torch.ones(3)])
def test_a_score_is_one_number(score: Any) -> None:
    run, _ = start(gf.EarlyStopping(3))
    with pytest.raises(gf.GoodfitError, match="A score must be one number"):
        run.epoch(score)


def test_what_is_no_cocktail_or_no_model_is_refused_and_a_text_is_read() -> None:
    model = nn.Linear(2, 1)
    assert gf.Run("L2(0.1)", model).cocktail == gf.Cocktail(gf.L2(0.1))
    for wrong in (None, gf.L2, 3):
        with pytest.raises(gf.GoodfitError, match="A cocktail is written"):
            gf.Run(wrong, model)
    with pytest.raises(gf.GoodfitError, match=r"a cocktail and a torch\.nn\.Module, in this order"):
        gf.Run(gf.L2(0.1), gf.L2(0.1))


# Inside other machinery


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.body, self.reentrant = body, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # reentrant checkpointing of an example
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_the_same_masks(reentrant: bool) -> None:
    found = []
    for mode in (None, reentrant):
        run = gf.Run(gf.Dropout(0.5), Checkpointed(net(), mode), example=X, seed=4)
        grads = []
        optimizer = optim.SGD(run.model.parameters(), lr=0.1)
        run.attach(optimizer)
        for x, y in BATCHES:
            optimizer.zero_grad()
            for half in (x[:3], x[3:]):
                F.mse_loss(run.model(half.clone().requires_grad_()), y[:3]).backward()
            grads.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
            optimizer.step()
        found.append(torch.stack(grads))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


class Nested(nn.Module):
    """Checkpointing within checkpointing."""

    def __init__(self, body: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.inner, self.reentrant = Checkpointed(body, reentrant), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("kind", [Checkpointed, Nested])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_gets_no_backward_does_not_disturb_checkpointing(kind: type[nn.Module], reentrant: bool) -> None:
    found = []
    for mode in (None, reentrant):
        run = gf.Run(gf.Dropout(0.5), kind(net(), mode), example=X, seed=4)
        grads = []
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                run.model(X)
            loss = F.mse_loss(run.model(X.clone().requires_grad_()), Y)
            with without():
                run.model(X)
            grads.append(backward(run.model, loss))
        found.append([torch.cat([g.flatten() for g in one]) for one in grads])
        assert not torch.allclose(*found[-1])
    for plain, checked in zip(*found, strict=True):
        torch.testing.assert_close(plain, checked, rtol=1e-12, atol=1e-12)


def backward(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_that_checkpointing_cannot_tell_apart_are_refused(reentrant: bool) -> None:
    model = gf.Run(gf.Dropout(0.5), Checkpointed(net(), reentrant), example=X).model
    one, two = (model(X.clone().requires_grad_()).sum() for _ in range(2))
    with pytest.raises(gf.GoodfitError, match=r"body\.1\.dropout ran 2 times since the last backward.*under torch\.no_grad"):
        (one + two).backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own look
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_and_draws_anew_at_each_step(backend: str) -> None:
    made = []
    for compiled in (False, True):
        torch._dynamo.reset()
        run, optimizer = start(gf.Dropout(0.5), gf.L2(0.1), gf.L1(1e-3))
        run.attach(optimizer)
        model = torch.compile(run.model, backend=backend) if compiled else run.model
        for x, y in BATCHES * 4:
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        made.append(run.model)
    for one, other in zip(made[0].parameters(), made[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_detached_run_rests_and_leaves_the_optimizer_to_the_next() -> None:
    model = line(1.0)
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    first = gf.Run("L2(0.5)", model).attach(optimizer)

    def decayed() -> float:
        model[0].weight.grad = torch.zeros(1, 1)
        optimizer.step()
        return model[0].weight.item()

    assert decayed() == 0.75
    first.detach()
    assert decayed() == 0.75
    gf.Run("L2(1.0)", model).attach(optimizer)
    assert decayed() == 0.375
    assert int(first.state_dict()["step"]) == 1
