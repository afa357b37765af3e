"""λ means the same elsewhere: each conversion against the real package, with random numbers."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import (
    ElasticNet,
    Lasso,
    LogisticRegression,
    LogisticRegressionCV,
    MultiTaskElasticNet,
    Ridge,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.neural_network import MLPClassifier, MLPRegressor
from torch import nn, optim
from torch.nn import functional as F

import goodfit as gf

os.environ["KERAS_BACKEND"] = "torch"


def data(seed: int, rows: int = 60, columns: int = 5) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, columns))
    return x, x @ draw.normal(size=columns) + draw.normal(size=rows)


def solve(cocktail: Any, x: np.ndarray, y: np.ndarray, loss: Any, outputs: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The optimum of goodfit's objective, by plain proximal gradient steps."""
    model = nn.Linear(x.shape[1], outputs)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
    gf.Run(cocktail, model).attach(optimizer)
    a, b = torch.tensor(x), torch.tensor(y)
    for _ in range(3000):
        optimizer.zero_grad()
        out = model(a)
        loss(out[:, 0] if outputs == 1 else out, b).backward()
        optimizer.step()
    return model.weight.detach().numpy(), model.bias.detach().numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "make", [lambda a: Ridge(alpha=30 * a), lambda a: Lasso(alpha=a), lambda a: ElasticNet(alpha=a, l1_ratio=0.3)]
)
def test_linear_regressions(make: Any, seed: int) -> None:
    x, y = data(seed)
    theirs = make(float(np.random.default_rng(seed).uniform(0.05, 0.5))).set_params(tol=1e-10).fit(x, y)
    weight, bias = solve(gf.convert.from_sklearn(theirs, rows=60), x, y, F.mse_loss)
    np.testing.assert_allclose(weight[0], theirs.coef_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(bias, theirs.intercept_, rtol=0, atol=1e-6)
    back = gf.convert.to_sklearn(gf.convert.from_sklearn(theirs, rows=60), type(theirs)(), rows=60)
    assert back.alpha == pytest.approx(theirs.alpha, rel=1e-14)


@pytest.mark.parametrize("make", [lambda: Ridge(alpha=3.0), lambda: Lasso(alpha=0.1), lambda: ElasticNet(alpha=0.2)])
def test_regressions_on_several_numbers(make: Any) -> None:
    x, y = data(7)
    both = np.stack([y, x[:, 0] - 2 * x[:, 1]], axis=1)
    theirs = make().set_params(tol=1e-10).fit(x, both)
    weight, _ = solve(gf.convert.from_sklearn(theirs, rows=60, outputs=2), x, both, F.mse_loss, outputs=2)
    np.testing.assert_allclose(weight, theirs.coef_, rtol=0, atol=1e-6)


def test_a_lasso_for_a_logistic_regression_comes_with_a_solver_that_has_one() -> None:
    x, y = data(8)
    made = gf.convert.to_sklearn(gf.L1(0.05), LogisticRegression(max_iter=10_000), rows=60)
    assert (made.fit(x, y > 0).coef_ == 0).any()
    assert gf.convert.from_sklearn(LogisticRegression(penalty=None), rows=60) == gf.Cocktail()


def test_a_max_norm_of_keras_on_a_convolution() -> None:
    import keras

    w = np.random.default_rng(1).normal(size=(3, 3, 2, 4)).astype("float32")
    theirs = gf.convert.to_keras(gf.MaxNorm(0.7), rank=4)["kernel_constraint"]
    ours = gf.MaxNorm(0.7).step({"w": torch.tensor(w.transpose(3, 2, 0, 1))}, {}, {}, {})[0]["w"]
    np.testing.assert_allclose(ours.numpy(), np.asarray(theirs(w).detach()).transpose(3, 2, 0, 1), rtol=1e-5)
    assert gf.convert.from_keras(theirs) == gf.Cocktail(gf.MaxNorm(0.7))
    with pytest.raises(gf.GoodfitError, match="axis=1"):
        gf.convert.from_keras(keras.constraints.MaxNorm(0.7, axis=1))


@pytest.mark.parametrize("kind", [optim.Adafactor, optim.Muon, optim.AdamW])
def test_decoupled_optimizers_are_read_as_decay(kind: Any) -> None:
    model = nn.Linear(2, 2, bias=False)
    assert gf.convert.from_torch(kind(model.parameters(), weight_decay=0.1), model) == gf.Cocktail(
        gf.WeightDecay(0.1, where=gf.where.everything)
    )


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regressions(share: float, classes: int) -> None:
    x, y = data(4)
    labels = np.digitize(y, [0.0] if classes == 2 else [-1.0, 1.0])
    theirs = LogisticRegression(C=0.3, l1_ratio=share, solver="saga", tol=1e-9, max_iter=100_000).fit(x, labels)
    cocktail = gf.convert.from_sklearn(theirs, rows=60)
    if classes == 2:
        weight, bias = solve(cocktail, x, labels.astype(float), F.binary_cross_entropy_with_logits)
    else:
        weight, bias = solve(cocktail, x, labels, F.cross_entropy, outputs=3)
        bias = bias - bias.mean() + theirs.intercept_.mean()  # softmax does not tell a common shift
    np.testing.assert_allclose(weight, theirs.coef_, rtol=0, atol=1e-5)
    np.testing.assert_allclose(bias, theirs.intercept_, rtol=0, atol=1e-4)
    assert pytest.approx(0.3, rel=1e-14) == gf.convert.to_sklearn(cocktail, LogisticRegression(), rows=60).C


@pytest.mark.parametrize("kind", [SGDRegressor, SGDClassifier])
def test_stochastic_estimators_have_the_objective(kind: Any) -> None:
    """Their optimum is only approached, so the objectives are compared: theirs, at any weights, up to its scale."""
    theirs = kind(alpha=0.02, penalty="elasticnet", l1_ratio=0.4, **({"loss": "log_loss"} if kind is SGDClassifier else {}))
    one = gf.convert.from_sklearn(theirs)[0]
    w = torch.tensor([[0.5, -2.0]])
    scale = 2 if kind is SGDRegressor else 1  # theirs halves the squared error
    theirs_penalty = 0.02 * (0.4 * 2.5 + 0.6 / 2 * 4.25)
    assert float(one.penalty({"w": w}, {})) == pytest.approx(scale * theirs_penalty, rel=1e-14)
    assert gf.convert.to_sklearn(one, kind(loss=theirs.loss)).get_params() == theirs.get_params()


@pytest.mark.parametrize(("kind", "loss"), [(MLPRegressor, F.mse_loss), (MLPClassifier, F.binary_cross_entropy_with_logits)])
def test_multilayer_perceptrons_have_the_gradient(kind: Any, loss: Any) -> None:
    """One full-batch SGD step of scikit-learn's network is one of ours with the converted penalty."""
    x, y = data(5, rows=40)
    y = y if kind is MLPRegressor else (y > 0).astype(float)
    numbers = {"hidden_layer_sizes": (4,), "solver": "sgd", "momentum": 0.0, "alpha": 3.0, "batch_size": 40, "shuffle": False}
    theirs = kind(**numbers, learning_rate_init=1e-9, max_iter=1, random_state=0)
    with pytest.warns(UserWarning, match="Maximum iterations"):
        theirs.fit(x, y)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        for layer, w, b in zip((model[0], model[2]), theirs.coefs_, theirs.intercepts_, strict=True):
            layer.weight.copy_(torch.tensor(w.T))
            layer.bias.copy_(torch.tensor(b))
    before = [w.copy() for w in theirs.coefs_]
    theirs.set_params(learning_rate_init=0.1, warm_start=True)
    theirs._optimizer.learning_rate = theirs._optimizer.learning_rate_init = 0.1
    with pytest.warns(UserWarning, match="Maximum iterations"):
        theirs.fit(x, y)
    rate = 0.2 if kind is MLPRegressor else 0.1  # theirs halves the squared error, so ours has twice its gradient
    optimizer = optim.SGD(model.parameters(), lr=0.1 * 0.1 / rate)
    gf.Run(gf.convert.from_sklearn(theirs, rows=40), model).attach(optimizer)
    loss(model(torch.tensor(x))[:, 0], torch.tensor(y)).backward()
    optimizer.step()
    for layer, w, start in zip((model[0], model[2]), theirs.coefs_, before, strict=True):
        assert not np.allclose(w, start)
        np.testing.assert_allclose(layer.weight.detach().numpy(), w.T, rtol=1e-6, atol=1e-9)
    assert gf.convert.to_sklearn(gf.convert.from_sklearn(theirs, rows=40), kind(), rows=40).alpha == pytest.approx(3.0)


def test_keras_penalties_are_the_same_numbers() -> None:
    import keras

    w = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    for theirs in (keras.regularizers.L1(0.03), keras.regularizers.L2(0.05), keras.regularizers.L1L2(0.03, 0.05)):
        cocktail = gf.convert.from_keras(theirs)
        ours = sum(float(one.penalty({"w": torch.tensor(w)}, {})) for one in cocktail)
        assert ours == pytest.approx(float(theirs(w)), rel=1e-5)
        back = gf.convert.to_keras(cocktail)["kernel_regularizer"]
        assert float(back(w)) == pytest.approx(float(theirs(w)), rel=1e-5)


def test_keras_constraints_and_decay_are_the_same_steps() -> None:
    import keras

    w = np.random.default_rng(1).normal(size=(4, 3)).astype("float32")
    theirs = keras.constraints.MaxNorm(0.7)
    ours = gf.convert.from_keras(theirs)[0].step({"w": torch.tensor(w.T)}, {}, {}, {})[0]["w"]
    np.testing.assert_allclose(ours.numpy().T, np.asarray(theirs(w).detach()), rtol=1e-5)
    assert gf.convert.to_keras(gf.MaxNorm(0.7))["kernel_constraint"].max_value == 0.7

    optimizer = keras.optimizers.SGD(learning_rate=0.1, weight_decay=0.3)
    variable = keras.Variable(w)
    optimizer.build([variable])
    optimizer.apply([keras.ops.zeros_like(variable)])
    model = nn.Linear(4, 3).float()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(w.T))
    ours_optimizer = optim.SGD(model.parameters(), lr=0.1)
    gf.Run(gf.convert.from_keras(optimizer), model).attach(ours_optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ours_optimizer.step()
    np.testing.assert_allclose(model.weight.detach().numpy().T, np.asarray(variable.value.detach()), rtol=1e-6)
    assert gf.convert.to_keras(gf.WeightDecay(0.3)) == {"weight_decay": 0.3}


@pytest.mark.parametrize("one", [gf.L2(0.3), gf.WeightDecay(0.3), gf.WeightDecay(0.3, where=gf.where.everything)], ids=str)
def test_torch_groups_take_the_same_steps_and_read_back(one: Any) -> None:
    made = []
    for ours in (True, False):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        kind = optim.AdamW if isinstance(one, gf.WeightDecay) else optim.SGD
        optimizer = kind(model.parameters() if ours else gf.convert.to_torch(one, model), lr=0.1, weight_decay=0.0)
        if ours:
            gf.Run(one, model).attach(optimizer)
        else:
            assert gf.convert.from_torch(optimizer, model) == gf.Cocktail(one)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 12).view(4, 3)).square().sum().backward()
            optimizer.step()
        made.append([p.detach() for p in model.parameters()])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_group_of_some_layers_reads_as_their_names() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = optim.SGD(
        [{"params": [model[0].weight], "weight_decay": 0.1}, {"params": [model[1].weight, model[0].bias]}], lr=0.1
    )
    assert str(gf.convert.from_torch(optimizer, model)) == "L2(0.1, where=named('0.weight'))"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: gf.convert.from_sklearn(Ridge()), "rows="),
        (lambda: gf.convert.from_sklearn("Ridge"), "Lasso"),
        (lambda: gf.convert.from_sklearn(MultiTaskElasticNet()), "MultiTaskElasticNet"),
        (lambda: gf.convert.from_sklearn(LogisticRegressionCV(), rows=9), "LogisticRegressionCV"),
        (lambda: gf.convert.from_sklearn(MLPRegressor(loss="poisson"), rows=9), "squared_error"),
        (lambda: gf.convert.from_sklearn(Ridge(alpha=[1.0, 2.0]), rows=9), "one alpha"),
        (lambda: gf.convert.to_keras(gf.L2(0.1, where=gf.where.biases)), "whole kernels"),
        (lambda: gf.convert.to_keras(gf.MaxNorm(2.0, groups=gf.groups.inputs)), "whole kernels"),
        (lambda: gf.convert.from_sklearn(SGDClassifier()), "log_loss"),
        (lambda: gf.convert.to_sklearn(gf.L2(0.1), Lasso()), "L1 alone"),
        (lambda: gf.convert.to_sklearn(gf.Dropout(0.1), Lasso()), "L1, L2 and ElasticNet"),
        (lambda: gf.convert.to_sklearn(gf.L1(gf.schedules.linear(0.1, 0.2, steps=3)), Lasso()), "fixed"),
        (lambda: gf.convert.to_sklearn(gf.Cocktail(), LogisticRegression(), rows=3), "strength 0"),
        (lambda: gf.convert.from_keras(gf.L2(0.1)), "Keras"),
        (lambda: gf.convert.to_torch([gf.L2(0.1), gf.WeightDecay(0.1)], nn.Linear(1, 1)), "one of them"),
        (lambda: gf.convert.to_torch(gf.WeightDecay(0.1, independent=True), nn.Linear(1, 1)), "independent"),
    ],
)
def test_what_has_no_counterpart_is_refused(make: Any, told: str) -> None:
    with pytest.raises(gf.GoodfitError, match=told):
        make()
