"""Groups follow the types of layers, penalty factors weigh single weights, and a max-norm keeps units within a ball."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn, optim

import goodfit as gf
from goodfit.groups import Groups, Layout
from test_lasso import half_mse, problem


def layout(groups: Groups, model: nn.Module, where: gf.where.Where = gf.where.kernels) -> Layout:
    weights = dict(model.named_parameters())
    return groups.layout({n: weights[n].detach() for n in where.select(model)}, model)


def members(laid: Layout, shapes: dict[str, torch.Size]) -> list[list[tuple[str, int]]]:
    """Each group as the flat places of its weights."""
    found: list[list[tuple[str, int]]] = [[] for _ in range(laid.count)]
    for name, ids in laid.ids.items():
        for place, group in enumerate(ids.expand(shapes[name]).flatten().tolist()):
            found[group].append((name, place))
    return found


UNITS = [
    (nn.Linear(3, 2), [[0, 0, 0], [1, 1, 1]]),
    (nn.Conv1d(2, 2, 1), [[[0], [0]], [[1], [1]]]),
    (nn.Conv1d(4, 2, 1, groups=2), [[[0], [0]], [[1], [1]]]),
    (nn.ConvTranspose1d(2, 3, 1), [[[0], [1], [2]], [[0], [1], [2]]]),
    (nn.ConvTranspose1d(4, 4, 1, groups=2), [[[0], [1]], [[0], [1]], [[2], [3]], [[2], [3]]]),
]
INPUTS = [
    (nn.Linear(3, 2), [[0, 1, 2], [0, 1, 2]]),
    (nn.Conv2d(2, 2, 1), [[[[0]], [[1]]], [[[0]], [[1]]]]),
    (nn.Conv1d(4, 2, 1, groups=2), [[[0], [1]], [[2], [3]]]),
    (nn.ConvTranspose1d(2, 3, 1), [[[0], [0], [0]], [[1], [1], [1]]]),
    (nn.ConvTranspose1d(4, 4, 1, groups=2), [[[0], [0]], [[1], [1]], [[2], [2]], [[3], [3]]]),
]


@pytest.mark.parametrize(
    ("groups", "layer", "ids"), [(gf.groups.units, *u) for u in UNITS] + [(gf.groups.inputs, *i) for i in INPUTS]
)
def test_the_groups_of_a_layer(groups: Groups, layer: nn.Module, ids: list) -> None:
    found = layout(groups, layer).ids["weight"].expand_as(layer.weight)
    assert found.tolist() == ids


@pytest.mark.parametrize(
    ("layer", "example", "axis"),
    [
        (nn.ConvTranspose2d(4, 6, 3, groups=2), torch.randn(1, 4, 5, 5), 1),
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(1, 4, 5, 5), 1),
        (nn.Linear(4, 6), torch.randn(1, 4), 1),
    ],
)
def test_a_unit_without_weights_gives_its_bias_and_an_input_without_weights_is_not_read(
    layer: nn.Module, example: Tensor, axis: int
) -> None:
    """What the ids say, held against what the layer does."""
    layer, example = layer.double(), example.double()
    start = layer.weight.detach().clone()
    for groups, effect in ((gf.groups.units, "unit"), (gf.groups.inputs, "input")):
        ids = layout(groups, layer).ids["weight"].expand_as(layer.weight)
        for group in range(int(ids.max()) + 1):
            with torch.no_grad():
                layer.weight.copy_(torch.where(ids == group, 0, start))
            if effect == "unit":
                assert torch.allclose(layer(example).select(axis, group), layer.bias[group])
                assert not torch.allclose(layer(example).select(axis, group - 1), layer.bias[group - 1])
            else:
                other = example.clone()
                other.select(axis, group).add_(1)
                assert torch.equal(layer(other), layer(example))


def test_a_hidden_unit_of_an_lstm_holds_its_gates() -> None:
    model = nn.LSTM(3, 2, num_layers=2)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    groups = members(layout(gf.groups.units, model), shapes)
    assert len(groups) == 4  # two units in each of two layers
    assert {name for name, _ in groups[0]} == {"weight_ih_l0", "weight_hh_l0"}
    assert len(groups[0]) == 4 * 3 + 4 * 2


def test_heads_hold_rows_of_the_projections_in_and_columns_of_the_one_out() -> None:
    model = nn.MultiheadAttention(6, 3)
    laid = layout(gf.groups.heads(), model)
    assert laid.count == 3
    rows = laid.ids["in_proj_weight"].flatten()
    assert rows.tolist() == [0, 0, 1, 1, 2, 2] * 3
    assert laid.ids["out_proj.weight"].flatten().tolist() == [0, 0, 1, 1, 2, 2]
    x = torch.randn(4, 2, 6)
    with torch.no_grad():
        model.in_proj_weight.mul_(laid.ids["in_proj_weight"] != 1)
        model.out_proj.weight.mul_(laid.ids["out_proj.weight"] != 1)
        before = model(x, x, x)[0]
        model.in_proj_weight[2:4] += 1  # the query of a head that is not read changes nothing
        torch.testing.assert_close(model(x, x, x)[0], before)


def test_heads_of_layers_of_ones_own() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.o_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    model = nn.ModuleList([Attention(), Attention()])
    groups = gf.groups.heads(3, rows=gf.where.named("*.[qk]_proj.weight"), columns=gf.where.named("*.o_proj.weight"))
    laid = layout(groups, model)
    assert laid.count == 6
    assert laid.ids["1.q_proj.weight"].flatten().tolist() == [3, 3, 4, 4, 5, 5]
    assert laid.ids["1.o_proj.weight"].shape == (1, 6)
    assert gf.parse(repr(gf.GroupLasso(0.1, groups=groups)))[0] == gf.GroupLasso(0.1, groups=groups)


def test_a_gpt2_layer_has_its_units_on_axis_1() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(nf=3, nx=2)
    assert layout(gf.groups.units, layer).ids["weight"].shape == (1, 3)
    assert layout(gf.groups.inputs, layer).ids["weight"].shape == (2, 1)


def test_texts_of_groups_and_factors_read_back() -> None:
    for text in (
        "GroupLasso(0.1, groups=inputs)",
        "GroupLasso(0.1, groups=custom({'0.weight': [[0], [1]]}))",
        "MaxNorm(2.0, groups=heads())",
        "L1(0.1, factors=adaptive(0.5))",
        "ElasticNet(0.1, factors=given({'0.weight': [1.0, inf]}))",
    ):
        cocktail = gf.parse(text)
        assert gf.parse(repr(cocktail)) == gf.parse(str(cocktail)) == cocktail
        assert hash(cocktail)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: gf.groups.custom({"w": [0.5]}), "whole numbers"),
        (lambda: gf.groups.custom({"w": [-1]}), "whole numbers"),
        (lambda: gf.groups.custom({"w": []}), "whole numbers"),
        (lambda: gf.groups.heads(0, rows=gf.where.kernels), "count"),
        (lambda: gf.groups.heads(2), "selectors"),
        (lambda: gf.factors.given({"w": [-1.0]}), ">= 0"),
        (lambda: gf.factors.given({"w": "x"}), ">= 0"),
        (lambda: gf.factors.given(3), "by name"),
        (lambda: gf.groups.custom([1, 2]), "by name"),
        (lambda: gf.groups.custom({"w": [0, 10**11]}), "whole numbers from 0"),
        (lambda: gf.factors.adaptive(0), "gamma"),
        (lambda: gf.GroupLasso(0.1, groups="units"), "gf.groups"),
        (lambda: gf.L1(0.1, factors=2.0), "gf.factors"),
        (lambda: gf.Run(gf.L1(0.1, factors=gf.factors.given({"wieght": 1.0})), nn.Linear(2, 1)), "did you mean weight"),
        (lambda: gf.Run(gf.L1(0.1, factors=gf.factors.given({"weight": [1.0, 1.0, 1.0]})), nn.Linear(2, 1)), "broadcast"),
        (lambda: gf.Run(gf.GroupLasso(0.1, groups=gf.groups.heads()), nn.Linear(2, 1)), "fits none"),
        (lambda: gf.Run(gf.GroupLasso(0.1, groups=gf.groups.custom({"wight": [0]})), nn.Linear(2, 1)), "did you mean weight"),
    ],
)
def test_what_fits_nothing_is_refused(make: object, told: str) -> None:
    with pytest.raises(gf.GoodfitError, match=told):
        make()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.01, 3), st.floats(0, 3))
def test_the_group_step_solves_its_problem(seed: int, lam: float, spread: float) -> None:
    """No neighbour of the result has a lower ½ Σ (w − z)²/r + lam·√n·‖w‖, and a zero group is where theory says."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(3, 4, generator=draw, dtype=torch.float64)
    r = 10 ** ((torch.rand(3, 4, generator=draw, dtype=torch.float64) - 0.5) * spread)
    w = gf.GroupLasso(lam).step({"w": z}, lr={"w": torch.tensor(torch.inf)}, rate={"w": r}, state={})[0]["w"]

    def cost(w: Tensor) -> Tensor:
        return ((w - z).square() / r).sum(1) / 2 + lam * 2 * w.norm(dim=1)

    for _ in range(50):
        near = w + torch.randn(3, 4, generator=draw, dtype=torch.float64) * 10 ** (-4 * torch.rand(3, 1, generator=draw))
        assert (cost(near) >= cost(w) - 1e-12).all()
    assert torch.equal((w == 0).all(1), (z / (2 * lam * r)).square().sum(1) <= 1)


