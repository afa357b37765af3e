"""The text of a cocktail, where a user writes it otherwise than meant; and cocktails put together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import goodfit as gf
from goodfit.hyper import hyper
from goodfit.phases import Penalty, Regularizer


@dataclass(frozen=True)
class Mine(Penalty):
    lam: float = hyper(0.1, valid="[0, inf)", off=0.0, low=0.1, high=1.0)

    def penalty(self, weights: object, state: object) -> torch.Tensor:
        return torch.zeros(())


WRONG = {
    "": None,
    "L2(0.1": "reads like",
    "L2": "written with its numbers, got 'L2'; write L2\\(\\)",
    "l2(0.1)": "did you mean L2",
    "L2(lam=1, lam=2)": "reads like|twice",
    "L2(1, 2, 3)": "takes",
    "L2(lma=1)": "did you mean lam",
    "L2(1 + 1)": "numbers, schedules, selectors, groups, factors and criteria, got '1 \\+ 1'",
    "L2(print('x'))": "numbers, schedules, selectors, groups, factors and criteria",
    "L2(**{'lam': 1})": "has no number",
    "L2(0.1, where=kernel)": "did you mean kernels",
    "L2(0.1, where=kernels & 3)": "combine selectors",
    "L2(0.1, where=3)": "must be a selector",
    "L2(0.1, where=named(3))": "named takes a glob",
    "BatchNorm(affine='no')": "must be True or False",
    "BatchNorm(linear(0.1, 0.2, steps=3))": "fixed before training starts",
    "Dropout(linear(0, 2, steps=5))": "Dropout.p must be",
    "Dropout(linear(0, 0.5))": "one of steps= and epochs=",
    "EarlyStopping(2.5)": "an integer >= 1",
    "Mine(0.1)": "knows no regularizer 'Mine'",
    "L2(0.1); L1(0.1)": "reads like",
    "lambda: 0": "knows no regularizer",
    "(" * 500: "reads like",
    "EarlyStopping(3, mode=max)": "got 'max'; write mode='max'\\.$",
    "EarlyStopping(3, restore=false)": "got 'false'; write restore=False\\.$",
    "EarlyStopping(3, restore=true)": "write restore=True\\.$",
    "EarlyStopping(Patience(10) or GL(5))": "got 'Patience\\(10\\) or GL\\(5\\)'; join criteria with \\| or &\\.$",
    "EarlyStopping(Patience(10) || GL(5))": "; join criteria with \\| or &\\.$",
    "EarlyStopping(Patience(10) && GL(5))": "; join criteria with \\| or &\\.$",
    "EarlyStopping(gf.stop.Patience(3))": "write Patience\\(\\.\\.\\.\\) without what stands before it",
    "GL(5)": "goes into EarlyStopping, got GL\\(5\\); write EarlyStopping\\(GL\\(5\\)\\)",
    "Patience(3) | GL(5)": "write EarlyStopping\\(Patience\\(3\\) \\| GL\\(5\\)\\)",
    "L2(0.1), GL": "write EarlyStopping\\(GL\\(\\.\\.\\.\\)\\)",
    "EarlyStoping(GL(5))": "knows no regularizer 'EarlyStoping'; did you mean EarlyStopping",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_text_is_one_line_that_helps(text: str) -> None:
    if WRONG[text] is None:
        assert gf.parse(text) == gf.Cocktail()
        return
    with pytest.raises(gf.GoodfitError, match=WRONG[text]) as told:
        gf.parse(text)
    assert "\n" not in str(told.value)


def test_every_kind_of_value_reads_back() -> None:
    where = (gf.where.kernels & ~gf.where.named("head.*")) | gf.where.biases
    cocktail = gf.Cocktail(
        gf.L2(gf.schedules.linear(0.0, 0.1, steps=10), where=where),
        gf.Dropout(gf.schedules.linear(0.5, 0, epochs=2.5)),
        gf.EarlyStopping(float("inf"), mode="max"),
        gf.BatchNorm(affine=False),
    )
    assert gf.parse(repr(cocktail)) == gf.parse(str(cocktail)) == cocktail


def test_cocktails_are_put_together_and_own_regularizers_are_read() -> None:
    both = gf.Cocktail(gf.L2(0.1)) + gf.Cocktail(gf.Dropout(0.2))
    assert repr(both) == repr(gf.Cocktail(gf.L2(0.1), gf.Dropout(0.2)))
    assert gf.parse("L2(0.1), Mine(0.2)", own=[Mine])[1] == Mine(0.2)


def test_a_regularizer_without_a_phase_is_refused() -> None:
    @dataclass(frozen=True)
    class Idle(Regularizer):
        pass

    with pytest.raises(gf.GoodfitError, match="Idle has no phase"):
        gf.Cocktail(Idle())


@pytest.mark.parametrize(
    "put", [gf.Cocktail, lambda one: gf.Run(one, torch.nn.Linear(1, 1)), lambda one: gf.Cocktail(gf.L2(0.1), one)]
)
def test_a_criterion_alone_is_told_where_it_goes(put: Any) -> None:
    for one in (gf.stop.Patience(5), gf.stop.Patience(5) | gf.stop.GL(3)):
        with pytest.raises(
            gf.GoodfitError, match=f"goes into EarlyStopping, got .*; write EarlyStopping.{re.escape(repr(one))}"
        ):
            put(one)
