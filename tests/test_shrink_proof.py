"""What shrinking refuses and why, that it then leaves the model untouched, and how it compares outputs."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import goodfit as gf
from goodfit import GoodfitError
from goodfit.surgery.proof import largest_error, shuffled
from nets import Net
from shrinking import ROWS, removed, shrunk, zero


def test_nothing_zero_is_no_error() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    parameters = list(model.parameters())
    result = gf.shrink(model, ROWS)
    assert result.removed == result.kept == ()
    assert "0 removed" in str(result)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_modes_and_the_random_generator_are_put_back() -> None:
    model = nn.Sequential(zero(nn.Linear(4, 6), 2), nn.Dropout(0.5), nn.Linear(6, 2)).train()
    model[1].eval()
    state = torch.get_rng_state()
    gf.shrink(model, ROWS)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert torch.equal(state, torch.get_rng_state())
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()


class Fixed(nn.Module):
    """A model whose code fixes a size in a way that no run shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = zero(nn.Linear(4, 6), 2), zero(nn.Linear(6, 6), 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        assert h.shape[1] == 6
        return self.c(F.relu(self.b(h)))


def test_what_the_code_fixes_stays_and_the_rest_goes() -> None:
    model = Fixed()
    result = shrunk(model, ROWS)
    assert removed(result) == {("b", "units"): 1}
    assert result.kept == (("a.weight", 1, "fails the proof: the code of the model fixes its size"),)


def test_a_refusal_leaves_the_model_untouched() -> None:
    model = Fixed()
    model.b = nn.Linear(6, 6)
    held = {name: (p, p.clone(), p._version) for name, p in model.named_parameters()}
    with pytest.raises(GoodfitError, match=r"none can be removed: 1 in a.weight: fails the proof"):
        gf.shrink(model, ROWS)
    for name, p in model.named_parameters():
        same, value, version = held[name]
        assert p is same
        assert torch.equal(p, value)
        assert p._version == version


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.f, self.o = nn.Embedding(9, 6), zero(nn.Linear(6, 6), 1), nn.Linear(6, 9)
        self.o.weight = self.e.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.f(self.e(x))))


def shared() -> nn.Module:
    layer = zero(nn.Linear(4, 4), 1)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(4, 2))


def sparse() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.eye(4).to_sparse())
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "shared": (shared, ROWS, "is shared: 0.weight = 2.weight"),
    "tied": (Tied, torch.tensor([[1, 2]]), "is shared: e.weight = o.weight"),
    "layer norm": (lambda: nn.Sequential(zero(nn.Linear(4, 6), 1), nn.LayerNorm(6), nn.Linear(6, 2)), ROWS, "normalized"),
    "group norm": (lambda: nn.Sequential(zero(nn.Linear(4, 6), 1), nn.GroupNorm(2, 6), nn.Linear(6, 2)), ROWS, "normalized"),
    "no rule": (
        lambda: Net(lambda m, x: m.b(m.a(x).cumprod(1)), a=zero(nn.Linear(4, 4), 1), b=nn.Linear(4, 2)),
        ROWS,
        "no rule",
    ),
    "example": (lambda: nn.Sequential(nn.Linear(4, 2)), torch.ones(2, 3), "must run on the example"),
    "leaf": (lambda: nn.Linear(4, 2), ROWS, "single Linear"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)), ROWS, "is lazy"),
    "compiled": (lambda: torch.compile(nn.Sequential(nn.Linear(4, 2)), backend="eager"), ROWS, "compiled"),
    "compiled within": (lambda: nn.Sequential(torch.compile(nn.Linear(4, 2), backend="eager")), ROWS, "convert afterwards"),
    "sparse": (sparse, ROWS, "dense"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case: str) -> None:
    build, example, reason = REFUSED[case]
    model = build()
    parameters = list(model.parameters())
    with pytest.raises(GoodfitError, match=reason) as caught:
        gf.shrink(model, example)
    assert "\n" not in str(caught.value)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_parametrized_weights_stay() -> None:
    normed = weight_norm(nn.Linear(4, 6))
    normed.parametrizations.weight.original0.detach()[1] = 0
    model = nn.Sequential(normed, nn.ReLU(), zero(nn.Linear(6, 6), 1), nn.ReLU(), nn.Linear(6, 2))
    assert removed(shrunk(model, ROWS)) == {("2", "units"): 1}


def test_a_shrunk_model_copies_pickles_and_keeps_its_keys() -> None:
    model = nn.Sequential(zero(nn.Linear(4, 6), 2), nn.ReLU(), nn.Linear(6, 2))
    model[0].weight.detach()[:, 1] = 0
    keys = list(model.state_dict())
    gf.shrink(model, ROWS)
    assert [k for k in model.state_dict() if k != "0.take.indices"] == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ROWS), model(ROWS))


def test_outputs_are_compared_relative_to_the_largest() -> None:
    a = torch.tensor([1.0, -4.0, float("nan"), float("inf")])
    assert largest_error([a], [a.clone()]) == (0.0, 0.0)
    over, error = largest_error([a], [a + torch.tensor([4e-10, 0, 0, 0])])
    assert error == pytest.approx(1e-10, rel=1e-6)
    assert over == pytest.approx(1, rel=1e-6)
    for other in (torch.zeros(4), a[:3], torch.where(a.isnan(), 0.0, a), -a):
        assert largest_error([a], [other])[0] > 1
    assert largest_error([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == (math.inf, math.inf)
    assert largest_error([torch.zeros(2)], [torch.full((2,), 1e-300)])[0] == math.inf


def test_another_order_has_the_same_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    example = {"x": (torch.arange(6.0), torch.arange(3)), "flag": True, "ones": torch.ones(3)}
    other = shuffled(example, generator)
    assert not torch.equal(other["x"][0], example["x"][0])
    assert torch.equal(other["x"][0].sort().values, example["x"][0])
    assert torch.equal(other["x"][1], example["x"][1])
    assert other["flag"] is True
    assert not torch.equal(other["ones"], example["ones"])


def test_a_nan_from_the_rest_of_the_model_is_no_excuse() -> None:
    """0 · NaN is NaN: a zero column that reads NaN is no zero."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    model[0].weight.detach()[3, 0] = float("nan")
    model[2].weight.detach()[:, 3] = 0
    assert not gf.shrink(model, ROWS).removed
    assert model(ROWS).isnan().all()
