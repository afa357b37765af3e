"""skorch: the weights and the stop of the plain loop, in fit, partial_fit, searches, pickles and checkpoints."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetRegressor
from skorch.callbacks import (
    Callback,
    Checkpoint,
    EpochScoring,
    GradientNormClipping,
    LoadInitState,
    LRScheduler,
    TrainEndCheckpoint,
)
from skorch.dataset import Dataset, unpack_data
from skorch.helper import predefined_split
from torch import nn, optim

import goodfit as gf
from goodfit.adapters.skorch import Regularization
from plain import (
    AVERAGED,
    BEST,
    COCKTAIL,
    EPOCHS,
    REST,
    SEED,
    STOP,
    XV,
    YV,
    X,
    Y,
    net,
    patience,
    plain,
    same,
    whole_loss,
)

loop = partial(plain, score=whole_loss)


@pytest.fixture(autouse=True)
def single() -> Iterator[None]:
    """Hosts move data in single precision."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


class ByRun(NeuralNetRegressor):
    """What a user writes for Batch and Loss regularizers."""

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        self._set_training(True)
        run = self.goodfit_.run
        loss = run.loss(*run.batch(*unpack_data(batch)))
        loss.backward()
        return {"loss": loss, "y_pred": None}


class Interrupt(Callback):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.epoch, self.error = epoch, error

    def on_batch_end(self, net: Any, training: bool = False, **kwargs: Any) -> None:
        if len(net.history) == self.epoch and len(net.history[-1, "batches"]) == 2:
            raise self.error


def host(cocktail: Any = COCKTAIL, *more: Any, kind: type[NeuralNetRegressor] = NeuralNetRegressor, **told: Any) -> Any:
    regularizing = {key: told.pop(key) for key in ("monitor", "example") if key in told}
    settings: dict[str, Any] = {
        "module": net,
        "optimizer": optim.AdamW,
        "optimizer__weight_decay": 0.0,
        "lr": 0.02,
        "batch_size": 8,
        "iterator_valid__batch_size": 32,
        "max_epochs": EPOCHS,
        "train_split": predefined_split(Dataset(XV, YV)),
        "verbose": 0,
        "callbacks": [Regularization(cocktail, seed=SEED, **regularizing), *more],
    }
    return kind(**{**settings, **told})


def ours(net: Any) -> Regularization:
    return dict(net.callbacks_)["Regularization"]


def test_the_weights_and_the_stop_are_those_of_the_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    model, run, scores = loop()
    net = host(verbose=1).fit(X, Y)
    assert net.history[:, "valid_loss"] == scores
    assert len(scores) == STOP
    assert ours(net).stopped == run.stopped
    assert f"Stopping: {run.stopped}" in capsys.readouterr().out
    assert same(model, net.module_)


def test_batch_and_loss_regularizers_act_in_the_step() -> None:
    cocktail = gf.Cocktail(gf.InputNoise(0.5), gf.Flooding(0.3), *COCKTAIL)
    model, _, scores = loop(cocktail, by_run=True)
    net = host(cocktail, kind=ByRun).fit(X, Y)
    assert net.history[:, "valid_loss"] == scores
    assert same(model, net.module_)
    assert not same(model, loop()[0])


@pytest.mark.parametrize("toy", [gf.InputNoise(0.1), gf.Flooding(0.1)])
def test_what_the_step_does_not_call_is_refused_with_the_line_to_add(toy: Any) -> None:
    with pytest.raises(gf.GoodfitError, match=r"which was not called; add: "):
        host((gf.L2(0.1), toy)).fit(X, Y)


@pytest.mark.parametrize("kind", [NeuralNetRegressor, ByRun])
def test_a_second_gradient_is_had_from_the_closure(kind: Any) -> None:
    cocktail = (gf.SAM(0.1), gf.L2(0.01), gf.Dropout(0.3), gf.BatchNorm())
    model, _, _ = loop(cocktail, epochs=2, by_run=True)
    net = host(cocktail, kind=kind).fit(X, Y, epochs=2)
    assert same(model, net.module_)
    assert not same(model, loop(cocktail[1:], epochs=2)[0])


