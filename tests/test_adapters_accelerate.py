"""accelerate: the weights and the stop of the plain loop, in accumulation, in two processes, and where it is resumed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedType
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import goodfit as gf
from goodfit.adapters.accelerate import Regularization
from plain import AVERAGED, BEST, COCKTAIL, EPOCHS, REST, SEED, STOP, X, Y, adam, loader, net, patience, plain, same, valid_loss
from together import in_two_processes


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Hosts move data in single precision; an accelerator is one for all that come after it."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)
    forget()


def forget() -> None:
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()


class Killed(Exception):
    pass


def host(
    cocktail: Any = COCKTAIL,
    *,
    epochs: int = EPOCHS,
    every: int = 1,
    parts: int = 1,
    by_run: bool = False,
    saved: Path | None = None,
    killed_in: int | None = None,
    resumed_from: int = 0,
    score: Any = valid_loss,
) -> tuple[nn.Module, Regularization, list[float]]:
    """What a user writes."""
    forget()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
    bare = net()
    run = Regularization(cocktail, bare, accelerator, example=X[:8], loss=F.mse_loss, seed=SEED)
    model, optimizer, batches = accelerator.prepare(bare, adam(bare.parameters()), loader())
    run.attach(optimizer)
    if resumed_from:
        accelerator.load_state(str(saved / str(resumed_from)))
    scores = []
    for epoch in range(resumed_from + 1, epochs + 1):
        if run.stopped:
            break
        model.train()
        for i, (x, y) in enumerate(batches):
            if epoch == killed_in and i == 2:
                raise Killed
            with accelerator.accumulate(model):
                loss = run.loss(*run.batch(x, y), through=model) if by_run else F.mse_loss(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        if epoch % every == 0:
            with run.view(batches):
                scores.append(score(model))
                go_on = run.epoch(scores[-1])
        else:
            go_on = True
        if saved is not None:
            accelerator.save_state(str(saved / str(epoch)))
        if not go_on:
            break
    run.finish(batches)
    return bare, run, scores


def test_the_weights_and_the_stop_are_those_of_the_plain_loop() -> None:
    model, run, scores = plain()
    theirs, their_run, their_scores = host()
    assert their_scores == scores
    assert len(scores) == STOP
    assert their_run.stopped == their_run.run.stopped == run.stopped
    assert same(model, theirs)
    assert valid_loss(theirs) == scores[BEST - 1]


def test_batch_and_loss_regularizers_act_in_the_loop() -> None:
    cocktail = gf.Cocktail(gf.InputNoise(0.5), gf.Flooding(0.3), *COCKTAIL)
    model, _, scores = plain(cocktail, by_run=True)
    theirs, _, their_scores = host(cocktail, by_run=True)
    assert their_scores == scores
    assert same(model, theirs)
    assert not same(model, plain()[0])


def test_a_second_gradient_is_had_by_run_loss_and_refused_by_name_without() -> None:
    cocktail = (gf.SAM(0.1), gf.Dropout(0.3), gf.BatchNorm())
    assert same(plain(cocktail, epochs=2, by_run=True)[0], host(cocktail, epochs=2, by_run=True)[0])
    with pytest.raises(gf.GoodfitError, match="SAM needs a second gradient"):
        host(cocktail, epochs=1)
    with pytest.raises(
        gf.GoodfitError, match=r"InputNoise acts in run.batch, which was not called; add: x, y = run.batch\(x, y\)"
    ):
        host(gf.InputNoise(0.1), epochs=1)


@pytest.mark.filterwarnings("ignore:The gradients of several batches")
def test_accumulated_gradients_are_one_step() -> None:
    model, run, scores = plain(parts=2)
    theirs, their_run, their_scores = host(parts=2)
    assert their_scores == scores
    assert int(their_run.state_dict()["step"]) == int(run.state_dict()["step"]) == 2 * len(scores)
    assert same(model, theirs)


def test_validation_every_second_epoch_of_a_score_to_maximize() -> None:
    cocktail = (*REST, gf.EarlyStopping(4, mode="max"), gf.EarlyStopping(2, mode="max"))
    settings = {"every": 2, "score": lambda model: -valid_loss(model)}
    model, run, scores = plain(cocktail, **settings)
    theirs, their_run, their_scores = host(cocktail, **settings)
    assert their_scores == scores
    assert their_run.stopped == run.stopped != ""
    assert same(model, theirs)


def test_what_is_scored_and_kept_is_averaged_and_what_trains_is_not() -> None:
    model, _, scores = plain(AVERAGED)
    theirs, _, their_scores = host(AVERAGED)
    assert their_scores == scores
    assert same(model, theirs)


@pytest.mark.parametrize("epoch", [2, 4, 6, 8])
def test_killed_and_resumed_is_as_if_it_had_run_through(epoch: int, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        host(saved=tmp_path, killed_in=epoch)
    theirs, run, scores = host(saved=tmp_path, resumed_from=epoch - 1)
    model, whole, whole_scores = plain()
    assert scores == whole_scores[epoch - 1 :]
    assert run.stopped == whole.stopped
    assert same(model, theirs)


def test_what_had_stopped_stays_stopped_and_goes_on_with_another_patience(tmp_path: Path) -> None:
    first, run, _ = host(saved=tmp_path)
    again, their_run, scores = host(saved=tmp_path, resumed_from=STOP)
    assert (their_run.stopped, scores) == (run.stopped, [])
    assert same(again, first)
    theirs, _, scores = host(patience(5), saved=tmp_path, resumed_from=STOP)
    assert len(scores) == 2
    assert same(theirs, plain(patience(5))[0])


def test_the_new_patience_wins_on_resume(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        host(saved=tmp_path, killed_in=8)
    longer = patience(5)
    theirs, _, scores = host(longer, saved=tmp_path, resumed_from=7)
    assert len(scores) + 7 == STOP + 2
    assert same(theirs, plain(longer)[0])


# Two processes


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8, dtype=torch.float64), nn.Tanh(), nn.Linear(8, 1, dtype=torch.float64))


def process(rank: int, folder: str) -> None:
    """Each trains on half of every batch and validates on its own half of the rows, which the other does not see."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": "0"}  # as its launcher does
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    model = small()
    run = Regularization("L2(0.01), L1(0.001), WeightDecay(0.05), EarlyStopping(2)", model, accelerator, loss=F.mse_loss)
    data = DataLoader(TensorDataset(X.double(), Y.double()), batch_size=16)
    wrapped, optimizer, batches = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    run.attach(optimizer)
    scores = [[3.0, 1.0], [2.0, 1.0], [1.0, 2.5], [4.0, 0.0], [0.0, 9.0], [0.0, 0.0]]  # by epoch and rank
    ran = 0
    for by_rank in scores:
        ran += 1
        for x, y in batches:
            optimizer.zero_grad()
            accelerator.backward(run.loss(x, y, through=wrapped))
            optimizer.step()
        if not run.epoch(by_rank[rank]):
            break
    run.finish()
    torch.save({"ran": ran, "rank": accelerator.process_index, **model.state_dict()}, f"{folder}/{rank}.pt")


