"""Fit: the weights, the history and the refusals of a whole training."""

from __future__ import annotations

import copy
import functools
import io
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import goodfit as gf
from goodfit import L1, L2, BatchNorm, Cocktail, Dropout, EarlyStopping, GoodfitError, Run, WeightDecay, fit
from goodfit.losses import loss_of
from goodfit.order import Order

X = torch.rand(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
NUMBERS = X.sum(1).sin() + 0.1
CLASSES = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()
TRAIN, VALID = (X[:30], NUMBERS[:30]), (X[30:], NUMBERS[30:])
TRAIN_CLASSES, VALID_CLASSES = (X[:30], CLASSES[:30]), (X[30:], CLASSES[30:])
SGD = functools.partial(torch.optim.SGD, lr=0.1)


def net(outputs: int = 1) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, outputs))


def short(model: nn.Module, train: Any = TRAIN, valid: Any = VALID, cocktail: Any = None, **how: Any) -> Any:
    return fit(model, train, valid, cocktail or Cocktail(), **{"epochs": 3, "batch_size": 8, **how})


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i], NUMBERS[i]


def test_it_trains_as_the_reference_loop_does() -> None:
    mix = Cocktail(L2(1e-3), L1(1e-3), WeightDecay(1e-2), BatchNorm(), Dropout(0.3), EarlyStopping(2))
    found = short(net(), cocktail=mix, optimizer=SGD, seed=4, epochs=5)
    model = net()
    run = Run(mix, model, example=X[:8], task="numbers", seed=4)
    optimizer, order = SGD(model.parameters()), Order(30, 8, shuffle=True, seed=4)
    for _ in range(5):
        for rows in order:
            optimizer.zero_grad()
            run.loss(X[rows], NUMBERS[rows]).backward()
            run.gradient(optimizer)
            optimizer.step()
            run.step(optimizer)
        with torch.no_grad():
            score = F.mse_loss(model.eval()(VALID[0])[:, 0], VALID[1])
        model.train()
        if not run.epoch(score):
            break
    assert same(found.model, run.finish())


@pytest.mark.parametrize(
    "train",
    [TRAIN, list(TRAIN), tuple(t.numpy() for t in TRAIN), TensorDataset(*TRAIN), Samples()],
    ids=["tensors", "list", "arrays", "TensorDataset", "Dataset"],
)
def test_the_same_rows_in_another_wrapping_give_the_same_weights(train: Any) -> None:
    assert same(short(net(), train, cocktail=Dropout(0.3)).model, short(net(), cocktail=Dropout(0.3)).model)