def test_a_column_to_maximize_and_two_stoppings_on_one() -> None:
    cocktail = (gf.L2(0.01), gf.EarlyStopping(5, mode="max"), gf.EarlyStopping(2, mode="max", min_delta=1e-3))
    model, run, scores = loop(cocktail, score=lambda m: -whole_loss(m))
    scoring = EpochScoring(lambda net, X, y: -net.history[-1, "valid_loss"], name="goodness", lower_is_better=False)
    net = host(cocktail, callbacks=[scoring, Regularization(cocktail, monitor="goodness", seed=SEED)]).fit(X, Y)
    assert ours(net).stopped == run.stopped
    assert net.history[:, "goodness"] == scores
    assert same(model, net.module_)


def test_a_score_that_never_moves_stops() -> None:
    scoring = EpochScoring(lambda net, X, y: 1.0, name="still")
    net = host(callbacks=[scoring, Regularization("L2(0.01), EarlyStopping(3)", monitor="still")]).fit(X, Y)
    assert len(net.history) == 4


@pytest.mark.parametrize(
    "kind", [np.float32, np.float64, torch.tensor, lambda score: round(1000 * score)], ids=["32", "64", "tensor", "int"]
)
def test_a_score_may_be_any_number(kind: Any) -> None:
    scoring = EpochScoring(lambda net, X, y: kind(net.history[-1, "valid_loss"]), name="mine")
    net = host(callbacks=[scoring, Regularization(COCKTAIL, monitor="mine", seed=SEED)]).fit(X, Y)
    assert len(net.history) == STOP
    assert same(net.module_, loop()[0])


@pytest.mark.parametrize("score", [True, "0.5", torch.ones(2)], ids=["bool", "text", "list"])
def test_what_is_no_number_is_no_score(score: Any) -> None:
    scoring = EpochScoring(lambda net, X, y: score, name="mine", lower_is_better=None)
    with pytest.raises(gf.GoodfitError, match=r"A score must be one number|monitor='mine' must name a metric"):
        host(callbacks=[scoring, Regularization(COCKTAIL, monitor="mine")]).fit(X, Y)


def test_a_missing_column_is_named_with_the_nearest() -> None:
    match = r"'val_loss' must name .*before Regularization, has: .*train_loss, .*valid_loss; did you mean valid_loss"
    with pytest.raises(gf.GoodfitError, match=match):
        host(monitor="val_loss").fit(X, Y)


def test_no_validation_is_refused_at_the_start_where_it_is_needed() -> None:
    with pytest.raises(gf.GoodfitError, match=r"EarlyStopping\(3.* needs a validation.*train_split=ValidSplit\(5\)"):
        host(train_split=None).fit(X, Y)
    bare = host(REST, train_split=None, max_epochs=2).fit(X, Y)
    assert same(bare.module_, loop(REST, epochs=2)[0])
    by_training = host(train_split=None, monitor="train_loss").fit(X, Y)
    assert int(ours(by_training).run.states(gf.EarlyStopping)[0][1]["checks"]) == len(by_training.history)


# Whatever ends the training


def test_the_best_comes_back_at_the_last_epoch() -> None:
    net = host(max_epochs=7).fit(X, Y)
    assert ours(net).stopped == ""
    assert same(net.module_, loop(epochs=7)[0])
    assert whole_loss(net.module_) == min(net.history[:, "valid_loss"]) == net.history[BEST - 1, "valid_loss"]


def test_the_best_comes_back_after_ctrl_c() -> None:
    net = host(COCKTAIL, Interrupt(7)).fit(X, Y)
    assert len(net.history) == 7
    assert whole_loss(net.module_) == net.history[BEST - 1, "valid_loss"]
    early = host(COCKTAIL, Interrupt(1)).fit(X, Y)
    assert len(early.history) == 1


def test_after_an_error_the_best_is_one_call_away() -> None:
    net = host(COCKTAIL, Interrupt(7, RuntimeError))
    with pytest.raises(RuntimeError):
        net.fit(X, Y)
    net.goodfit_.run.finish()
    assert whole_loss(net.module_) == net.history[BEST - 1, "valid_loss"]


