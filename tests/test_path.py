"""Paths over λ: scikit-learn's on linear models, dense to sparse on networks, the choices, the table's command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot
import numpy as np
import pytest
import torch
from sklearn.datasets import make_classification, make_regression
from sklearn.linear_model import LassoCV, LogisticRegression, enet_path, lasso_path
from sklearn.model_selection import KFold
from torch import Tensor, nn

import goodfit as gf
from goodfit.paths.result import Point
from goodfit.paths.scores import best_of, one_se_of, spread
from test_cli import Outcome, goodfit as goodfit, write

mpl.use("Agg")
FIRST = gf.where.named("0.weight")
INPUTS = gf.GroupLasso(1e-3, groups=gf.groups.inputs, where=FIRST)


def table(rows: int = 120, columns: int = 12, correlated: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x, y = make_regression(rows, columns, n_informative=4, noise=3.0, random_state=seed)
    x = x + correlated * x[:, :1]
    return x + 2.0, (y - 5.0) / y.std()


def halves(rows: int = 240, extra: int = 5, seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Three columns that matter, one by its size alone, and others that do not."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3 + extra, generator=draw)
    y = 2 * x[:, 0] - 1.5 * x[:, 1] + 1.5 * x[:, 2].abs() + 0.1 * torch.randn(rows, generator=draw)
    y = (y - y.mean()) / y.std()
    cut = rows * 2 // 3
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def network(inputs: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, 1))


@pytest.mark.parametrize(("rows", "columns", "correlated"), [(60, 5, 0.0), (120, 12, 3.0), (40, 60, 0.0)])
def test_on_a_linear_model_it_is_the_lasso_path_of_scikit_learn(rows: int, columns: int, correlated: float) -> None:
    x, y = table(rows, columns, correlated)
    found = gf.path(lambda: nn.Linear(columns, 1), (x, y), (x, y), count=15)
    alphas, solved, _ = lasso_path(x - x.mean(0), y - y.mean(), alphas=15, tol=1e-10, max_iter=100_000)
    assert np.allclose(found.lams, 2 * alphas[::-1], rtol=1e-5)
    ours = found.coefficients["weight"][:, 0].numpy()
    assert np.abs(ours - solved.T[::-1]).max() <= 1e-3 * np.abs(solved).max()
    assert np.allclose(found.coefficients["bias"][:, 0], (y.mean() - ours @ x.mean(0)), atol=1e-4)
    assert found.points[-1].nonzero == 0
    assert found.lam_max == found.lams[-1]
    assert found.dense is None


def test_elastic_net_is_that_of_scikit_learn() -> None:
    x, y = table(correlated=1.0)
    alphas, solved, _ = enet_path(x - x.mean(0), y - y.mean(), l1_ratio=0.5, alphas=10, tol=1e-10, max_iter=100_000)
    found = gf.path(lambda: nn.Linear(12, 1), (x, y), (x, y), gf.ElasticNet(ratio=0.5), count=10)
    assert np.allclose(found.lams, 2 * alphas[::-1], rtol=1e-5)
    assert np.abs(found.coefficients["weight"][:, 0].numpy() - solved.T[::-1]).max() <= 1e-3 * np.abs(solved).max()


def test_folds_are_those_of_lasso_cv() -> None:
    x, y = table(90, 8)
    solved = LassoCV(alphas=12, cv=4, tol=1e-8, max_iter=100_000).fit(x, y)
    found = gf.path(lambda: nn.Linear(8, 1), (x, y), KFold(4), count=12)
    assert np.allclose(np.array(found.fold_scores).T[::-1], solved.mse_path_, rtol=1e-3)
    assert found.best.lam == pytest.approx(2 * solved.alpha_, rel=1e-4)
    spreads = np.std(found.fold_scores, axis=0, ddof=1) / 2
    assert np.allclose(found.stderrs, spreads)


def test_logistic_regression_is_that_of_scikit_learn() -> None:
    x, y = make_classification(150, 8, n_informative=3, random_state=1)
    lam = 0.02
    solved = LogisticRegression(l1_ratio=1.0, C=1 / (150 * lam), solver="saga", tol=1e-9, max_iter=100_000).fit(x, y)

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], y.to(outputs.dtype))

    found = gf.path(lambda: nn.Linear(8, 1), (x, y), (x, y), lams=[lam, 0.1], loss=loss)
    assert np.abs(found.points[0].weights["weight"].numpy() - solved.coef_).max() <= 1e-3
    assert found.points[0].stderr > 0


def test_lam_max_by_hand_also_of_groups_and_far_above() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    y = torch.stack([3 * x[:, 0] + x[:, 1], 4 * x[:, 0]], 1) + 5
    # slopes at zero, the biases at 5: -2/8 · x'(y - 5) = -[[6, 8], [2, 0]]/4; groups of two inputs weigh √2.
    single = gf.path(lambda: nn.Linear(2, 2), (x, y), (x, y), count=3)
    assert single.lam_max == pytest.approx(2.0, rel=1e-5)
    group = gf.path(lambda: nn.Linear(2, 2), (x, y), (x, y), gf.GroupLasso(groups=gf.groups.inputs), count=3)
    assert group.lam_max == pytest.approx(2.5 / math.sqrt(2), rel=1e-5)
    above = gf.path(lambda: nn.Linear(2, 2), (x, y), (x, y), lams=[1.0, 10.0, 1000.0])
    assert [p.nonzero for p in above.points[1:]] == [0, 0]
    assert above.points[1].weights["bias"].tolist() == pytest.approx([5.0, 5.0])


def test_the_choices_by_hand() -> None:
    scores, errors = [1.5, 1.0, 1.1, 1.15, 1.3, math.nan], [0.1, 0.2, 0.1, 0.1, 0.1, 0.1]
    assert (best_of(scores), one_se_of(scores, errors)) == (1, 3)
    assert one_se_of([1.0, 1.1, math.inf], [math.nan] * 3) == 0
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    batch = [(torch.zeros(4, 1), torch.tensor([1.0, 2.0, 3.0, 4.0]))]
    loss = nn.functional.mse_loss
    rows = np.array([1.0, 4.0, 9.0, 16.0])
    assert spread(model, batch, lambda o, y: loss(o[:, 0], y)) == pytest.approx(rows.std(ddof=1) / 2)
    looking = lambda o, y: loss(o[:, 0], y) if float(y[0]) > 0 else y.sum()  # noqa: E731
    assert spread(model, batch, looking) == pytest.approx(rows.std(ddof=1) / 2)


def test_a_network_goes_from_dense_to_zero_and_selects_features() -> None:
    train, valid = halves()
    found = gf.path(network, train, valid, INPUTS, count=16, epochs=30, batch_size=32)
    assert found.dense is not None
    assert found.scores[0] <= found.dense.score * 1.02
    assert found.points[-1].nonzero == 0
    assert found.lam_max == found.lams[-1]
    assert found.best.score < 0.2
    assert {0, 1, 2} <= set(found.selected())
    assert len(found.selected()) < 8
    exact = [p for p in found.points if p.features == (0, 1, 2)]
    assert exact
    assert exact[0].score < 0.3
    model = found.model(found.best).requires_grad_(False)
    assert float(nn.functional.mse_loss(model(valid[0])[:, 0], valid[1])) == pytest.approx(found.best.score, rel=1e-9)


def test_small_lambdas_keep_the_dense_score_also_with_norms_and_dropout() -> None:
    train, valid = halves()
    mix = gf.Cocktail(gf.BatchNorm(), gf.Dropout(0.1), gf.EarlyStopping(10))
    found = gf.path(network, train, valid, gf.L1, cocktail=mix, lams=[1e-9, 1e-8], epochs=2)
    assert found.dense is not None
    assert all(s <= found.dense.score * 1.01 for s in found.scores)
    assert found.lam_max is None
    assert any(isinstance(m, nn.BatchNorm1d) for m in found.model(found.best).modules())


def test_folds_of_a_network_share_their_lambdas_and_the_same_seed_gives_the_same_bits() -> None:
    train, _ = halves(90)
    labels = (train[1] > 0).long()

    def once() -> gf.Path:
        build = lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))  # noqa: E731
        return gf.path(build, (train[0], labels), 2, count=5, epochs=2, cocktail="Dropout(0.1)", seed=3)

    torch.manual_seed(1)
    one = once()
    torch.manual_seed(2)
    other = once()
    assert one.fold_scores == other.fold_scores
    assert all(torch.equal(one.coefficients[n], other.coefficients[n]) for n in one.coefficients)
    assert {len(s) for s in one.fold_scores} == {len(one.lams)}
    assert one.scores == pytest.approx(np.mean(one.fold_scores, axis=0).tolist())


def test_a_frozen_layer_stays_and_the_others_reach_zero() -> None:
    train, valid = halves(90)

    def build() -> nn.Module:
        model = network()
        model[0].requires_grad_(False)
        return model

    found = gf.path(build, train, valid, count=5, epochs=4)
    assert found.points[-1].zeros == 1
    assert found.selected() == list(range(8))
    with pytest.raises(gf.GoodfitError, match="frozen; unfreeze some"):
        gf.path(build, train, valid, INPUTS)


def test_numbers_that_make_no_zeros_go_through_their_range() -> None:
    x, y = table(60, 4)
    found = gf.path(lambda: nn.Linear(4, 1), (x, y), 3, gf.L2, count=5)
    assert (found.lams[0], found.lams[-1], found.lam_max) == (1e-6, pytest.approx(0.1), None)
    lam, centred = found.lams[-1], x - x.mean(0)
    ridge = np.linalg.solve(centred.T @ centred + 30 * lam * np.eye(4), centred.T @ (y - y.mean()))
    assert np.allclose(found.points[-1].weights["weight"][0], ridge, atol=1e-5)


X, Y = (
    torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    torch.arange(12.0, dtype=torch.float64),
)
SHARED = nn.Linear(3, 1)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"build": SHARED}, "build must be a function"),
        ({"build": lambda: SHARED.double()}, "build must make a new model at each call"),
        ({"build": lambda: 3}, "build.. must return a torch.nn.Module, got a int"),
        ({"valid": 13}, r"must be in \[2, 12\], the rows of train, got 13"),
        ({"valid": KFold(20)}, "cannot split 12 rows"),
        ({"lams": [0.1, 0.1]}, "lams must increase"),
        ({"lams": [0.0, 0.1]}, "lams must be positive"),
        ({"lams": []}, "at least one"),
        ({"lams": "ab"}, "lams must be numbers"),
        ({"train": (torch.full_like(X, math.nan), Y)}, "train must be finite, got nan or inf in x, first in row 0"),
        ({"valid": (X, Y * math.inf)}, "valid must be finite, got nan or inf in y"),
        ({"over": gf.BatchNorm}, "BatchNorm has no strength"),
        ({"over": gf.EarlyStopping}, "EarlyStopping has no strength"),
        ({"over": 0.1}, "over must be a regularizer"),
        ({"cocktail": "L1(0.1)"}, "which the cocktail holds too"),
        ({"cocktail": "L2(linear(0.1, 0.0, steps=9))"}, "has no schedules"),
        ({"over": gf.L1(where=gf.where.named("nowhere"))}, "matched no weights"),
        ({"count": 0}, "count must be an integer >= 1"),
        ({"train": (X, Y * 0 + 1), "valid": (X, Y)}, "No λ follows from this model"),
    ],
)
def test_refusals(change: dict, line: str) -> None:
    words = {"build": lambda: nn.Linear(3, 1), "train": (X, Y), "valid": (X, Y)} | change
    with pytest.raises(gf.GoodfitError, match=line):
        gf.path(words.pop("build"), words.pop("train"), words.pop("valid"), **words)


def test_ctrl_c_keeps_the_lambdas_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    from goodfit.paths import course

    seen = []

    def stop(model: nn.Module, batches: object, measure: object) -> float:
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return spread(model, batches, measure)

    monkeypatch.setattr(course, "spread", stop)
    found = gf.path(lambda: nn.Linear(3, 1), (X, Y), (X, Y), count=6)
    assert (len(found.points), found.stopped) == (3, "interrupted after 3 of the λ")


def test_the_plot_and_the_table() -> None:
    found = gf.path(lambda: nn.Linear(3, 1), (X, Y), 3, count=6)
    ax = found.plot()
    assert ax.get_xscale() == "log"
    assert {t.get_text().split(",")[0] for t in ax.get_legend().get_texts()} == {"validation loss ± se", "best", "1-SE"}
    _, own = mpl.pyplot.subplots()
    assert found.plot(own) is own
    mpl.pyplot.close("all")
    text = str(found)
    assert text.count("\n") == 7
    assert "best" in text
    assert json.loads(json.dumps(found.rows()))[0]["features"] == [0, 1, 2]
    assert isinstance(found.best, Point)


def test_without_matplotlib_the_plot_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(gf.GoodfitError, match=r"pip install 'goodfit\[plot\]'"):
        gf.path(lambda: nn.Linear(3, 1), (X, Y), 3, count=2).plot()


def rows(n: int = 120) -> list[dict[str, object]]:
    draw = np.random.default_rng(0)
    made = []
    for _ in range(n):
        a, b, c = draw.normal(size=3)
        made.append({"<b>a</b>": a, "noise": b, "city": "Rome" if c > 0 else "Oslo", "y": 3 * a + (2 if c > 0 else 0)})
    return made


@pytest.mark.parametrize("more", [("--model", "linear", "--cv", "3"), ("--epochs", "4")])
def test_the_command_writes_a_folder_and_names_the_columns(goodfit: Outcome, more: tuple[str, ...]) -> None:
    code, out, err = goodfit("path", write("a.csv", rows()), "--target", "y", "--count", "6", *more)
    assert (code, "1-SE" in out) == (0, True), err
    assert "kept at 1-SE: " in out
    assert "<b>a</b>" in out
    folder = Path("a-path")
    assert sorted(p.name for p in folder.iterdir()) == ["path.csv", "path.html", "path.json", "weights.safetensors"]
    told = json.loads((folder / "path.json").read_text())
    assert len((folder / "path.csv").read_text().splitlines()) == len(told["points"]) + 1
    assert "<b>a</b>" in told["kept"]["one_se"]
    assert told["test"]["one_se"]["r2"] > 0.3
    page = (folder / "path.html").read_text()
    assert "&lt;b&gt;a&lt;/b&gt;" in page
    assert "<b>a" not in page
    assert "<script" not in page


def test_the_command_refuses_in_one_line(goodfit: Outcome) -> None:
    name = write("a.csv", rows(40))
    for words, line in (
        (("--over", "L1(), L2()"), "--over takes one regularizer"),
        (("--model", "forest"), "model must be one of network, linear"),
        (("--over", "BatchNorm"), "BatchNorm has no strength"),
        (("--cv", "40"), "as a number of folds must be in [2, 32]"),
    ):
        code, _, err = goodfit("path", name, "--target", "y", "--model", "linear", *words)
        assert (code, line in err) == (2, True), err
    assert not Path("a-path").exists()


class Skip(nn.Module):
    """Reads its input by two ways."""

    def __init__(self, sliced: bool) -> None:
        super().__init__()
        self.first, self.second, self.sliced = nn.Linear(2 if sliced else 4, 3), nn.Linear(2 if sliced else 7, 1), sliced

    def forward(self, x: Tensor) -> Tensor:
        if self.sliced:
            return self.first(x[:, :2]).sum(1, keepdim=True) + self.second(x[:, 2:])
        return self.second(torch.cat([torch.relu(self.first(x)), x], 1))


@pytest.mark.parametrize("sliced", [True, False])
def test_features_are_told_only_where_one_layer_reads_the_whole_input(sliced: bool) -> None:
    x = torch.randn(40, 4)
    over = gf.GroupLasso(groups=gf.groups.inputs, where=gf.where.named("first.weight"))
    found = gf.path(lambda: Skip(sliced), (x, x.sum(1, keepdim=True)), (x, x.sum(1, keepdim=True)), over, lams=[1e-3], epochs=1)
    with pytest.raises(gf.GoodfitError, match="no feature can be told"):
        found.selected()


def test_of_bounds_the_smallest_is_the_strongest() -> None:
    x = torch.randn(40, 3)
    data = (x, x @ torch.ones(3, 1) + torch.randn(40, 1))
    found = gf.path(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), data, data, gf.MaxNorm, count=4, epochs=3
    )
    within = [p.lam for p in found.points if p.score <= found.best.score + found.best.stderr]
    assert found.one_se.lam == min(within)