def test_a_loader_is_taken_as_it_comes() -> None:
    loader = DataLoader(TensorDataset(*TRAIN), batch_size=10)
    model = net()
    found = short(copy.deepcopy(model), loader, optimizer=SGD, epochs=1)
    optimizer = SGD(model.parameters())
    for x, y in loader:
        optimizer.zero_grad()
        F.mse_loss(model(x)[:, 0], y).backward()
        optimizer.step()
    assert same(found.model, model)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(5, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.b(torch.cat([torch.relu(self.a(left)), right], 1))


@pytest.mark.parametrize(
    "wrap", [lambda x: (x[:, :2], x[:, 2:]), lambda x: {"right": x[:, 2:], "left": x[:, :2]}], ids=["tuple", "dict"]
)
def test_several_inputs(wrap: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    found = short(TwoInputs(), (wrap(X[:30]), NUMBERS[:30]), (wrap(X[30:]), NUMBERS[30:]), Dropout(0.2), epochs=20)
    assert found.history[-1]["valid_loss"] < found.history[0]["valid_loss"]


def test_the_same_seed_gives_the_same_weights_and_history_and_leaves_torchs_generator() -> None:
    mix, models = Cocktail(Dropout(0.3), EarlyStopping(5)), [net() for _ in range(3)]
    one = short(models[0], cocktail=mix, seed=7)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    other, apart = short(models[1], cocktail=mix, seed=7), short(models[2], cocktail=mix, seed=8)
    assert torch.equal(before, torch.get_rng_state())
    assert same(one.model, other.model)
    assert untimed(one.history) == untimed(other.history)
    assert not same(one.model, apart.model)


def test_a_loader_that_shuffles_and_torchs_own_noise_follow_the_seed_too() -> None:
    def run(seed: int) -> nn.Module:
        model = nn.Sequential(net(8), nn.RReLU(), nn.Linear(8, 1)) if torch.manual_seed(3) else nn.Identity()
        loader = DataLoader(TensorDataset(*TRAIN), batch_size=8, shuffle=True)
        return short(model, loader, seed=seed).model

    assert same(run(1), run(1))
    assert not same(run(1), run(2))


@pytest.mark.parametrize(
    "mix", [Cocktail(), EarlyStopping(2), Cocktail(EarlyStopping(2, min_delta=1.0), BatchNorm())], ids=repr
)
def test_the_score_is_the_validation_loss_of_the_model_that_comes_back(mix: Any) -> None:
    found = short(net(), cocktail=mix, optimizer=lambda p: torch.optim.SGD(p, lr=0.7), epochs=12)
    with torch.no_grad():
        by_hand = F.mse_loss(found.model.eval()(VALID[0])[:, 0], VALID[1])
    assert found.score == pytest.approx(by_hand.item(), rel=1e-12)
    losses = [row["valid_loss"] for row in found.history]
    assert found.best_epoch == losses.index(min(losses)) + 1
    if mix:
        assert found.score == pytest.approx(min(losses), rel=1e-12)
        assert len(set(losses)) == len(losses)


def test_the_score_weighs_rows_and_not_batches() -> None:
    model = net()
    valid = DataLoader(TensorDataset(*VALID), batch_size=7)  # 7 rows and 3
    found = short(model, valid=valid, epochs=1)
    with torch.no_grad():
        whole = F.mse_loss(model(VALID[0])[:, 0], VALID[1])
    assert found.score == pytest.approx(whole.item(), rel=1e-12)


def test_the_history_has_a_row_per_epoch_that_adds_up() -> None:
    seen: list[float] = []

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        value = F.mse_loss(outputs[:, 0], y)
        seen.append(value.item() * len(y))
        return value

    found = short(net(), loss=loss, cocktail=Cocktail(L2(0.1), EarlyStopping(4)), epochs=2)
    assert [list(row) for row in found.history] == [
        ["epoch", "step", "train_loss", "valid_loss", "stderr", "penalty", "best", "lr", "patience_left", "seconds"]
    ] * 2
    first, second = found.history
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert first["train_loss"] == pytest.approx(sum(seen[:4]) / 30)  # 8 + 8 + 8 + 6 rows, then 8 + 2 to validate
    assert first["valid_loss"] == pytest.approx(sum(seen[4:6]) / 10)
    kernels = [found.model[0].weight, found.model[2].weight]
    assert second["penalty"] == pytest.approx(sum(0.05 * w.detach().square().sum().item() for w in kernels))
    assert second["best"] == min(first["valid_loss"], second["valid_loss"])
    assert second["patience_left"] == 4
    assert first["seconds"] > 0
    assert found.stopped == ""
    assert short(net(), epochs=1).history[0]["patience_left"] is None


def test_it_stops_and_says_why() -> None:
    found = short(net(), cocktail=EarlyStopping(2, min_delta=10.0), epochs=50)
    assert len(found.history) == 3
    assert " by more than 10 in 2 checks: best " in found.stopped
    assert [row["patience_left"] for row in found.history] == [2, 1, 0]


class Interrupting:
    """A loss function that stands for somebody at the keyboard."""

    def __init__(self, call: int) -> None:
        self.left = call

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return F.mse_loss(outputs[:, 0], y)


def test_an_interrupt_ends_it_with_the_best_so_far() -> None:
    found = short(net(), loss=Interrupting(15), cocktail=EarlyStopping(9), epochs=50)  # 6 calls an epoch
    assert found.stopped == "interrupted in epoch 3"
    assert len(found.history) == 2
    assert found.score == pytest.approx(min(row["valid_loss"] for row in found.history))
    with pytest.raises(KeyboardInterrupt):
        short(net(), loss=Interrupting(3), epochs=50)


def test_a_diverged_training_gives_the_best_back_or_an_error() -> None:
    def nan_from(call: int) -> Callable[[Tensor, Tensor], Tensor]:
        seen = iter(range(10**6))
        return lambda outputs, y: F.mse_loss(outputs[:, 0], y) * (math.nan if next(seen) == call else 1.0)

    found = short(net(), loss=nan_from(12), cocktail=EarlyStopping(9), epochs=50)
    told = "step 9 is not finite: the loss is nan, of outputs that are finite; the step was not taken"
    assert (found.stopped, found.reason) == (told, gf.stop.Reason.NONFINITE)
    assert len(found.history) == 2
    assert found.score == found.history[1]["best"]
    assert all(p.isfinite().all() for p in found.model.parameters())
    assert short(net(), loss=nan_from(12), epochs=50).stopped == told
    with pytest.raises(GoodfitError, match=told) as caught:
        short(net(), loss=nan_from(12), cocktail=EarlyStopping(9), epochs=50, nonfinite="raise")
    assert caught.value.result.kept["step"] == found.kept["step"]
    with pytest.raises(GoodfitError, match="step 1 is not finite: x has inf in 8 of its rows, the first of them row 0"):
        short(net(), train=(X[:30] * math.inf, NUMBERS[:30]))


@pytest.mark.parametrize("rows", [17, 25, 1 + 8])
@pytest.mark.parametrize("wrap", [lambda *d: d, lambda *d: TensorDataset(*d), lambda *d: _Listed(*d)])
def test_a_last_batch_of_one_row_is_no_problem_for_a_batch_norm(rows: int, wrap: Any) -> None:
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0]) if m.training else None)
    with pytest.warns(gf.GoodfitWarning, match=f"train has {rows} rows in batches of 8: the last row joins the batch before"):
        short(model, wrap(X[:rows], NUMBERS[:rows]), epochs=1)
    assert sorted(torch.cat(seen).tolist()) == sorted(X[:rows].tolist())


