"""The cocktails to draw from."""

from __future__ import annotations

from collections import Counter
from typing import Any

import optuna
import pytest
import torch
from torch import nn

import goodfit as gf
from goodfit.hyper import hypers
from goodfit.spaces import COCKTAIL

DRAWS = [COCKTAIL.draw(seed) for seed in range(400)]


def test_a_draw_is_a_cocktail_that_reads_back_and_depends_on_its_seed_alone() -> None:
    assert len(set(map(repr, DRAWS))) > 390
    for seed, one in enumerate(DRAWS[:50]):
        assert COCKTAIL.draw(seed) == one == gf.parse(repr(one)) == gf.parse(str(one))


def test_the_space_is_that_of_the_paper() -> None:
    seen = Counter(type(one).__name__ for mix in DRAWS for one in mix)
    assert seen.keys() == {
        *("BatchNorm", "SkipConnections", "ShakeShake", "ShakeDrop", "Dropout", "WeightDecay"),
        *("MixUp", "CutMix", "CutOut", "FGSM", "Lookahead", "SWA"),
    }
    for kind, share in {"BatchNorm": 0.5, "SkipConnections": 0.75, "ShakeDrop": 0.25, "MixUp": 0.2, "SWA": 0.5}.items():
        assert abs(seen[kind] / 400 - share) < 0.1
    for mix in DRAWS:
        kinds = {type(one).__name__ for one in mix}
        assert len(kinds & {"MixUp", "CutMix", "CutOut", "FGSM"}) <= 1
        assert len(kinds & {"ShakeShake", "ShakeDrop"}) <= ("SkipConnections" in kinds)
    decays = sorted(one.lam for mix in DRAWS for one in mix if isinstance(one, gf.WeightDecay))
    assert decays[len(decays) // 2] == pytest.approx(1e-3, rel=0.8)  # the middle of 1e-5 and 0.1, by logarithms
    assert {one.where for mix in DRAWS for one in mix if isinstance(one, gf.WeightDecay)} == {gf.where.kernels}


def test_a_trial_of_optuna_is_asked_for_the_same() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found: list[gf.Cocktail] = []

    def objective(trial: Any) -> float:
        found.append(COCKTAIL.suggest(trial))
        return float(len(found[-1]))

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=60)
    assert len(study.best_trial.params) >= 6
    names = {name for trial in study.trials for name in trial.params}
    assert {"augmentation", "WeightDecay.lam", "Dropout.shape", "CutOut.ratio", "Lookahead.k"} <= names
    for trial, mix in zip(study.trials, found, strict=True):
        numbers = {f"{type(one).__name__}.{n}": getattr(one, n) for one in mix for n, _ in hypers(one)}
        assert all(numbers[name] == value for name, value in trial.params.items() if name in numbers)


def test_every_draw_trains() -> None:
    x, y = torch.randn(32, 6), nn.functional.one_hot(torch.arange(32) % 3).float()
    for mix in DRAWS[:40]:
        torch.manual_seed(0)
        hidden = [layer for _ in range(5) for layer in (nn.Linear(8, 8), nn.ReLU())]
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), *hidden, nn.Linear(8, 3))
        run = gf.Run(mix.in_steps(4), model, task="classes", example=x)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        x2, y2 = run.batch(x, y)
        loss = run.loss(x2, y2)
        loss.backward()
        run.gradient(optimizer)
        optimizer.step()
        run.step(optimizer)
        assert bool(loss.isfinite())
