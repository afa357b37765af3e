"""What was scored is what is kept: whatever ends a fit, with averages, by steps, and trained anew on all rows."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, SubsetRandomSampler, TensorDataset

import goodfit as gf
from goodfit import BatchNorm, Cocktail, Dropout, EarlyStopping, GoodfitError, GoodfitWarning, Run, fit
from goodfit.fitting.data import batches_of, uncounted
from goodfit.fitting.loop import evaluate, mean_and_stderr
from goodfit.losses import loss_of, rowwise
from goodfit.order import Order
from goodfit.stop import Budget, Divergence, Evidence, Patience, Reason

X = torch.rand(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
Y = X.sum(1).sin() + 0.1
TRAIN, VALID, BOTH = (X[:30], Y[:30]), (X[30:], Y[30:]), (X, Y)
SGD = partial(torch.optim.SGD, lr=0.7)  # of ups and downs: no two checks are alike


def net(norm: bool = False) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Linear(8, 1))


def short(model: nn.Module, train: Any = TRAIN, valid: Any = VALID, cocktail: Any = None, **how: Any) -> Any:
    return fit(model, train, valid, cocktail or Cocktail(), **{"epochs": 6, "batch_size": 8, "optimizer": SGD, **how})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


def scored(model: nn.Module) -> float:
    with torch.no_grad():
        return float(F.mse_loss(model.eval()(VALID[0])[:, 0], VALID[1]))


class Watching:
    """The rows of a validation in one batch, which remembers the model at each pass; `act` happens at one of them."""

    def __init__(self, model: nn.Module, act: Callable[[], None] | None = None, at: int = 0) -> None:
        self.model, self.act, self.at = model, act, at
        self.seen: list[dict[str, Tensor]] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.seen.append(copy.deepcopy(self.model.state_dict()))
        if self.act is not None and len(self.seen) == self.at:
            self.act()
        yield VALID


class Stream(IterableDataset[Any]):
    """A user's loader: it makes batches, and `act` happens before one of them, counted over all passes."""

    def __init__(self, batches: Any, act: Callable[[], None] | None = None, at: int = 0) -> None:
        self.batches, self.act, self.at, self.count = batches, act, at, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.count += 1
            if self.count == self.at and self.act is not None:
                self.act()
            yield batch


def stream(batches: Any, act: Callable[[], None] | None = None, at: int = 0) -> DataLoader[Any]:
    return DataLoader(Stream(batches, act, at), batch_size=None)