def test_the_adaptive_lasso_is_its_optimum() -> None:
    """Factors 1/|pilot|: held against a general solver on the same objective."""
    x, y = problem(columns=12)
    pilot = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    model = nn.Linear(12, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(pilot[None])
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    gf.Run(gf.L1(0.1, factors=gf.factors.adaptive()), model).attach(optimizer)
    for _ in range(3000):
        optimizer.zero_grad()
        half_mse(model.weight[0], x, y).backward()
        optimizer.step()

    def objective(halves: object) -> float:
        w = torch.tensor(halves[:12] - halves[12:])
        return float(half_mse(w, x, y) + 0.1 * (torch.tensor(halves[:12] + halves[12:]) / pilot.abs()).sum())

    solved = minimize(
        objective, [0.1] * 24, bounds=[(0, None)] * 24, method="L-BFGS-B", options={"maxiter": 5000, "maxfun": 10**6}
    )
    found = model.weight.detach()[0]
    ours = float(half_mse(found, x, y) + 0.1 * (found.abs() / pilot.abs()).sum())
    assert ours <= solved.fun * (1 + 1e-6)
    assert (found[6:] == 0).sum() >= 5
    assert (found[:6] != 0).all()


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam])
def test_factor_inf_holds_a_weight_at_zero_and_factor_0_leaves_it(make: type[optim.Optimizer]) -> None:
    model = nn.Linear(3, 1, bias=False)
    optimizer = make(model.parameters(), lr=0.05)
    gf.Run(gf.L1(0.5, factors=gf.factors.given({"weight": [0.0, 1.0, float("inf")]})), model).attach(optimizer)
    for _ in range(400):
        optimizer.zero_grad()
        ((model.weight - 1).square().sum() / 2).backward()
        optimizer.step()
    assert model.weight[0, 2].item() == 0
    torch.testing.assert_close(model.weight.detach()[0, :2], torch.tensor([1.0, 0.5]), rtol=0, atol=5e-3)