def test_averaged_weights_get_their_statistics_from_the_training_data() -> None:
    net = host((gf.EMA(0.5, warmup=False), gf.BatchNorm()), max_epochs=2, train_split=None).fit(X, Y)
    assert torch.equal(net.module_[0].weight.data, ours(net).run.states(gf.EMA)[0][1]["mean.0.weight"])
    before = copy.deepcopy(net.module_)
    gf.recalibrate(net.module_, [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 32, 8)])
    assert torch.equal(before[0].batchnorm.running_mean, net.module_[0].batchnorm.running_mean)
    assert torch.equal(before[2].batchnorm.running_var, net.module_[2].batchnorm.running_var)


def test_what_is_scored_and_kept_is_averaged_and_what_trains_is_not() -> None:
    model, run, scores = loop(AVERAGED)
    net = host(AVERAGED).fit(X, Y)
    assert net.history[:, "valid_loss"] == scores
    assert ours(net).stopped == run.stopped != ""
    for batchnorm in (model[0].batchnorm, model[2].batchnorm):
        batchnorm.num_batches_tracked.fill_(1)  # skorch gives all data in one batch of validation
    assert same(model, net.module_)


def test_ctrl_c_in_the_first_validation_leaves_what_trained() -> None:
    class Interrupted(Callback):
        def on_batch_end(self, net: Any, training: bool = False, **kwargs: Any) -> None:
            if not training:
                raise KeyboardInterrupt

    net = host(AVERAGED, Interrupted()).fit(X, Y)
    assert same(net.module_, loop(REST, epochs=1)[0])


# Initialized again, cloned, searched


def test_fit_again_starts_again() -> None:
    net = host().fit(X, Y)
    first = copy.deepcopy(net.module_)
    net.fit(X, Y)
    assert len(net.history) == STOP
    assert same(first, net.module_)


def test_a_module_that_is_an_instance_is_built_once_and_trained_on() -> None:
    net = host(module=loop((), epochs=0)[0]).fit(X, Y)
    layers = [name for name, _ in net.module_.named_modules()]
    assert len(net.history) == STOP
    net.fit(X, Y)
    assert [name for name, _ in net.module_.named_modules()] == layers
    assert int(ours(net).run.states(gf.EarlyStopping)[0][1]["checks"]) == len(net.history)


def test_other_modules_and_numbers_by_set_params() -> None:
    net = host("L2(0.1), EarlyStopping(3)").fit(X, Y)
    net.set_params(callbacks__Regularization__cocktail=COCKTAIL)
    net.fit(X, Y)
    assert same(net.module_, loop()[0])
    other = host().initialize().set_params(module=lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)))
    assert next(m for m in other.fit(X, Y).module_.modules() if isinstance(m, nn.BatchNorm1d)).num_features == 2


def test_a_rate_set_before_the_first_step_stays() -> None:
    net = host(REST, max_epochs=2).initialize()
    net.set_params(lr=0.005, optimizer__betas=(0.5, 0.9))
    net.partial_fit(X, Y)
    (group,) = net.optimizer_.param_groups
    assert (group["lr"], group["betas"]) == (0.005, (0.5, 0.9))
    assert len(group["params"]) == len(list(net.module_.parameters()))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_schedule_reaches_inserted_layers_wherever_it_stands(ahead: bool) -> None:
    schedule = LRScheduler(policy="StepLR", step_size=1, gamma=0.5)
    regularization = Regularization(REST, seed=SEED)
    callbacks = [schedule, regularization] if ahead else [regularization, schedule]
    net = host(callbacks=callbacks, max_epochs=2).fit(X, Y)
    assert [group["lr"] for group in net.optimizer_.param_groups] == [0.005]


def test_groups_of_parameters_may_name_inserted_layers() -> None:
    groups = [("*batchnorm*", {"lr": 0.5}), ("0.weight", {"lr": 0.1})]
    net = host(REST, max_epochs=1, optimizer__param_groups=groups).fit(X, Y)
    assert [(group["lr"], len(group["params"])) for group in net.optimizer_.param_groups] == [(0.5, 4), (0.1, 1), (0.02, 5)]