class Pairs(Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.rows = list(zip(x, y, strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def broken() -> None:
    raise OSError("the disk is gone")


BATCHES = [(X[i : min(i + 8, 30)], Y[i : min(i + 8, 30)]) for i in range(0, 30, 8)]  # 4 in an epoch


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("how", "reason"),
    {
        "the last epoch": ({}, None),
        "a stop": ({"stopping": EarlyStopping(2), "epochs": 50}, Reason.PATIENCE),
        "a budget": ({"stopping": EarlyStopping(Patience(50) | Budget(1e-9))}, Reason.BUDGET),
        "a divergence": ({"stopping": EarlyStopping(Divergence(-9.0)), "epochs": 9}, Reason.DIVERGENCE),
        "Ctrl-C in a step": ({"act": ctrl_c, "at": 22, "check": False}, Reason.INTERRUPTED),
        "Ctrl-C in a validation": ({"act": ctrl_c, "at": 5, "check": True}, Reason.INTERRUPTED),
        "a loader": ({"act": broken, "at": 22, "check": False}, Reason.FAILED),
        "a validation": ({"act": broken, "at": 5, "check": True}, Reason.FAILED),
    }.values(),
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_whatever_ended_it_the_best_that_was_scored_comes_back(how: dict[str, Any], reason: Any, norm: bool) -> None:
    model = net(norm)
    act, at, check = how.get("act"), how.get("at", 0), how.get("check", False)
    valid = Watching(model, act if check else None, at)
    train = stream(BATCHES, None if check else act, at + 1)  # a look at the first batch goes before
    ask = partial(short, model, train, stream(valid), how.get("stopping", EarlyStopping(20)), epochs=how.get("epochs", 9))
    if reason is Reason.FAILED:
        with pytest.raises(OSError, match="the disk is gone") as caught:
            ask()
        found = caught.value.result
        assert "what there is of the training is in the `result`" in caught.value.__notes__[0]
    else:
        found = ask()
    assert found.reason is reason
    losses = [row["valid_loss"] for row in found.history]
    best = losses.index(min(losses))
    assert same(model.state_dict(), valid.seen[best])
    assert best == len(losses) - 1 or not same(valid.seen[best], valid.seen[len(losses) - 1])
    assert found.model is model
    assert found.kept is found.history[best]
    assert found.score == pytest.approx(scored(model), rel=1e-12) == pytest.approx(losses[best], rel=1e-12)


def test_ctrl_c_before_the_first_check_says_that_there_is_nothing() -> None:
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted before the first check$"):
        short(net(), stream(BATCHES, ctrl_c, 3), VALID, EarlyStopping(3))


def test_an_error_before_the_first_check_passes_as_it_is() -> None:
    with pytest.raises(OSError, match="gone") as caught:
        short(net(), stream(BATCHES, broken, 3), VALID, EarlyStopping(3))
    assert not hasattr(caught.value, "result")
    assert not hasattr(caught.value, "__notes__")


def test_an_error_in_the_model_leaves_the_best_in_it_also_where_validation_fails_for_good() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = net(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 12:  # 4 steps and a check in an epoch, after one look for the kind of targets
                broken()
            return self.inner(x)

    model = Failing()
    with pytest.raises(OSError, match="gone") as caught:
        short(model, cocktail=EarlyStopping(3))
    found = caught.value.result
    losses = [row["valid_loss"] for row in found.history]
    assert found.score == min(losses)
    assert scored(model.inner) == pytest.approx(min(losses), rel=1e-12)
    assert found.stopped == "ended by OSError in epoch 3"


def test_without_early_stopping_an_interrupted_model_has_its_own_score() -> None:
    model = net()
    found = short(model, stream(BATCHES, ctrl_c, 12))
    assert (found.kept, found.reason) == (None, Reason.INTERRUPTED)
    assert found.score == pytest.approx(scored(model), rel=1e-12)
    assert found.score != found.history[-1]["valid_loss"]


def test_a_step_that_was_interrupted_in_its_middle_is_of_no_check() -> None:
    class Late(torch.optim.SGD):
        count = 0

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.count += 1
            if self.count == 5:  # the first step of the second epoch: the weights have moved, and it was not told
                ctrl_c()

    found = short(net(), optimizer=lambda p: Late(p, lr=0.7))
    assert (found.kept, len(found.history)) == (None, 1)
    assert found.score == pytest.approx(scored(found.model), rel=1e-12)
    assert found.score != found.history[0]["valid_loss"]


def test_a_validation_that_is_not_the_same_twice_is_told() -> None:
    class Noisy(Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            return X[30 + i] + 0.1 * torch.rand(3), Y[30 + i]

    with pytest.warns(GoodfitWarning, match=r"scores .*, and its check in epoch \d said .*: validation is not the same twice"):
        found = short(net(), valid=Noisy(), cocktail=EarlyStopping(9))
    assert found.score != found.kept["valid_loss"]


class Counting(nn.Module):
    """A model whose buffer moves in training; persistent or not."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.inner = net()
        self.register_buffer("shift", torch.zeros((), dtype=torch.float64), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.shift += 0.01
        return self.inner(x) + self.shift


def test_a_buffer_that_is_not_restored_is_named_where_the_score_is_another() -> None:
    short(Counting(True), cocktail=EarlyStopping(2), epochs=30)
    with pytest.warns(GoodfitWarning, match=r"F.dropout and .* drop in eval mode .*not restored, .*: buffer shift\)\.$"):
        short(Counting(False), cocktail=EarlyStopping(2), epochs=30)


@pytest.mark.parametrize(
    "mix",
    [
        (gf.EMA(0.8, warmup=False), EarlyStopping(2)),
        (EarlyStopping(2), gf.EMA(0.8, warmup=False)),
        (gf.EMA(0.8, warmup=False),),
    ],
    ids=repr,
)
@pytest.mark.parametrize("norm", [False, True])
def test_an_average_is_what_is_scored_and_what_is_kept(mix: Any, norm: bool) -> None:
    """Beside a loop by hand that holds the average, its batch norms recalibrated, and the best of those."""
    found = short(net(norm), cocktail=Cocktail(*mix), epochs=6, seed=5)
    model = net(norm)
    optimizer, order = SGD(model.parameters()), Order(30, 8, shuffle=True, seed=5)
    mean = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses, seen = [], []
    for _ in range(6):
        for rows in order:
            optimizer.zero_grad()
            F.mse_loss(model(TRAIN[0][rows])[:, 0], TRAIN[1][rows]).backward()
            optimizer.step()
            mean = {n: mean[n] + 0.2 * (p.detach() - mean[n]) for n, p in model.named_parameters()}
        view = copy.deepcopy(model)
        view.load_state_dict({**view.state_dict(), **mean})
        if norm:
            gf.recalibrate(view, [TRAIN[0]])
        losses.append(scored(view))
        seen.append(view.state_dict())
        if len(mix) > 1 and len(losses) - losses.index(min(losses)) > 2:
            break
    assert [row["valid_loss"] for row in found.history] == pytest.approx(losses, rel=1e-12)
    best = losses.index(min(losses)) if len(mix) > 1 else len(losses) - 1
    for name, tensor in found.model.state_dict().items():
        if "num_batches" not in name:
            assert torch.allclose(tensor, seen[best][name], rtol=1e-12, atol=1e-14), name
    assert found.score == pytest.approx(scored(found.model), rel=1e-12) == pytest.approx(losses[best], rel=1e-12)


def test_a_look_beside_training_leaves_the_order_as_it_is() -> None:
    for wrap in (lambda *pair: pair, TensorDataset, Pairs):
        batches, alone = (batches_of(wrap(*TRAIN), "train", 8, shuffle=True, seed=2) for _ in range(2))
        assert len(uncounted(batches)) == 4
        for _ in range(3):
            assert [y.tolist() for _, y in uncounted(batches)] == [y.tolist() for _, y in uncounted(batches)]
            assert [y.tolist() for _, y in batches] == [y.tolist() for _, y in alone]


def test_checks_by_steps_come_at_these_steps_and_at_the_last() -> None:
    found = short(net(), cocktail=EarlyStopping(50), check_every=3, epochs=5)  # 4 steps in an epoch
    assert [row["step"] for row in found.history] == [3, 6, 9, 12, 15, 18, 20]
    assert [row["epoch"] for row in found.history] == [1, 2, 3, 3, 4, 5, 5]
    assert found.kept == min(found.history, key=lambda row: row["valid_loss"])
    assert found.score == pytest.approx(scored(found.model), rel=1e-12)
    by_epoch = short(net(), epochs=5)
    assert [(row["epoch"], row["step"]) for row in by_epoch.history] == [(i, 4 * i) for i in range(1, 6)]


def test_the_training_loss_is_since_the_check_before() -> None:
    seen: list[tuple[float, int]] = []

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        value = F.mse_loss(outputs[:, 0], y)
        if outputs.requires_grad:
            seen.append((value.item(), len(y)))
        return value

    found = short(net(), loss=loss, check_every=3, epochs=3)
    for i, row in enumerate(found.history):
        part = seen[3 * i : 3 * i + 3]
        assert row["train_loss"] == pytest.approx(sum(v * n for v, n in part) / sum(n for _, n in part), rel=1e-12)


@pytest.mark.parametrize(("unit", "patience", "stop"), [("checks", 2, 9), ("steps", 5, 9), ("steps", 6, 9), ("steps", 7, 12)])
def test_patience_counts_checks_or_steps(unit: Any, patience: int, stop: int) -> None:
    stopping = EarlyStopping(patience, min_delta=100.0, unit=unit)
    found = short(net(), cocktail=stopping, check_every=3, epochs=50)
    assert found.history[-1]["step"] == stop  # the first check, at step 3, is the one improvement


def test_steps_behind_the_last_check_are_scored_too() -> None:
    for every, steps in ((24, [24]), (25, [24]), (9, [9, 18, 24])):
        found = short(net(), check_every=every)
        assert [row["step"] for row in found.history] == steps
        assert found.kept is found.history[-1]
        assert found.score == pytest.approx(found.kept["valid_loss"], rel=1e-12)


def test_an_interval_of_checks_is_a_count() -> None:
    for wrong in (0, 1.5, True):
        with pytest.raises(GoodfitError, match="check_every must be an integer >= 1"):
            short(net(), check_every=wrong)


def test_workers_that_persist_cannot_be_asked_twice_at_a_time() -> None:
    loader = DataLoader(TensorDataset(*TRAIN), batch_size=8, num_workers=1, persistent_workers=True)
    with pytest.raises(GoodfitError, match="would begin the epoch anew; make the loader with persistent_workers=False"):
        short(net(), loader, VALID, Cocktail(gf.EMA(0.8, warmup=False), EarlyStopping(3)), check_every=3)


def test_a_standard_error_is_over_rows_or_over_batches() -> None:
    model = net()
    batches = [(X[:5], Y[:5]), (X[5:8], Y[5:8]), (X[8:12], Y[8:12])]
    with torch.no_grad():
        each = (model(X[:12])[:, 0] - Y[:12]).square()
    by_rows = float(each.std() / math.sqrt(12))
    for loss in (loss_of("numbers"), lambda o, y: F.mse_loss(o[:, 0], y)):
        score, stderr = mean_and_stderr(model, batches, loss, rowwise(loss))
        assert score == pytest.approx(float(each.mean()), rel=1e-12) == evaluate(model, batches, loss)
        if rowwise(loss) is not None:
            assert stderr == pytest.approx(by_rows, rel=1e-12)
    means, sizes = torch.stack([each[:5].mean(), each[5:8].mean(), each[8:].mean()]), torch.tensor([5.0, 3.0, 4.0]).double()
    over_batches = ((sizes * (means - each.mean()).square()).sum() / (2 * 12)).sqrt()
    assert stderr == pytest.approx(float(over_batches), rel=1e-12)
    assert mean_and_stderr(model, batches[:1], loss, None)[1] is None


@pytest.mark.parametrize(
    "loss",
    [F.mse_loss, nn.MSELoss(), nn.HuberLoss(), partial(F.smooth_l1_loss, beta=0.5), nn.L1Loss(), loss_of("numbers")],
)
def test_torchs_losses_tell_their_rows(loss: Any) -> None:
    a, b = torch.rand(6, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(6, 2)
    each = rowwise(loss)
    assert each is not None
    assert torch.allclose(each(a, b).mean(), loss(a, b))
    assert each(a, b).shape == (6, 2)


@pytest.mark.parametrize("loss", [nn.MSELoss(reduction="sum"), partial(F.mse_loss, reduction="sum"), lambda o, y: o.mean()])
def test_other_losses_do_not(loss: Any) -> None:
    assert rowwise(loss) is None


def test_a_loss_that_weighs_its_rows_has_an_error_over_batches() -> None:
    y = torch.tensor([0, 1, 1, 0, 1, 1])
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0]))
    model = nn.Linear(3, 2)
    batches = [(X[:3], y[:3]), (X[3:6], y[3:])]
    assert mean_and_stderr(model, batches, loss, rowwise(loss)) == mean_and_stderr(model, batches, loss, None)


def test_criteria_of_a_fit_hear_what_they_need() -> None:
    noise_aware = short(net(), cocktail=EarlyStopping(Patience(2, stderrs=1e6)), epochs=50)
    assert len(noise_aware.history) == 3
    assert all(row["stderr"] > 0 for row in noise_aware.history)
    assert short(net(), cocktail=EarlyStopping(gf.stop.PQ(1e-9, k=2)), epochs=50).reason is Reason.PROGRESS
    alone = {"loss": lambda o, y: (o[:, 0] - y).square().mean(), "batch_size": 16}  # all rows of VALID in one batch
    with pytest.raises(GoodfitError, match="standard error of the validation loss is not known"):
        short(net(), cocktail=EarlyStopping(Patience(2, stderrs=1.0)), **alone)


def test_evidence_is_of_the_weights_that_are_scored_and_stops() -> None:
    y = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) - 0.5  # no signal but the mean
    model = nn.Linear(3, 1).double()
    calm = partial(torch.optim.SGD, lr=0.05)
    found = short(model, (X[:30], y), VALID, EarlyStopping(Evidence(), restore=False), epochs=200, optimizer=calm)
    assert found.reason is Reason.EVIDENCE
    batches = batches_of((X[:30], y), "train", 8, shuffle=True, seed=0)
    batches.order.epoch = len(found.history)
    assert gf.stop.evidence(model, loss_of("numbers"), batches) > 0
    assert found.kept is found.history[-1]


def test_a_rollback_goes_on_from_the_best() -> None:
    calls = iter(range(10**6))

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        spoiled = not outputs.requires_grad and next(calls) == 4  # in the third check
        return F.mse_loss(outputs[:, 0], y) * (math.nan if spoiled else 1.0)

    adam = partial(torch.optim.Adam, lr=0.05)
    found = short(net(), loss=loss, cocktail=EarlyStopping(20, nonfinite="rollback"), optimizer=adam)
    losses = [row["valid_loss"] for row in found.history]
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True, True, True]
    assert losses[5] < losses[1]
    assert found.score == pytest.approx(scored(found.model), rel=1e-12) == pytest.approx(min(losses[3:]), rel=1e-12)


def test_two_early_stoppings_on_one_metric_keep_to_themselves() -> None:
    quick, slow = EarlyStopping(2, min_delta=100.0), EarlyStopping(4)
    for mix in (Cocktail(quick, slow), Cocktail(slow, quick)):
        found = short(net(), cocktail=mix, epochs=50)
        assert len(found.history) == 3
        first = found.history[0]["valid_loss"]
        assert found.stopped.startswith(f"no improvement on {first:.6g} by more than 100 in 2 checks")
        assert found.score == pytest.approx(min(row["valid_loss"] for row in found.history), rel=1e-12)


@pytest.mark.parametrize(
    "mix", [Cocktail(EarlyStopping(2)), Cocktail(gf.EMA(0.7, warmup=False), EarlyStopping(3, unit="checks"), BatchNorm())]
)
def test_a_run_that_is_resumed_at_any_check_stops_and_keeps_alike(mix: Any) -> None:
    def course(resume: int | None) -> tuple[list[float], str, dict[str, Tensor]]:
        model = net()
        run, scores = Run(mix, model, example=X[:8], task="numbers"), []
        optimizer = SGD(model.parameters(), lr=0.9)
        for check in range(30):
            for x, y in BATCHES:
                optimizer.zero_grad()
                run.loss(x, y).backward()
                run.gradient(optimizer)
                optimizer.step()
                run.step(optimizer)
            if check == resume:
                saved, weights = run.state_dict(), copy.deepcopy(model.state_dict())
                model = net()
                run = Run(mix, model, example=X[:8], task="numbers")
                model.load_state_dict(weights)
                run.load_state_dict(saved)
                optimizer = SGD(model.parameters(), lr=0.9)
            with run.view(BATCHES):
                scores.append(scored(model))
                model.train()
                go_on = run.epoch(scores[-1])
            if not go_on:
                break
        return scores, run.stopped, dict(run.finish(BATCHES).state_dict())

    whole = course(None)
    assert whole[1]
    for resume in range(len(whole[0])):
        scores, stopped, weights = course(resume)
        assert (scores, stopped) == whole[:2]
        assert same(weights, whole[2])


def test_a_file_keeps_what_memory_would(tmp_path: Path) -> None:
    file = tmp_path / "best.safetensors"
    kept = short(net(True), cocktail=EarlyStopping(2), epochs=30, keep=file)
    assert same(kept.model.state_dict(), short(net(True), cocktail=EarlyStopping(2), epochs=30).model.state_dict())
    assert file.is_file()
    with pytest.raises(GoodfitError, match="keep= is the file of one EarlyStopping"):
        short(net(), keep=file)


@pytest.mark.parametrize("how", ["steps", "epochs"])
@pytest.mark.parametrize("wrap", [lambda *pair: pair, TensorDataset, Pairs], ids=["tensors", "TensorDataset", "Dataset"])
def test_a_refit_is_a_fit_on_all_rows_for_the_number_found(how: str, wrap: Any) -> None:
    found = short(
        net(), wrap(*TRAIN), wrap(*VALID), Cocktail(EarlyStopping(3), gf.InputNoise(0.1), Dropout(0.2)), epochs=40, refit=how
    )
    alone = short(net(), wrap(*TRAIN), wrap(*VALID), Cocktail(EarlyStopping(3), gf.InputNoise(0.1), Dropout(0.2)), epochs=40)
    assert same(found.validated.state_dict(), alone.model.state_dict())
    assert (found.score, found.history[-1]["step"]) == (alone.score, alone.history[-1]["step"])
    assert found.score == pytest.approx(scored(found.validated), rel=1e-12)
    enough = found.kept["step"]  # 4 a epoch, and 5 of all rows
    steps = enough if how == "steps" else enough // 4 * 5
    assert f"for the {enough // 4 if how == 'epochs' else enough} {how} of the kept weights" in found.refit
    model = net()
    run = Run(Cocktail(EarlyStopping(math.inf), gf.InputNoise(0.1), Dropout(0.2)), model, example=X[:8], task="numbers")
    optimizer, order, done = SGD(model.parameters()), Order(40, 8, shuffle=True), 0
    while done < steps:
        for rows in order:
            if done < steps:
                optimizer.zero_grad()
                run.loss(*run.batch(X[rows], Y[rows])).backward()
                run.gradient(optimizer)
                optimizer.step()
                run.step(optimizer)
            done += 1
    assert same(found.model.state_dict(), model.state_dict())
    assert not same(found.model.state_dict(), found.validated.state_dict())


def test_a_refit_of_an_edited_model_with_averages_and_batch_norms() -> None:
    mix = Cocktail(BatchNorm(), Dropout(0.2), gf.EMA(0.7, warmup=False), EarlyStopping(3))
    found = short(net(), cocktail=mix, epochs=20, refit="epochs", seed=4)
    alone = short(net(), BOTH, VALID, Cocktail(*tuple(mix)[:3]), epochs=found.kept["epoch"], seed=4)
    assert same(found.model.state_dict(), alone.model.state_dict())
    assert scored(found.validated) == pytest.approx(found.score, rel=1e-12)


@pytest.mark.parametrize(("how", "length"), [("steps", 8), ("epochs", 10)])
def test_a_schedule_in_epochs_is_the_same_in_steps_or_in_epochs(how: str, length: int) -> None:
    rates: list[float] = []

    class Peeking(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            rates.extend([self.dropout.p] if x.requires_grad and hasattr(self, "dropout") else [])
            return super().forward(x)

    model = net()
    model[2] = Peeking()
    found = short(model, cocktail=Dropout(gf.schedules.linear(0.0, 0.4, epochs=2)), epochs=3, refit=how)
    assert found.kept is found.history[-1]
    anew = rates[12:]
    assert anew == pytest.approx([0.4 * min(i / length, 1) for i in range(12 if how == "steps" else 15)])


def test_a_part_of_an_epoch_is_the_same_part_of_the_longer_one() -> None:
    found = short(net(), cocktail=EarlyStopping(1, min_delta=100.0, restore=False), check_every=3, refit="epochs")
    assert found.kept["step"] == 6
    assert found.refit == "refit on train and valid for the 1.5 epochs of the kept weights, which are 8 steps"  # 7.5


def test_a_refit_takes_a_loader_as_it_is() -> None:
    def loader(pair: Any, **how: Any) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*pair), batch_size=8, **how)

    found = short(net(), loader(TRAIN), loader(VALID), EarlyStopping(3), epochs=3, refit="epochs")
    assert same(found.model.state_dict(), short(net(), loader(BOTH), VALID, epochs=found.kept["epoch"]).model.state_dict())
    shuffled = short(net(), loader(TRAIN, shuffle=True), VALID, epochs=2, refit="epochs")
    assert same(shuffled.model.state_dict(), short(net(), loader(BOTH, shuffle=True), VALID, epochs=2).model.state_dict())


LOADER = DataLoader(TensorDataset(*TRAIN))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"refit": "twice"}, "refit must be 'steps' or 'epochs', or left out, got refit='twice'"),
        ({"train": stream(BATCHES)}, "refit joins the rows of train and valid, which train does not tell"),
        ({"valid": DataLoader(TensorDataset(*BOTH), sampler=SubsetRandomSampler([1, 2]))}, "which valid does not tell"),
        ({"valid": (X[:, :2], Y)}, "Rows can be joined where they are of one shape"),
        (
            {"train": DataLoader(TensorDataset(*TRAIN)), "valid": DataLoader(TensorDataset(*VALID), collate_fn=list)},
            "one collate",
        ),
        (
            {"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters())},
            "which needs an optimizer of its own, and this SGD holds weights beside those of the model; give a function",
        ),
    ],
)
def test_what_cannot_be_refit_is_refused_before_anything_is_trained(how: dict[str, Any], message: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GoodfitError, match=message):
        short(model, cocktail=EarlyStopping(3), **{"refit": "steps", **how})
    assert same(model.state_dict(), before)


@pytest.mark.parametrize(("act", "what"), [(ctrl_c, "was interrupted at step 3 of 12"), (None, "diverged .*")])
def test_a_refit_that_fails_leaves_the_validated_model(act: Any, what: str) -> None:
    steps = iter(range(10**6))

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        late = outputs.requires_grad and next(steps) == 14  # behind the 12 of the training
        if late and act is not None:
            act()
        return F.mse_loss(outputs[:, 0], y) * (math.nan if late and act is None else 1.0)

    model = net()
    with pytest.warns(GoodfitWarning, match=f"The refit {what}: the model is the validated one"):
        found = short(model, loss=loss, epochs=3, refit="steps")
    assert (found.refit, found.validated) == ("", None)
    assert found.score == pytest.approx(scored(model), rel=1e-12)


def test_an_error_in_a_refit_passes_with_the_validated_model() -> None:
    steps = iter(range(10**6))

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        if outputs.requires_grad and next(steps) == 14:
            broken()
        return F.mse_loss(outputs[:, 0], y)

    model = net()
    with pytest.raises(OSError, match="gone") as caught:
        short(model, loss=loss, epochs=3, refit="steps")
    assert caught.value.result.score == pytest.approx(scored(model), rel=1e-12)
    assert "the model is the validated one, as before the refit; what there is" in caught.value.__notes__[0]


def test_an_interrupted_training_is_not_refit() -> None:
    model = net()
    steps = iter(range(10**6))

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        if outputs.requires_grad and next(steps) == 6:
            ctrl_c()
        return F.mse_loss(outputs[:, 0], y)

    found = short(model, loss=loss, cocktail=EarlyStopping(3), refit="steps")
    assert (found.reason, found.refit, found.validated) == (Reason.INTERRUPTED, "", None)
    assert found.score == pytest.approx(scored(model), rel=1e-12)


class Ending:
    """Batches of the training rows; `act` happens in the last pass, behind its last batch."""

    def __init__(self, act: Callable[[], None], epochs: int) -> None:
        self.act, self.left = act, epochs

    def __iter__(self) -> Iterator[Any]:
        yield from BATCHES
        self.left -= 1
        if not self.left:
            self.act()


def test_an_error_behind_the_last_epoch_has_the_result_and_says_which_weights_the_model_has(tmp_path: Path) -> None:
    file, model = tmp_path / "best.safetensors", net()
    valid = Watching(model)
    damaging = DataLoader(Stream(Ending(lambda: file.write_bytes(b"damaged"), 6)), batch_size=None)
    with pytest.raises(GoodfitError, match="must be a file in which goodfit kept the best weights") as caught:
        short(model, damaging, stream(valid), EarlyStopping(9), keep=file)
    found = caught.value.result
    losses = [row["valid_loss"] for row in found.history]
    assert len(losses) == 6
    assert losses.index(min(losses)) < 5
    assert same(model.state_dict(), valid.seen[5])
    assert (found.kept, found.score) == (found.history[-1], losses[-1])
    assert "the model has the weights of its last step, maybe not its best (6 checks)" in caught.value.__notes__[0]


@pytest.mark.parametrize("act", [ctrl_c, broken])
def test_the_final_scoring_may_be_ended_too(act: Any) -> None:
    model = net()
    ask = partial(short, model, TRAIN, stream(Watching(model, act, 7)), epochs=6, refit=None)
    if act is ctrl_c:
        found = ask(cocktail=EarlyStopping(9))
        assert (found.reason, found.stopped) == (Reason.INTERRUPTED, "interrupted when its model was scored once more")
    else:
        with pytest.raises(OSError, match="gone") as caught:
            ask(cocktail=EarlyStopping(9))
        found = caught.value.result
        assert found.reason is None
    assert found.kept == min(found.history, key=lambda row: row["valid_loss"])
    assert found.score == found.kept["valid_loss"] == pytest.approx(scored(model), rel=1e-12)


def test_what_is_not_finite_at_the_end_has_the_result_too() -> None:
    calls = iter(range(10**6))

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(outputs[:, 0], y) * (math.nan if not outputs.requires_grad and next(calls) >= 4 else 1.0)

    with pytest.raises(GoodfitError, match="must be finite, got nan") as caught:
        short(net(), loss=loss, epochs=3)
    assert [math.isfinite(row["valid_loss"]) for row in caught.value.result.history] == [True, True, False]
    assert math.isnan(caught.value.result.score)


@pytest.mark.parametrize("mix", [Cocktail(), EarlyStopping(9, restore=False), EarlyStopping(math.inf)], ids=str)
def test_the_note_promises_the_best_only_where_it_is_there(mix: Any) -> None:
    model = net()
    with pytest.raises(OSError, match="gone") as caught:
        short(model, stream(BATCHES, broken, 12), VALID, mix)
    assert "the model has the weights of its last step, maybe not its best (2 checks)" in caught.value.__notes__[0]
    found = caught.value.result
    assert found.kept is None
    assert math.isnan(found.score)
    with pytest.raises(OSError, match="gone") as caught:
        short(net(), stream(BATCHES, broken, 12), VALID, EarlyStopping(9))
    assert "the model has its best weights so far (2 checks)" in caught.value.__notes__[0]


def test_a_loader_that_draws_from_a_part_of_its_rows_is_not_joined() -> None:
    part = DataLoader(TensorDataset(X, Y), 8, sampler=SequentialSampler(range(20)))
    with pytest.raises(GoodfitError, match="refit joins the rows of train and valid, which train does not tell"):
        fit(net(), part, VALID, Cocktail(), optimizer=SGD, epochs=1, refit="steps")


@pytest.mark.parametrize("every", [None, 2])
def test_a_stream_that_can_be_read_once_ends_the_training_and_says_so(every: int | None) -> None:
    class Once(IterableDataset[Any]):
        def __init__(self) -> None:
            self.rows = iter([(X[:8], Y[:8])] * 6)

        def __iter__(self) -> Any:
            return self.rows

    found = fit(
        net(), DataLoader(Once(), batch_size=None), VALID, gf.EarlyStopping(9), optimizer=SGD, epochs=4, check_every=every
    )
    assert found.stopped == "train gave no batch in epoch 2, as a stream that can be read once"
    assert found.score == pytest.approx(min(row["valid_loss"] for row in found.history), rel=1e-12)


def test_ctrl_c_behind_the_hearing_of_a_check_keeps_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gf.Run.epoch

    def then_interrupted(run: gf.Run, *args: Any, **told: Any) -> bool:
        whole(run, *args, **told)
        raise KeyboardInterrupt

    monkeypatch.setattr(gf.Run, "epoch", then_interrupted)
    found = fit(net(), TRAIN, VALID, gf.EarlyStopping(9), optimizer=SGD, epochs=4)
    assert [row["step"] for row in found.history] == [found.kept["step"]]
    assert found.score == pytest.approx(found.history[0]["valid_loss"], rel=1e-12)


def test_gradients_are_on_again_behind_a_fit() -> None:
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        if outputs.requires_grad and next(calls) == 5:  # in the second epoch
            torch.set_grad_enabled(False)
            raise KeyboardInterrupt
        return F.mse_loss(outputs.flatten(), y)

    calls = iter(range(10**6))
    fit(net(), TRAIN, VALID, gf.EarlyStopping(9), loss=loss, optimizer=SGD, epochs=4, batch_size=8)
    assert torch.is_grad_enabled()


def test_an_optimizer_of_its_own_is_copied_for_a_refit_as_it_was() -> None:
    def made(model: nn.Module) -> torch.optim.Optimizer:
        groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[3].parameters()}]
        return torch.optim.SGD(groups, lr=0.7, momentum=0.5)

    def by_name(parameters: Any) -> torch.optim.Optimizer:
        first, second, third, fourth = parameters
        return torch.optim.SGD([{"params": [first, second], "lr": 0.3}, {"params": [third, fourth]}], lr=0.7, momentum=0.5)

    model = net()
    optimizer = made(model)
    found = short(model, cocktail=gf.L2(0.01), optimizer=optimizer, refit="epochs")
    other = short(net(), cocktail=gf.L2(0.01), optimizer=by_name, refit="epochs")
    assert found.refit == other.refit != ""
    assert same(model.state_dict(), other.model.state_dict())
    assert same(found.validated.state_dict(), other.validated.state_dict())
    optimizer = made(model)
    optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(GoodfitError, match="this SGD has hooks; give a function that makes it"):
        short(model, optimizer=optimizer, refit="steps")


def test_a_model_that_cannot_be_copied_is_not_refit() -> None:
    model = net()
    model.product = model[0].weight * 2
    with pytest.raises(GoodfitError, match="refit begins from a copy, which cannot be made of this model"):
        short(model, refit="steps")