class _Listed(Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.rows = list(zip(x, y, strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


@pytest.mark.parametrize("root_in_training", [True, False])
def test_every_part_keeps_its_mode(root_in_training: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    model[1].eval()
    model[3].eval()
    if not root_in_training:
        model.eval()
    modes = [m.training for m in model.modules()]
    statistics = model[1].running_mean.clone()
    during: list[bool] = []
    model.register_forward_pre_hook(lambda m, args: during.append(m.training))
    short(model, cocktail=Dropout(0.2), epochs=1)
    assert [m.training for n, m in model.named_modules() if "dropout" not in n] == modes
    assert torch.equal(model[1].running_mean, statistics) == root_in_training  # frozen, unless all was in eval mode
    assert True in during


def test_frozen_parameters_stay() -> None:
    model = net()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    short(model, cocktail=Cocktail(L2(0.1), WeightDecay(0.1)))
    assert same(model[0], before[0])
    assert not same(model[2], before[2])


@pytest.mark.parametrize(
    "x", [X, X.numpy(), X.numpy()[:, ::-1], X.float().double()], ids=["tensor", "array", "strides", "cast"]
)
@pytest.mark.parametrize("y", [CLASSES, CLASSES.numpy(), CLASSES.to(torch.uint8), CLASSES[:, None], CLASSES.int()])
def test_whole_numbers_are_classes(x: Any, y: Any) -> None:
    found = short(net(3), (x[:30], y[:30]), (x[30:], y[30:]), epochs=1)
    with torch.no_grad():
        inputs = torch.as_tensor(np.ascontiguousarray(x[30:]) if isinstance(x, np.ndarray) else x[30:])
        assert found.score == pytest.approx(F.cross_entropy(found.model(inputs), CLASSES[30:]).item())


def test_booleans_are_two_classes() -> None:
    y = CLASSES.numpy() > 0
    found = short(net(2), (X[:30], y[:30]), (X[30:], y[30:]), epochs=1)
    with torch.no_grad():
        assert found.score == pytest.approx(F.cross_entropy(found.model(X[30:]), torch.as_tensor(y[30:]).long()).item())


def test_a_task_says_that_whole_numbers_are_numbers() -> None:
    found = short(net(), TRAIN_CLASSES, VALID_CLASSES, gf.InputNoise(0.1), task="numbers", epochs=1)
    with torch.no_grad():
        assert found.score == pytest.approx(F.mse_loss(found.model(X[30:])[:, 0], CLASSES[30:].double()).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_may_have_another_precision_than_the_model(dtype: torch.dtype) -> None:
    x = X.float()
    found = short(net().float(), (x[:30], NUMBERS[:30].to(dtype)), (x[30:], NUMBERS[30:].to(dtype)))
    assert math.isfinite(found.score)
    assert loss_of("numbers")(x[:, :1], NUMBERS.to(dtype)).dtype == torch.float32
    mixed = short(net(3).float(), (x[:30], CLASSES[:30]), (x[30:], CLASSES[30:]), gf.InputNoise(0.1))
    assert math.isfinite(mixed.score)


@pytest.mark.parametrize(
    ("outputs", "y", "task", "message"),
    [
        (2, NUMBERS, None, r"one number per target of shape \(8,\), got \(8, 2\)"),
        (1, torch.stack([NUMBERS, NUMBERS], 1), None, r"one number per target of shape \(8, 2\), got \(8, 1\)"),
        (1, CLASSES, None, r"one score per class, \(rows, classes\), got \(8, 1\)"),
        (
            3,
            NUMBERS,
            "classes",
            r"must be integers of shape \(8,\), or probabilities of shape \(8, 3\), got float64",
        ),
        (
            3,
            torch.stack([CLASSES, CLASSES], 1),
            None,
            r"must be integers of shape \(8,\), or .* got int64 of shape \(8, 2\)",
        ),
        (1, NUMBERS, "regression", "task must be 'classes' or 'numbers', got 'regression'"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(outputs: int, y: Tensor, task: Any, message: str) -> None:
    with pytest.raises(GoodfitError, match=message):
        short(net(outputs), (X[:32], y[:32]), (X[32:], y[32:]), task=task)


@pytest.mark.parametrize("shape", [(30,), (30, 1)])
@pytest.mark.parametrize("flat", [True, False])
def test_a_column_and_a_flat_vector_are_the_same_targets(shape: tuple[int, ...], flat: bool) -> None:
    model = nn.Sequential(*net(), nn.Flatten(0)) if flat else net()
    found = short(model, (X[:30], NUMBERS[:30].view(shape)), VALID, optimizer=SGD)
    assert same(found.model, short(net(), optimizer=SGD).model)


@pytest.mark.parametrize(
    "loss", [lambda o, y: F.mse_loss(o[:, 0], y, reduction="none"), lambda o, y: 3.0, lambda o, y: (o.mean(), y)]
)
def test_a_loss_is_one_number(loss: Any) -> None:
    with pytest.raises(
        GoodfitError, match=r"loss\(outputs, y\) must return a tensor of one number, the mean over the rows, got"
    ):
        short(net(), loss=loss)


def test_a_model_that_returns_a_dict_takes_a_loss_of_its_own() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.inner(x)}

    with pytest.raises(GoodfitError, match=r"must return one tensor, got a dict; give loss=f\(outputs, y\)"):
        short(Named())
    found = short(Named(), loss=lambda outputs, y: F.mse_loss(outputs["y"][:, 0], y))
    assert same(found.model, short(net()).model)


@pytest.mark.parametrize("y", [CLASSES, CLASSES.int(), CLASSES[:, None]])
def test_class_targets_become_probabilities_for_a_batch_regularizer(y: Tensor) -> None:
    seen: list[Tensor] = []

    def spy(outputs: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return loss_of("classes")(outputs, y)

    found = short(
        net(3), (X[:30], y[:30]), (X[30:], y[30:]), Cocktail(gf.LabelSmoothing(0.2), EarlyStopping(5)), loss=spy, epochs=1
    )
    assert [t.shape for t in seen[:4]] == [(8, 3), (8, 3), (8, 3), (6, 3)]
    assert torch.equal(torch.cat(seen[:4]).sum(1), torch.ones(30))
    assert torch.equal(torch.cat(seen[:4]).argmax(1).bincount(), CLASSES[:30].bincount())
    assert seen[4].dtype == y.dtype  # validation is on the targets as they are
    again = short(net(3), (X[:30], y[:30]), (X[30:], y[30:]), Cocktail(gf.LabelSmoothing(0.2), EarlyStopping(5)), epochs=1)
    assert same(found.model, again.model)


def test_without_a_batch_regularizer_class_targets_stay_whole() -> None:
    seen: list[torch.dtype] = []

    def spy(outputs: Tensor, y: Tensor) -> Tensor:
        seen.append(y.dtype)
        return F.cross_entropy(outputs, y)

    short(net(3), TRAIN_CLASSES, VALID_CLASSES, gf.InputNoise(0.0), loss=spy, epochs=1)
    assert set(seen) == {torch.int64}


@pytest.mark.parametrize("kind", ["instance", "class", "function"])
def test_an_optimizer_is_an_instance_or_a_function_of_the_parameters(kind: str) -> None:
    model, reference = net(), net()
    optimizer = {
        "instance": torch.optim.SGD(model.parameters(), lr=1e-3),
        "class": torch.optim.SGD,
        "function": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    }[kind]
    by_hand = short(reference, optimizer=functools.partial(torch.optim.SGD, lr=1e-3))
    assert same(short(model, optimizer=optimizer).model, by_hand.model)


def test_an_optimizer_of_ones_own_may_serve_a_second_fit() -> None:
    model, other = net(), net()
    optimizer = SGD(model.parameters())
    short(model, cocktail=L2(0.1), optimizer=optimizer, epochs=1)
    short(model, optimizer=optimizer, epochs=1)
    short(other, cocktail=L2(0.1), optimizer=SGD, epochs=1)
    short(other, optimizer=SGD, epochs=1)
    assert same(model, other)  # the L2 of the first fit is gone


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("adam", "optimizer must be one that steps without a closure, or a function from parameters to one, got 'adam'"),
        (lambda parameters: None, "got None"),
        (torch.optim.LBFGS, "steps without a closure.* got LBFGS"),
        (lambda parameters: torch.optim.SGD([torch.ones(1)]), r"lacks the trainable parameter 0\.weight; give fit a function"),
    ],
)
def test_what_is_no_optimizer_is_refused(optimizer: Any, message: str) -> None:
    with pytest.raises(GoodfitError, match=message):
        short(net(), optimizer=optimizer)


def test_an_optimizer_made_before_a_layer_was_inserted_is_refused() -> None:
    model = net()
    with pytest.raises(GoodfitError, match=r"lacks the trainable parameter 0\.batchnorm\.weight; give fit a function"):
        short(model, cocktail=BatchNorm(), optimizer=SGD(model.parameters()))


def test_a_schedule_in_epochs_counts_the_batches_of_an_epoch() -> None:
    rates: list[float] = []

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        if outputs.requires_grad:
            rates.append(model[1].dropout.p)
        return F.mse_loss(outputs[:, 0], y)

    model = net()
    short(model, cocktail=Dropout(gf.schedules.linear(0.0, 0.4, epochs=2)), loss=loss)
    assert rates == pytest.approx([0.05 * min(i, 8) for i in range(12)])  # 4 batches an epoch


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(X[i], NUMBERS[i]) for i in range(30)])


def test_a_stream_trains_but_has_no_epochs_to_count() -> None:
    assert len(short(net(), Stream()).history) == 3
    with pytest.raises(GoodfitError, match="the steps of an epoch are unknown here"):
        short(net(), Stream(), cocktail=Dropout(gf.schedules.linear(0.0, 0.4, epochs=2)))


class Nothing(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1, got epochs=0"),
        ({"epochs": 2.5}, "epochs must be an integer >= 1"),
        *(({"seed": seed}, "seed must be an integer >= 0 and below 2") for seed in ("a", None, -1, 1.0, True, 2**63)),
        ({"keep": "\0a"}, r"keep must be the path of a file, got '\\x00a' \(embedded null byte\)"),
        ({"keep": "x" * 300}, r"keep must be the path of a file, got 'x{79} \(File name too long\)"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"train": (X[:0], NUMBERS[:0])}, "train has no rows"),
        ({"valid": (X[:0], NUMBERS[:0])}, "valid has no rows"),
        ({"train": Nothing()}, "train has no rows"),
        ({"valid": Nothing()}, "valid has no rows"),
        ({"valid": (X, NUMBERS[:3])}, "valid must have as many rows in x as in y"),
        ({"valid": None}, "valid must be a DataLoader, a Dataset, a gf.Parquet or a pair"),
        ({"cocktail": EarlyStopping(5, mode="max")}, "lower is better, got EarlyStopping\\(5, mode='max'\\); leave mode out"),
        ({"model": nn.Sequential(nn.Flatten(), nn.ReLU())}, "Sequential has no trainable parameter; unfreeze some"),
        ({"train": DataLoader(list(zip(X, X, NUMBERS, strict=True)))}, r"A batch must be a pair \(x, y\), got a list of 3"),
    ],
)
def test_what_cannot_be_fitted_is_refused(changes: dict[str, Any], message: str) -> None:
    how = {"model": net(), **changes}
    with pytest.raises(GoodfitError, match=message):
        short(**how)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_quiet_off_a_terminal_and_readable_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    for terminal, progress, shown in ((True, None, True), (True, False, False), (False, None, False), (False, True, True)):
        said = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr(sys, "stderr", said)
        found = short(net(), cocktail=EarlyStopping(7), progress=progress)
        last = found.history[-1]
        text = f"epoch 3  train {last['train_loss']:.4g}  valid {last['valid_loss']:.4g}  best {last['best']:.4g}  patience 7"
        assert (text in said.getvalue()) == shown
        assert bool(said.getvalue()) == shown