def test_a_net_that_makes_its_optimizer_in_its_own_way_keeps_it() -> None:
    class Head(NeuralNetRegressor):
        def initialize_optimizer(self) -> Any:
            self.module_[0].requires_grad_(False)
            self.optimizer_ = optim.SGD([p for p in self.module_.parameters() if p.requires_grad], lr=0.1)
            return self

    net = host("L2(0.1), BatchNorm()", kind=Head, max_epochs=1).fit(X, Y)
    held = {id(p) for group in net.optimizer_.param_groups for p in group["params"]}
    assert held >= {id(p) for p in net.module_.parameters() if p.requires_grad}
    assert id(net.module_[0].weight) not in held


def test_a_search_clones_it() -> None:
    plain = host(train_split=None, max_epochs=3)
    texts = ["L2(0.0), Dropout(0.0)", "L2(0.5), Dropout(0.9)", "L2(0.01), Dropout(0.2), BatchNorm()"]
    search = GridSearchCV(plain, {"callbacks__Regularization__cocktail": texts}, cv=2, scoring="neg_mean_squared_error")
    search.fit(X.numpy(), Y.numpy())
    alone = []
    for text in texts:
        net = clone(plain).set_params(callbacks__Regularization__cocktail=text)
        scores = []
        for a, b in ((slice(16, 32), slice(0, 16)), (slice(0, 16), slice(16, 32))):
            predicted = net.fit(X[a].numpy(), Y[a].numpy()).predict(X[b].numpy())
            scores.append(-((predicted - Y[b].numpy()) ** 2).mean())
        alone.append(sum(scores) / 2)
    assert search.cv_results_["mean_test_score"] == pytest.approx(alone, rel=1e-6)
    assert len(set(alone)) == 3
    assert plain.callbacks[0].cocktail is COCKTAIL
    assert clone(plain).callbacks[0].run_ is None


# Going on


@pytest.mark.parametrize("split", [1, 4, 7])
@pytest.mark.parametrize("how", ["partial_fit", "warm_start"])
def test_a_training_goes_on_from_the_weights_that_were_kept(split: int, how: str) -> None:
    """In pieces that each end at their best, so the whole is that of the plain loop up to the best epoch."""
    net = host(max_epochs=split, warm_start=how == "warm_start")
    step = net.fit if how == "warm_start" else net.partial_fit
    step(X, Y)
    step(X, Y) if split == 1 else net.partial_fit(X, Y, epochs=1)
    state = ours(net).run.states(gf.EarlyStopping)[0][1]
    assert int(state["checks"]) == len(net.history) == split + 1
    assert int(ours(net).run.state_dict()["step"]) == 4 * (split + 1)
    if split < BEST:
        assert same(net.module_, loop(epochs=split + 1)[0])


def test_a_stopped_training_that_goes_on_is_asked_anew_with_the_new_patience() -> None:
    net = host().fit(X, Y)
    assert len(net.history) == STOP
    net.partial_fit(X, Y)
    assert len(net.history) == STOP + 1
    net.set_params(callbacks__Regularization__cocktail=patience(50))
    penalized = ours(net).run
    net.partial_fit(X, Y, epochs=3)
    assert len(net.history) == STOP + 4
    assert ours(net).run is not penalized
    assert int(penalized.state_dict()["step"]) == 4 * (STOP + 1)
    assert int(ours(net).run.state_dict()["step"]) == 4 * (STOP + 4)


def test_other_regularizers_in_a_training_start_anew_and_say_so() -> None:
    net = host("L2(0.01)", max_epochs=1).fit(X, Y)
    net.set_params(callbacks__Regularization__cocktail="L2(0.01), EarlyStopping(9)")
    with pytest.warns(gf.GoodfitWarning, match=r"its regularizers begin anew: L2\(0.01\), EarlyStopping\(9\); to"):
        net.partial_fit(X, Y)


