"""The same weights in other people's loops, and early stopping against the loop that everybody writes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import goodfit as gf

DRAW = torch.Generator().manual_seed(5)
X = torch.randn(32, 3, generator=DRAW)
Y = torch.randn(32, 1, generator=DRAW)
COCKTAIL = (gf.L2(0.01), gf.L1(1e-3), gf.WeightDecay(0.05), gf.Dropout(0.3), gf.BatchNorm())
EPOCHS = 3


@pytest.fixture(autouse=True)
def single() -> Any:
    """Hosts move data in single precision."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))


def plain_loop(*cocktail: Any) -> nn.Module:
    model = net()
    run = gf.Run(gf.Cocktail(*cocktail), model, example=X[:8], seed=4)
    optimizer = optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    run.attach(optimizer)
    model.train()
    for _ in range(EPOCHS):
        for x, y in DataLoader(TensorDataset(X, Y), batch_size=8):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
    return run.finish()


def in_lightning(*cocktail: Any, folder: Any) -> nn.Module:
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return F.mse_loss(self.net(x), y)

        def configure_optimizers(self) -> optim.Optimizer:
            run = gf.Run(gf.Cocktail(*cocktail), self.net, example=X[:8], seed=4)
            optimizer = optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.0)
            run.attach(optimizer)
            return optimizer

    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Module()
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=8))
    return module.net


def in_hugging_face(*cocktail: Any, folder: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            outputs = self.net(x)
            return {"loss": F.mse_loss(outputs, labels), "logits": outputs}

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> None:
            return None

    model = Model()
    run = gf.Run(gf.Cocktail(*cocktail), model.net, example=X[:8], seed=4)
    optimizer = optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    run.attach(optimizer)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    Ordered(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    return model.net


LIGHTNING = (  # its own ways with torch, and its advice on worker processes
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
)
every_host = pytest.mark.parametrize(
    "host", [pytest.param(in_lightning, marks=LIGHTNING, id="Lightning"), pytest.param(in_hugging_face, id="Hugging Face")]
)


@every_host
def test_the_weights_are_those_of_the_plain_loop(host: Any, tmp_path: Any) -> None:
    ours = plain_loop(*COCKTAIL).state_dict()
    theirs = host(*COCKTAIL, folder=tmp_path).state_dict()
    unregularized = plain_loop().state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
        assert "weight" not in name or "batchnorm" in name or not torch.equal(value, unregularized[name]), name


@every_host
def test_what_the_hooks_cannot_serve_is_refused_with_the_call_to_add(host: Any, tmp_path: Any) -> None:
    with pytest.raises(
        gf.GoodfitError, match=r"InputNoise acts in run\.batch, which was not called; add: x, y = run\.batch\(x, y\)"
    ):
        host(gf.L2(0.1), gf.InputNoise(0.1), folder=tmp_path)


# Early stopping: the loop of every tutorial


def tutorial(model: nn.Module, scores: list[float], patience: int, min_delta: float) -> tuple[int, dict[str, Tensor]]:
    """Epochs run, and the weights kept."""
    best_val_loss, counter, best_state, epochs = float("inf"), 0, None, 0
    for epoch, val_loss in enumerate(scores):
        train_one_epoch(model, epoch)
        epochs += 1
        if val_loss < best_val_loss - min_delta:
            best_val_loss = val_loss
            counter = 0
            best_state = copy.deepcopy(model.state_dict())
        else:
            counter += 1
            if counter >= patience:
                break
    if best_state is not None:
        model.load_state_dict(best_state)
    return epochs, model.state_dict()


def train_one_epoch(model: nn.Module, epoch: int) -> None:
    """A model that knows how old it is."""
    with torch.no_grad():
        model.weight.fill_(epoch + 1.0)


def ours(model: nn.Module, scores: list[float], **numbers: Any) -> tuple[int, float]:
    stopping = gf.EarlyStopping(**numbers).watch(model)
    epochs = 0
    for epoch, val_loss in enumerate(scores):
        train_one_epoch(model, epoch)
        epochs += 1
        if stopping(val_loss):
            break
    return epochs, stopping.restore().weight.item()


# multiples of 1/1024, of which differences are exact: a - v > delta and v < a - delta may round apart
SCORES = st.lists(st.integers(-10240, 10240).map(lambda n: n / 1024) | st.integers(-3, 3).map(float), min_size=1, max_size=25)


@settings(max_examples=200, deadline=None)
@given(SCORES, st.integers(1, 5), st.sampled_from([0.0, 0.25, 1.0]))
def test_it_stops_where_the_tutorial_stops(scores: list[float], patience: int, min_delta: float) -> None:
    """Without a min_delta the kept weights agree too; with one, ours are those of the lowest score, theirs may be worse."""
    epochs, weight = ours(nn.Linear(1, 1, bias=False), scores, patience=patience, min_delta=min_delta)
    expected, kept = tutorial(nn.Linear(1, 1, bias=False), scores, patience, min_delta)
    assert epochs == expected
    ran = scores[:epochs]
    assert weight == ran.index(min(ran)) + 1
    if min_delta == 0:
        assert weight == kept["weight"].item()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-5, 5) | st.sampled_from([math.nan, math.inf, -math.inf]), min_size=1, max_size=20), st.integers(1, 4)
)
def test_a_score_that_is_no_number_neither_improves_nor_poisons(scores: list[float], patience: int) -> None:
    epochs, weight = ours(nn.Linear(1, 1, bias=False), scores, patience=patience)
    best, bad, expected, kept = math.inf, 0, 0, None
    for expected, score in enumerate(scores, start=1):
        if math.isfinite(score) and score < best:
            best, bad, kept = score, 0, expected
        else:
            bad += 1
        if bad == patience:
            break
    assert epochs == expected
    assert weight == (expected if kept is None else kept)


@settings(max_examples=100, deadline=None)
@given(SCORES, st.integers(1, 5))
def test_a_score_to_maximize_is_its_mirror(scores: list[float], patience: int) -> None:
    model = nn.Linear(1, 1, bias=False)
    mirrored = ours(copy.deepcopy(model), [-s for s in scores], patience=patience, mode="max")
    assert mirrored == ours(model, scores, patience=patience)


def test_a_slow_drift_below_min_delta_stops_and_loses_nothing() -> None:
    """The anchor stays at 1.0, so three checks of drift are three without improvement; kept is the lowest, the last."""
    assert ours(nn.Linear(1, 1, bias=False), [1.0, 0.95, 0.9, 0.85, 0.8], patience=3, min_delta=0.2) == (4, 4.0)


def test_buffers_come_back_with_the_weights() -> None:
    model = nn.BatchNorm1d(1)
    stopping = gf.EarlyStopping(1).watch(model)
    model(torch.tensor([[1.0], [3.0]]))
    assert not stopping(1.0)
    model(torch.tensor([[5.0], [9.0]]))
    assert stopping(2.0)
    assert stopping.best == 1.0
    stopping.restore()
    assert model.running_mean.item() == pytest.approx(0.2)
    assert model.num_batches_tracked == 1
