"""Numbers that are not finite in a training step: named at once, and never in the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import goodfit as gf
from goodfit.stop import Reason

ROWS, BATCH = 24, 6
VALID = (torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(8, 2), torch.linspace(0, 1, 8, dtype=torch.float64)[:, None])


def data(spoil: Callable[[Tensor, Tensor], Any] | None = None) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, 2 * ROWS, dtype=torch.float64).reshape(ROWS, 2)
    y = x[:, :1].sin()
    if spoil is not None:
        spoil(x, y)
    return x, y


class Logarithm(nn.Module):
    """log(a + x): nan below −a, and of slope infinity at −a."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = a

    def forward(self, x: Tensor) -> Tensor:
        return (self.a + x).log()


class Root(nn.Module):
    """x, plus the root of a zero, which has no finite slope."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x - x.detach()).abs().sqrt()


def net(*inside: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), *inside, nn.BatchNorm1d(3), nn.Linear(3, 1)).double()


def fit(model: nn.Module, train: Any, cocktail: str = "EarlyStopping(20)", **settings: Any) -> gf.Fit:
    loader = DataLoader(TensorDataset(*train), BATCH)  # in the order of the rows
    given: dict[str, Any] = {"epochs": 4, "optimizer": lambda p: SGD(p, lr=0.05), "loss": F.mse_loss} | settings
    return gf.fit(model, loader, VALID, cocktail, **given)


def set_to(value: float, *where: int) -> Callable[[Tensor, Tensor], Any]:
    def spoil(x: Tensor, y: Tensor) -> None:
        x[list(where), 1] = value

    return spoil


def poisoned(name: str) -> nn.Module:
    model = net()
    with torch.no_grad():
        model.get_submodule(name.rpartition(".")[0])._parameters.get(name[2:], model.state_dict()[name])[0] = math.inf
    return model


@pytest.mark.parametrize(
    ("model", "train", "told"),
    [
        (net, data(set_to(math.nan, 8, 10)), "step 2 is not finite: x has nan in 2 of its rows, the first of them row 2"),
        (
            net,
            data(lambda x, y: y[23].fill_(-math.inf)),
            "step 4 is not finite: y has inf in 1 of its rows, the first of them row 5",
        ),
        (lambda: poisoned("2.weight"), data(), "step 1 is not finite: the weight '2.weight' has inf"),
        (lambda: poisoned("1.running_var"), data(), "step 1 is not finite: the buffer '1.running_var' has inf"),
        (
            lambda: net(nn.Tanh(), Logarithm(0.0)),
            data(),
            "step 1 is not finite: the layer '2' (Logarithm) gives nan for an input that is finite",
        ),
        (
            lambda: net(Root()),
            data(),
            "step 1 is not finite: the gradient of '0.bias' has nan, and those of 1 weights before it",
        ),
    ],
    ids=["input", "target", "weight", "statistics", "layer", "gradient"],
)
@pytest.mark.parametrize("policy", ["stop", "raise"])
def test_the_first_number_that_is_not_finite_is_named_and_no_weight_has_one(
    model: Callable[[], nn.Module], train: Any, told: str, policy: str
) -> None:
    made = model()
    before = {name: t.clone() for name, t in made.state_dict().items()}
    with pytest.raises(gf.GoodfitError) as refused:  # before the first check there is nothing to give back
        fit(made, train, nonfinite=policy)
    assert str(refused.value).startswith(told)
    if told.startswith("step 1 "):
        assert [name for name, t in made.state_dict().items() if not torch.equal(t, before[name]) and "num_b" not in name] == []


def test_a_stop_gives_the_best_and_says_why() -> None:
    steps = iter(range(100))

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(outputs, y) * (math.nan if outputs.requires_grad and next(steps) == 9 else 1.0)

    found = fit(net(), data(), loss=loss)
    assert found.stopped == "step 10 is not finite: the loss is nan, of outputs that are finite; the step was not taken"
    assert (found.reason, len(found.history)) == (Reason.NONFINITE, 2)
    assert found.kept == min(found.history, key=lambda row: row["valid_loss"])


def test_steps_left_out_are_as_if_their_batches_were_not_there() -> None:
    spoiled = data(set_to(math.nan, *range(6, 12)))
    with pytest.warns(
        gf.GoodfitWarning, match=r"^step [25] is not finite: x has nan in 6 of its rows, .*; it is left out\.$"
    ) as told:
        found = fit(net(), spoiled, "L2(1e-2)", nonfinite="skip", epochs=2)
    assert len(told) == 2
    kept = [i for i in range(ROWS) if not 6 <= i < 12]
    without = fit(net(), tuple(t[kept] for t in spoiled), "L2(1e-2)", epochs=2)
    assert [row["valid_loss"] for row in found.history] == [row["valid_loss"] for row in without.history]
    assert found.history[-1]["step"] == 6
    for name, t in found.model.state_dict().items():
        assert torch.equal(t, without.model.state_dict()[name]) or name.endswith("num_batches_tracked")


def test_what_is_never_finite_ends_also_where_steps_are_left_out() -> None:
    with pytest.warns(gf.GoodfitWarning, match="left out"):
        found = fit(net(), data(lambda x, y: y.fill_(math.nan)), nonfinite="skip", epochs=20)
    assert found.stopped.startswith(
        "step 1 is not finite: y has nan in 6 of its rows, the first of them row 0, as 10 batches before it"
    )
    assert [math.isnan(row["train_loss"]) for row in found.history] == [True, True]


def test_a_rollback_goes_back_to_the_best_and_on() -> None:
    spoiled: list[int] = []

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        if outputs.requires_grad:
            spoiled.append(len(spoiled))
        return F.mse_loss(outputs, y) * (math.nan if outputs.requires_grad and len(spoiled) == 7 else 1.0)

    def seen(model: nn.Module, args: Any) -> None:
        if model.training:
            weights.append(model[0].weight.detach().clone())

    model, weights = net(), []
    model.register_forward_pre_hook(seen)
    with pytest.warns(gf.GoodfitWarning, match="left out, and the model goes back to its best weights so far"):
        found = fit(model, data(), "EarlyStopping(20)", nonfinite="rollback", loss=loss, optimizer=lambda p: SGD(p, 0.05, 0.9))
    assert (len(found.history), found.stopped) == (4, "")
    assert torch.equal(weights[8], weights[4])  # behind the first check; the seventh forward was run twice, to name what it has
    assert not torch.equal(weights[6], weights[4])


def test_without_a_check_there_is_nothing_to_go_back_to() -> None:
    with pytest.warns(gf.GoodfitWarning, match=r"^step 2 .*; it is left out, before any check to go back to\.$"):
        fit(net(), data(set_to(math.nan, 6)), nonfinite="rollback", epochs=1)


def test_of_several_batches_in_a_step_the_one_that_is_not_finite_is_named() -> None:
    spoiled = data(set_to(math.nan, 6))
    with pytest.warns(gf.GoodfitWarning, match=r"^step 1 is not finite: x has nan in 1 of its rows, the first of them row 0"):
        fit(net(), spoiled, nonfinite="skip", compute=gf.Compute(accumulate=4), epochs=1)


def test_a_rollback_needs_what_it_goes_back_to(tmp_path: Any) -> None:
    for cocktail, keep in (
        ("L2(1e-3)", None),
        ("EarlyStopping(3, restore=False)", None),
        ("EarlyStopping(3)", tmp_path / "kept"),
    ):
        with pytest.raises(gf.GoodfitError, match="goes back to the best weights, which an EarlyStopping that restores keeps"):
            fit(net(), data(), cocktail, nonfinite="rollback", keep=keep)
    with pytest.raises(
        gf.GoodfitError, match="nonfinite must be 'stop', 'raise', 'skip' or 'rollback', got nonfinite='ignore'"
    ):
        fit(net(), data(), nonfinite="ignore")


def test_large_numbers_are_finite() -> None:
    big = 1e150
    x, y = data()
    found = fit(
        nn.Sequential(nn.Linear(2, 1)).double(), (x, y * big), optimizer=lambda p: SGD(p, lr=1e-3), epochs=1, loss=F.l1_loss
    )
    assert found.stopped == ""