def test_a_scaled_start_of_learning_at_lr_0_is_no_nan() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    gf.Run(gf.L1(0.5, factors=gf.factors.given({"weight": [1.0, float("inf")]})), model).attach(optimizer)
    model.weight.grad = torch.ones(1, 2)
    optimizer.step()
    assert model.weight.isfinite().all()


def test_max_norm_bounds_units_and_leaves_shorter_ones() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ConvTranspose2d(2, 3, 2))
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    gf.Run(gf.MaxNorm(0.4), model).attach(optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for layer, before, axis in ((model[0], start[0], 0), (model[1], start[2], 1)):
        theirs = torch.renorm(before, 2, axis, 0.4)
        torch.testing.assert_close(layer.weight.detach(), theirs, rtol=1e-6, atol=0)
        assert not torch.equal(theirs, before)
    assert torch.equal(model[0].bias, start[1])


def test_max_norm_is_the_constrained_optimum_under_sgd() -> None:
    """min ‖w − (3, 4)‖² within length 1 lies at (0.6, 0.8)."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    gf.Run(gf.MaxNorm(1.0), model).attach(optimizer)
    for _ in range(300):
        optimizer.zero_grad()
        (model.weight - torch.tensor([[3.0, 4.0]])).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.6, 0.8]]), rtol=1e-9, atol=0)


def test_l2sp_decays_toward_the_start_after_a_resume_too() -> None:
    """½(w − 5)² + lam/2 (w − 1)² has its minimum at (5 + lam)/(1 + lam)."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    run = gf.Run(gf.L2SP(3.0), model).attach(optimizer)
    nn.init.constant_(model.weight, 4.0)
    again = gf.Run(gf.L2SP(3.0), model)
    again.load_state_dict(run.state_dict())
    assert again.penalty() == 3.0 / 2 * 9
    for _ in range(200):
        optimizer.zero_grad()
        ((model.weight - 5).square().sum() / 2).backward()
        optimizer.step()
    assert model.weight.item() == pytest.approx((5 + 3) / (1 + 3), rel=1e-9)


def test_decay_that_is_independent_of_the_lr() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    gf.Run(gf.WeightDecay(gf.schedules.linear(0.1, 0.0, steps=2), independent=True), model).attach(optimizer)
    for _ in range(3):
        model.weight.grad = torch.zeros(1, 1)
        optimizer.step()
    assert model.weight.item() == pytest.approx(0.9 * 0.95, rel=1e-15)


def attended() -> nn.Module:
    class Attended(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)[:, None]
            return self.attention(h, h, h)[0]

    return Attended()


@pytest.mark.parametrize("kind", [gf.GroupLasso, gf.MaxNorm])
def test_groups_that_are_frozen_are_left_alone(kind: type[gf.phases.Step]) -> None:
    model = attended()
    model.attention.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.attention.named_parameters()}
    optimizer = optim.Adam([p for p in model.parameters() if p.requires_grad])
    gf.Run(kind(groups=gf.groups.heads()), model).attach(optimizer)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.attention.named_parameters())