def test_an_optimizer_that_was_made_anew_is_regularized() -> None:
    a, b = host("L2(0.5)", max_epochs=1).fit(X, Y), host("L2(0.5)", max_epochs=1).fit(X, Y)
    a.set_params(criterion__reduction="mean")
    assert a.optimizer_ is not b.optimizer_
    b.optimizer_.state.clear()
    assert same(a.partial_fit(X, Y).module_, b.partial_fit(X, Y).module_)
    assert int(ours(a).run.state_dict()["step"]) == 8


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copied_net_goes_on_as_the_first_does(copied: Any) -> None:
    first = host(max_epochs=3).fit(X, Y)
    second = copied(first)
    assert torch.equal(torch.as_tensor(first.predict(X)), torch.as_tensor(second.predict(X)))
    first.partial_fit(X, Y, epochs=EPOCHS)
    second.partial_fit(X, Y, epochs=EPOCHS)
    assert first.history[:, "valid_loss"] == second.history[:, "valid_loss"]
    assert len(first.history) == STOP
    assert same(first.module_, second.module_)
    assert same(first.module_, loop()[0])


ways = pytest.mark.parametrize(
    "copied", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["itself", "copy", "pickle"]
)


def other() -> nn.Module:
    """The layers of the same shapes with other weights."""
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))


@ways
def test_another_module_does_not_go_on_from_the_state_of_the_first(copied: Any) -> None:
    first = copied(host("L2(0.01), EarlyStopping(3)", max_epochs=3).fit(X, Y))
    first.set_params(module=other)
    with pytest.raises(gf.GoodfitError, match=r"in another module_ than that of its state; begin anew, by net.initialize\(\)"):
        first.partial_fit(X, Y)
    first.initialize().partial_fit(X, Y)
    assert len(first.history) == 3
    assert same(first.module_, host("L2(0.01), EarlyStopping(3)", module=other, max_epochs=3).fit(X, Y).module_)


def test_a_copied_net_that_went_on_keeps_no_state_for_another_module() -> None:
    second = copy.deepcopy(host("L2(0.01)", max_epochs=1).fit(X, Y)).partial_fit(X, Y)
    second.set_params(module=other)
    with pytest.raises(gf.GoodfitError, match="in another module_ than that of its state"):
        second.partial_fit(X, Y)


def test_one_callback_for_two_nets_is_refused_and_clones_have_their_own() -> None:
    first = host(max_epochs=2).fit(X, Y)
    second = host(callbacks=first.callbacks)
    with pytest.raises(gf.GoodfitError, match="A Regularization serves one net, and this one has another; make one for each"):
        second.fit(X, Y)
    for third in (clone(first), copy.deepcopy(first)):
        assert same(third.fit(X, Y).module_, first.module_)
    first.partial_fit(X, Y)
    assert int(ours(first).run.states(gf.EarlyStopping)[0][1]["checks"]) == 4


def resumable(folder: Path, *between: Any, cocktail: Any = COCKTAIL) -> Any:
    saving = Checkpoint(monitor=None, dirname=str(folder), f_goodfit="goodfit.pt")
    return host(cocktail, saving, LoadInitState(saving), *between)


