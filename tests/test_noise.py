"""Noise: uniform for every seed, apart for every name, step, call, rank and seed, and the same for many members at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st
from torch.func import vmap

from goodfit.noise import Noise, factors

COUNT = 100_000
HERE = Noise(3, "here", step=5, call=1, rank=0)


@pytest.mark.parametrize("seed", [0, 1, 2, 2**62, -1])
def test_each_seed_draws_uniform_numbers(seed: int) -> None:
    u = replace(HERE, seed=seed).uniform(COUNT).double()
    assert 0 <= float(u.min()) < 1e-3
    assert 1 - 1e-3 < float(u.max()) < 1
    shares = torch.histc(u, 64, 0, 1) / COUNT
    assert float((shares - 1 / 64).abs().max()) < 5 * (1 / 64 / COUNT) ** 0.5
    low = (u * 2**24).long() & 63  # the last bits are as good as the first
    assert float((low.bincount() / COUNT - 1 / 64).abs().max()) < 5 * (1 / 64 / COUNT) ** 0.5
    assert abs(float((u[1:] - 0.5) @ (u[:-1] - 0.5)) * 12 / COUNT) < 5 / COUNT**0.5


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_masks_of_different_seeds_are_not_alike(rate: float) -> None:
    masks = torch.stack([replace(HERE, seed=seed).uniform(COUNT) >= rate for seed in range(60)]).double()
    alike = torch.corrcoef(masks).triu(1)
    alike = alike[alike != 0] * COUNT**0.5
    assert float(alike.abs().max()) < 4.5  # of 1,770 pairs
    assert 0.9 < float(alike.std()) < 1.1


@pytest.mark.parametrize("other", [{"name": "there"}, {"step": 6}, {"call": 2}, {"rank": 1}, {"seed": 4}])
def test_another_place_time_or_seed_draws_other_numbers(other: dict[str, object]) -> None:
    one, two = HERE.uniform(COUNT).double(), replace(HERE, **other).uniform(COUNT).double()
    assert torch.equal(HERE.uniform(COUNT).double(), one)
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 5 / COUNT**0.5


def test_a_part_is_other_noise_of_the_same_moment() -> None:
    assert HERE.part("mix") == replace(HERE, name="here.mix")


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4), st.lists(st.integers(0, 5), max_size=3))
def test_members_at_once_draw_what_each_draws_alone(seeds: list[int], shape: list[int]) -> None:
    together = vmap(lambda seed: replace(HERE, seed=seed).uniform(*shape))(torch.tensor(seeds))
    for i, seed in enumerate(seeds):
        assert torch.equal(together[i], replace(HERE, seed=seed).uniform(*shape))
    assert bool((factors(torch.tensor(seeds)) % 2 == 1).all())