def test_a_group_in_two_optimizers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    both = gf.groups.custom({"0.weight": [0], "1.weight": [0]})
    parts = [optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    with pytest.raises(gf.GoodfitError, match="several optimizers"):
        gf.Run(gf.MaxNorm(1.0, groups=both), model).attach(*parts)
    gf.Run(gf.MaxNorm(1.0), model).attach(*parts)


@pytest.mark.parametrize("around", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("one", [gf.L1(0.1), gf.ElasticNet(0.1), gf.GroupLasso(0.1)], ids=str)
def test_zeros_are_refused_where_a_parametrization_divides_by_a_length(one: gf.phases.Step, around: object) -> None:
    model = nn.Sequential(around(nn.Linear(3, 4)), nn.Linear(4, 1))
    with pytest.raises(gf.GoodfitError, match=r"0.parametrizations.weight.orig.* 0/0"):
        gf.Run(one, model)
    gf.Run(type(one)(0.1, where=gf.where.kernels & ~gf.where.named("*parametrizations*")), model)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_the_elastic_net_holds_a_weight_of_factor_inf_too(ratio: float) -> None:
    one = gf.ElasticNet(2.0, ratio=ratio, factors=gf.factors.given({"weight": [float("inf"), 1.0]}))
    state = one.init({"weight": torch.ones(1, 2)}, {})
    unit, rate = torch.tensor(1.0), torch.full((1, 2), 1e5)
    w = one.step({"weight": torch.ones(1, 2)}, {"weight": unit}, {"weight": rate}, state)[0]["weight"]
    assert w.isfinite().all()
    assert w[0, 0].abs() < 1e-300


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("one", [gf.L1(0.1), gf.ElasticNet(0.1), gf.GroupLasso(0.1), gf.MaxNorm(0.1)], ids=str)
def test_half_precision_weights_keep_their_dtype_and_stay_finite(one: gf.phases.Step, dtype: torch.dtype) -> None:
    model = nn.Linear(4, 3).to(dtype)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gf.Run(one, model).attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4, dtype=dtype)).sum().backward()
        optimizer.step()
    assert model.weight.dtype == dtype
    assert model.weight.isfinite().all()