@pytest.mark.parametrize("epoch", [2, 4, 6, 8])
def test_killed_and_resumed_is_as_if_it_had_run_through(epoch: int, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        resumable(tmp_path, Interrupt(epoch, RuntimeError)).fit(X, Y)
    net = resumable(tmp_path).fit(X, Y)
    model, run, scores = loop()
    assert net.history[:, "valid_loss"] == scores
    assert ours(net).stopped == run.stopped
    assert same(model, net.module_)


def test_the_new_patience_wins_on_resume(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        resumable(tmp_path, Interrupt(7, RuntimeError)).fit(X, Y)
    longer = patience(5)
    net = resumable(tmp_path, cocktail=longer).fit(X, Y)
    assert len(net.history) == STOP + 2
    assert same(net.module_, loop(longer)[0])


def test_a_stop_is_found_again_from_the_epoch_before_and_more_patience_goes_on(tmp_path: Path) -> None:
    """The checkpoint of the last epoch is not written, as callbacks behind it do not see that epoch."""
    first = resumable(tmp_path).fit(X, Y)
    again = resumable(tmp_path).fit(X, Y)
    assert again.history[:, "valid_loss"] == first.history[:, "valid_loss"]
    assert ours(again).stopped == ours(first).stopped != ""
    assert same(again.module_, first.module_)
    longer = resumable(tmp_path, cocktail=patience(5)).fit(X, Y)
    assert len(longer.history) == STOP + 2
    assert same(longer.module_, loop(patience(5))[0])


def test_a_checkpoint_without_the_state_is_warned_of_once(tmp_path: Path) -> None:
    def made() -> Any:
        saving = Checkpoint(monitor=None, dirname=str(tmp_path))
        return host(COCKTAIL, saving, LoadInitState(saving), max_epochs=2)

    made().fit(X, Y)
    with pytest.warns(gf.GoodfitWarning, match=r"begin anew: .*to resume, save their state, by Checkpoint\(f_goodfit=") as told:
        made().fit(X, Y)
    assert len(told) == 1


def test_what_had_stopped_stays_stopped_and_goes_on_with_another_patience(tmp_path: Path) -> None:
    """The stop itself is in the checkpoint of the end, with the weights that were kept."""

    def made(cocktail: Any) -> Any:
        saving = TrainEndCheckpoint(dirname=str(tmp_path), f_goodfit="goodfit.pt")
        return host(cocktail, saving, LoadInitState(saving))

    first = made(COCKTAIL).fit(X, Y)
    again = made(COCKTAIL).fit(X, Y)
    assert again.history == first.history
    assert ours(again).stopped == ours(first).stopped
    assert int(ours(again).run.state_dict()["step"]) == 4 * STOP
    assert same(again.module_, first.module_)
    loaded = host().initialize()
    ours(loaded).prepare(loaded, X, Y)
    loaded.load_params(checkpoint=TrainEndCheckpoint(dirname=str(tmp_path), f_goodfit="goodfit.pt").initialize().checkpoint_)
    assert len(loaded.partial_fit(X, Y).history) == STOP
    again.partial_fit(X, Y)
    assert len(again.history) == STOP + 1
    assert len(made(patience(50)).fit(X, Y).history) > STOP + 1


def test_weights_with_inserted_layers_are_loaded_for_prediction(tmp_path: Path) -> None:
    first = host().fit(X, Y)
    first.save_params(f_params=tmp_path / "params.pt")
    second = host().initialize()
    ours(second).prepare(second, X, Y)
    second.load_params(f_params=tmp_path / "params.pt")
    assert same(first.module_, second.module_)
    assert second.predict(X).tolist() == first.predict(X).tolist()


def test_a_checkpoint_before_the_score_is_warned_of_once(tmp_path: Path) -> None:
    saving = Checkpoint(monitor=None, dirname=str(tmp_path), f_goodfit="goodfit.pt")
    net = host(callbacks=[saving, Regularization(COCKTAIL, seed=SEED)], max_epochs=3)
    with pytest.warns(gf.GoodfitWarning, match="put Checkpoint behind Regularization") as told:
        net.fit(X, Y)
    assert len(told) == 1


# A second Regularization


def pair(folder: Path, second: Any = "EarlyStopping(1)", cocktail: Any = COCKTAIL, *more: Any, **files: str) -> Any:
    """The second hears another column: the distance of the epoch from the third."""
    scoring = EpochScoring(lambda net, X, y: float(abs(len(net.history) - 3)), name="distance")
    saving = Checkpoint(monitor=None, dirname=str(folder / str(len(files))), **files)
    two = [("one", Regularization(cocktail, seed=SEED)), ("two", Regularization(second, monitor="distance"))]
    return host(callbacks=[scoring, *two, saving, *([LoadInitState(saving)] if files else []), *more])


def test_two_are_saved_and_resumed_together(tmp_path: Path) -> None:
    files = {"f_goodfit": "goodfit.pt", "f_goodfit2": "goodfit2.pt"}
    whole = pair(tmp_path).fit(X, Y)
    with pytest.raises(RuntimeError):
        pair(tmp_path, "EarlyStopping(1)", COCKTAIL, Interrupt(3, RuntimeError), **files).fit(X, Y)
    net = pair(tmp_path, **files).fit(X, Y)
    for one in (whole, net):
        assert len(one.history) == 4
        assert one.goodfit2_.stopped == "no improvement in 1 check: best 0 at check 3, 1 at check 4"
        assert one.goodfit_.stopped == ""
        assert same(one.module_, loop(epochs=3)[0])


def test_two_go_on_in_a_copied_net(tmp_path: Path) -> None:
    first = pair(tmp_path, "EarlyStopping(9)").fit(X, Y, epochs=2)
    second = copy.deepcopy(first)
    for one in (first, second):
        one.partial_fit(X, Y, epochs=1)
        assert [int(each.run.state_dict()["step"]) for each in (one.goodfit_, one.goodfit2_)] == [12, 12]
        assert same(one.module_, loop(epochs=3)[0])


def test_a_second_that_is_not_saved_with_the_first_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gf.GoodfitError, match=r"Checkpoint\(f_goodfit=...\) saves the first .* both: f_goodfit2='goodfit2.pt'"):
        pair(tmp_path, f_goodfit="goodfit.pt").fit(X, Y)


def test_a_second_may_only_stop(tmp_path: Path) -> None:
    for more in ("L2(0.1)", "EarlyStopping(3), Dropout(0.1)"):
        with pytest.raises(gf.GoodfitError, match=r"A second Regularization may only stop the training, got (L2|Dropout)"):
            pair(tmp_path, more).fit(X, Y)
    with pytest.raises(gf.GoodfitError, match=r"EMA\(0\.8, warmup=False\) averages weights, of which a second"):
        pair(tmp_path, "EarlyStopping(3)", AVERAGED).fit(X, Y)


# What stands in the way


def test_clipping_by_the_host_is_refused_beside_a_gradient_regularizer() -> None:
    clipping = GradientNormClipping(0.1)
    with pytest.raises(gf.GoodfitError, match=r"GradientNormClipping clips the gradient before ClipNorm\(.*leave the callback"):
        host((gf.L2(0.1), gf.ClipNorm(0.1)), clipping).fit(X, Y)
    assert len(host("L2(0.1)", clipping, max_epochs=1).fit(X, Y).history) == 1


@pytest.mark.parametrize("ahead", [False, True])
def test_a_checkpoint_that_loads_its_own_best_is_refused_beside_what_keeps(ahead: bool, tmp_path: Path) -> None:
    def made(cocktail: Any) -> Any:
        loading = Checkpoint(dirname=str(tmp_path), load_best=True)
        regularization = Regularization(cocktail, seed=SEED)
        return host(callbacks=[loading, regularization] if ahead else [regularization, loading])

    match = r"EarlyStopping\(3\) gives the weights to keep, and so does Checkpoint\(load_best=True\), by its own measure"
    with pytest.raises(gf.GoodfitError, match=match):
        made(COCKTAIL).fit(X, Y)
    net = made((*REST, gf.EarlyStopping(50, restore=False))).fit(X, Y)
    assert whole_loss(net.module_) == min(net.history[:, "valid_loss"])


def test_the_example_leaves_the_generator_as_it_was_and_may_be_given() -> None:
    states = []
    for given in (None, X[:2]):
        net = host("Dropout(0.5)", example=given).initialize()
        torch.manual_seed(1)
        ours(net).prepare(net, X, Y)
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)


def test_a_run_before_the_training_is_told_of() -> None:
    with pytest.raises(gf.GoodfitError, match="A run begins with the training"):
        Regularization("L2(0.1)").stopped


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it itself
def test_a_compiled_module_is_regularized_within() -> None:
    net = host(compile=True, compile__backend="eager").fit(X, Y)
    assert same(net.module_._orig_mod, loop()[0])


def test_without_skorch_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['skorch'] = None; import goodfit.adapters.skorch"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr.strip().splitlines()
    assert told[-1].endswith('goodfit.adapters.skorch needs skorch, which is not installed; pip install "goodfit[skorch]".')