def alone_for(epochs: int) -> nn.Module:
    model = small()
    run = gf.Run("L2(0.01), L1(0.001), WeightDecay(0.05)", model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    for _ in range(epochs):
        for x, y in DataLoader(TensorDataset(X.double(), Y.double()), batch_size=16):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    return model


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed", "ignore::FutureWarning")
def test_two_processes_stop_together_on_the_mean_of_their_scores(tmp_path: Path) -> None:
    """Means 2, 1.5, 1.75, 2: the best is the second, two worse ones end it at the fourth; alone, neither rank stops there."""
    in_two_processes(process, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert (first.pop("rank"), second.pop("rank")) == (0, 1)
    assert first.pop("ran") == second.pop("ran") == 4
    for name, weight in alone_for(2).state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, rtol=1e-12, atol=1e-14)


# What stands in the way


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_shards_of_weights_are_refused(kind: DistributedType) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = kind
    with pytest.raises(gf.GoodfitError, match=f"{kind.value} shards the weights, of which a regularizer needs the whole"):
        Regularization("L2(0.1)", net(), accelerator)


def test_arguments_of_another_kind_or_order_are_refused() -> None:
    accelerator, model = Accelerator(cpu=True), net()
    for given, got in (
        ((accelerator, model), "got a Accelerator and a Sequential"),
        (("model", accelerator), "got a str and a Accelerator"),
        ((model, None), "got a Sequential and a NoneType"),
    ):
        with pytest.raises(gf.GoodfitError, match=f"a torch.nn.Module and an Accelerator, in this order, {got}"):
            Regularization("L2(0.1)", *given)
    with pytest.raises(gf.GoodfitError, match="A cocktail is written"):
        Regularization(3, model, accelerator)  # type: ignore[arg-type]


def test_a_second_regularization_may_only_stop() -> None:
    accelerator, model = Accelerator(cpu=True), net()
    first = Regularization(REST, model, accelerator, example=X[:8], seed=SEED)
    layers = [name for name, _ in model.named_modules()]
    for more in ("L2(0.1)", "EarlyStopping(3), Dropout(0.1)"):
        with pytest.raises(gf.GoodfitError, match=r"A second Regularization may only stop the training, got (L2|Dropout)"):
            Regularization(more, model, accelerator, example=X[:8])
    assert [name for name, _ in model.named_modules()] == layers
    stopping = Regularization("EarlyStopping(3)", model, accelerator)
    assert int(stopping.state_dict()["seed"]) == int(first.state_dict()["seed"]) == SEED
    Regularization("L2(0.1)", net(), accelerator)
    averaged = net()
    Regularization(gf.EMA(0.8, warmup=False), averaged, accelerator)
    with pytest.raises(gf.GoodfitError, match=r"EMA\(0\.8, warmup=False\) averages weights, of which a second"):
        Regularization("EarlyStopping(3)", averaged, accelerator)


def test_two_regularizations_train_and_are_resumed_as_one_does(tmp_path: Path) -> None:
    """The second stops by a score of its own; masks of dropout are those of the run that has it."""

    def train(resumed: bool) -> tuple[nn.Module, Regularization]:
        forget()
        accelerator, model = Accelerator(cpu=True), net()
        first = Regularization(COCKTAIL, model, accelerator, example=X[:8], seed=SEED)
        second = Regularization("EarlyStopping(1, restore=False)", model, accelerator)
        wrapped, optimizer, batches = accelerator.prepare(model, adam(model.parameters()), loader())
        for run in (first, second):
            run.attach(optimizer)
        if resumed:
            accelerator.load_state(str(tmp_path))
        for epoch in range(3 if resumed else 1, 6):
            wrapped.train()
            for x, y in batches:
                accelerator.backward(F.mse_loss(wrapped(x), y))
                optimizer.step()
                optimizer.zero_grad()
            go_on = [first.epoch(valid_loss(model)), second.epoch(abs(epoch - 3))]
            if epoch == 2 and not resumed:
                accelerator.save_state(str(tmp_path))
            if not all(go_on):
                break
        return first.finish(), second

    for resumed in (False, True):
        model, second = train(resumed)
        assert same(model, plain(epochs=4)[0])
        assert second.stopped == "no improvement in 1 check: best 0 at check 3, 1 at check 4"


def test_without_accelerate_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['accelerate'] = None; import goodfit.adapters.accelerate"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr.strip().splitlines()
    assert told[-1].endswith('needs accelerate, which is not installed; pip install "goodfit[accelerate]".')


def test_an_optimizer_made_before_the_run_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    model = net()
    optimizer = adam(model.parameters())
    run = Regularization("BatchNorm()", model, accelerator, example=X[:8])
    model, optimizer = accelerator.prepare(model, optimizer)
    with pytest.raises(gf.GoodfitError, match="make it after the run"):
        run.attach(optimizer)


def test_fused_unscaling_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    model = net()
    run = Regularization("L2(0.1)", model, accelerator)
    optimizer = accelerator.prepare(adam(model.parameters()))
    run.attach(optimizer)
    F.mse_loss(model(X), Y).backward()
    optimizer.optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(gf.GoodfitError, match="unscales fp16 gradients inside its step"):
        optimizer.step()
