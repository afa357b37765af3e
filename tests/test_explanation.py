"""Who is penalised is told as it is done."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

import goodfit as gf


class Odd(nn.Module):
    """A module of nobody's, with names that mislead."""

    def __init__(self) -> None:
        super().__init__()
        self.debias_proj = nn.Linear(2, 3)
        self.norm_like = nn.Parameter(torch.ones(3, 3))
        self.norm = nn.BatchNorm1d(3)


MIX = "L1(0.5), WeightDecay(0.1, where=everything), GroupLasso(0.25, where=named('debias_proj.*')), L2(0), BatchNorm()"


def test_the_table_says_what_the_steps_do(capsys: pytest.CaptureFixture[str]) -> None:
    model = Odd()
    told = gf.explain(MIX, model)
    by = {line.name: {text.partition("(")[0] for text, _ in line.penalties} for line in told.lines}
    assert by == {
        "debias_proj.weight": {"L1", "WeightDecay", "GroupLasso"},
        "debias_proj.bias": {"WeightDecay", "GroupLasso"},
        "norm_like": {"L1", "WeightDecay"},
        "norm.weight": {"WeightDecay"},
        "norm.bias": {"WeightDecay"},
    }
    done: dict[str, set[str]] = {name: set() for name in by}
    for one in gf.parse(MIX)[:3]:
        model = Odd()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
                p.grad = torch.zeros_like(p)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        gf.Run(one, model).attach(optimizer)
        optimizer.step()
        for name, p in model.named_parameters():
            done[name] |= {type(one).__name__} if (p != 1).any() else set()
    assert done == by
    printed = capsys.readouterr().out
    assert "by its shape: Odd is not known" in printed
    assert "L2(0) is off" in printed
    assert "BatchNorm(0.1) acts on the model's structure" in printed


def test_how_much_is_what_the_objective_gains() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    cocktail = gf.Cocktail(gf.L2(0.3), gf.L1(0.2), gf.ElasticNet(0.1), gf.GroupLasso(0.4), gf.WeightDecay(0.1))
    told = gf.explain(cocktail, model)
    total = sum(now or 0.0 for line in told.lines for _, now in line.penalties)
    assert total == pytest.approx(gf.Run(cocktail, model).penalty(), rel=1e-12)
    assert total > 0
    assert repr(told) == "Explanation(2 of 4 parameters penalised)"


def test_frozen_and_tied_weights_are_told_once() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False), nn.Linear(4, 2).requires_grad_(False))
    model[1].weight = model[0].weight
    lines = {line.name: line for line in gf.explain(gf.L1(0.1), model).lines}
    assert list(lines) == ["0.weight", "2.weight", "2.bias"]
    assert (lines["0.weight"].role, lines["0.weight"].by) == ("embedding", "–")
    assert (lines["2.weight"].note, lines["2.weight"].by) == ("frozen", "–")


def test_the_model_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    before = str(model)
    gf.explain("Dropout(0.5), BatchNorm(), EarlyStopping(3)", model)
    assert str(model) == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_weights_without_a_group_are_not_said_to_have_one() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 8), "attention": nn.MultiheadAttention(8, 2)})
    told = gf.explain(gf.GroupLasso(0.1, groups=gf.groups.heads()), model)
    assert {line.name for line in told.lines if line.penalties} == {"attention.in_proj_weight", "attention.out_proj.weight"}
    with pytest.raises(gf.GoodfitError, match="in this order"):
        gf.explain("L1(0.1)", "model")


def test_frozen_weights_are_not_in_the_penalty_of_a_run() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    assert gf.Run(gf.L1(1.0), model).penalty() == pytest.approx(float(model[1].weight.detach().abs().sum()), rel=1e-14)
