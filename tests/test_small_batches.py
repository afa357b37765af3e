"""Single rows join the batch before them where a batch norm would meet them, and accumulation beside one is told."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import goodfit as gf
from goodfit import BatchNorm, GoodfitError, GoodfitWarning, WeightDecay, fit, merge_last

ROWS = torch.arange(17.0, dtype=torch.float64)[:, None] * torch.ones(3, dtype=torch.float64)
DATA = TensorDataset(ROWS, ROWS[:, 0])
VALID = (ROWS[:6], ROWS[:6, 0])


class Stream(IterableDataset[Any]):
    def __init__(self, rows: int = 17) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return ((ROWS[i], ROWS[i, 0]) for i in range(self.rows))


def net(norm: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.ReLU(), nn.Linear(8, 1))


def seen_by(model: nn.Module) -> list[int]:
    """How many rows each training batch brings."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])) if m.training else None)
    return seen


# merge_last


@given(rows=st.integers(1, 40), size=st.integers(1, 12), drop=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_row_comes_once_in_order_and_len_is_true(rows: int, size: int, drop: bool) -> None:
    loader = DataLoader(range(rows), batch_size=size, drop_last=drop)  # type: ignore[arg-type]
    merged = merge_last(loader)
    batches = list(merged)
    assert len(merged) == len(batches)
    assert [i for b in batches for i in b.tolist()] == [i for b in loader for i in b.tolist()]
    assert size == 1 or rows == 1 or 1 not in map(len, batches)
    assert all(len(b) <= size + 1 for b in batches)
    assert (merged is loader) == (drop or rows % size != 1 or size == 1 or rows <= size)


SAMPLED = DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 4, False))
OTHER = DataLoader(DATA, batch_sampler=[[0, 1, 2], [3], [4, 5], [6]])


def test_other_loaders_are_joined_on_the_fly() -> None:
    cases = {
        "own list of batches": (OTHER, [4, 3]),
        "a stream": (DataLoader(Stream(), batch_size=4), [4, 4, 4, 5]),
        "a batch sampler of torch": (SAMPLED, [4, 4, 4, 5]),
        "a plain list": ([ROWS[:3], ROWS[3:4]], [4]),
        "a generator": ((ROWS[i : i + 4] for i in range(0, 17, 4)), [4, 4, 4, 5]),
        "single rows first": ([ROWS[:1], ROWS[:1], ROWS[:4]], [1, 1, 4]),
        "nothing": ([], []),
        "workers": (DataLoader(DATA, batch_size=4, num_workers=1, multiprocessing_context="fork"), [4, 4, 4, 5]),
    }
    for name, (loader, sizes) in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside torch's threads
            assert [len(b[0]) if isinstance(b, list) else len(b) for b in merge_last(loader)] == sizes, name


def test_len_is_there_where_it_is_known_for_sure() -> None:
    def twice(items: list[Any]) -> Tensor:
        return torch.cat([torch.stack([x, x]) for x, _ in items])

    collated = merge_last(DataLoader(DATA, batch_size=4, collate_fn=twice))
    assert [len(batch) for batch in collated] == [8, 8, 8, 8, 2]
    for merged in (collated, merge_last([ROWS[:4], ROWS[4:5]]), merge_last(DataLoader(Stream(), batch_size=4))):
        with pytest.raises(TypeError, match="not known beforehand"):
            len(merged)  # type: ignore[arg-type]


def test_what_is_of_the_batch_and_not_of_its_rows_stays() -> None:
    (merged,) = merge_last(
        [{"x": ROWS[:4], "name": "a", "scale": 2.0, "mask": None}, {"x": ROWS[4:5], "name": "a", "scale": 2.0, "mask": None}]
    )
    assert torch.equal(merged.pop("x"), ROWS[:5])
    assert merged == {"name": "a", "scale": 2.0, "mask": None}
    with pytest.raises(GoodfitError, match="got str"):
        list(merge_last([{"x": ROWS[:4], "name": "a"}, {"x": ROWS[4:5], "name": "b"}]))


def test_a_shard_of_a_distributed_sampler_counts_its_own_rows() -> None:
    for rank in range(2):  # 17 rows are padded to 18, 9 for each
        loader = DataLoader(DATA, batch_size=4, sampler=DistributedSampler(DATA, 2, rank, shuffle=False))
        merged = merge_last(loader)
        assert len(merged) == 2
        assert [len(x) for x, _ in merged] == [4, 5]


class Pair(NamedTuple):
    a: Tensor
    b: Any


def test_batches_keep_their_form() -> None:
    def batch(rows: Tensor) -> Any:
        texts = [str(int(r[0])) for r in rows]
        return {"x": (rows, [rows[:, 0], rows[:, 1]]), "texts": texts, "pair": Pair(rows, {"y": rows}), "ids": tuple(texts)}

    (merged,) = merge_last([batch(ROWS[:2]), batch(ROWS[2:3])])
    meant = batch(ROWS[:3])
    assert torch.equal(merged["x"][0], ROWS[:3])
    assert isinstance(merged["x"][1], list)
    assert torch.equal(merged["x"][1][1], ROWS[:3, 1])
    assert merged["texts"] == meant["texts"] == ["0", "1", "2"]
    assert isinstance(merged["pair"], Pair)
    assert torch.equal(merged["pair"].b["y"], ROWS[:3])
    assert merged["ids"] == ("0", "1", "2")


@pytest.mark.parametrize(
    ("single", "message"),
    [
        (torch.ones(1, 4, dtype=torch.float64), r"of one shape, got .*\(3,\).* and .*\(4,\)"),
        (torch.ones(1, 3), "float32"),
        ([torch.ones(1, 3)], "got Tensor and list"),
    ],
)
def test_rows_that_cannot_be_joined_are_an_error_that_says_so(single: Any, message: str) -> None:
    with pytest.raises(GoodfitError, match=rf"{message}.*Give drop_last=True"):
        list(merge_last([ROWS[:4], single]))


# fit


def test_a_loader_is_repaired_and_told_before_training() -> None:
    model = net()
    seen = seen_by(model)
    loader = DataLoader(DATA, batch_size=8, shuffle=True)
    with pytest.warns(
        GoodfitWarning, match="train has 17 rows in batches of 8: the last row joins the batch before it"
    ) as told:
        fit(model, loader, VALID, WeightDecay(0.01), epochs=3)
    assert seen == [8, 9] * 3
    assert len(told) == 1
    assert int(model[1].num_batches_tracked) == 6


def test_it_equals_training_on_the_merged_batches() -> None:
    model, other = net(), None
    other = copy.deepcopy(model)
    with pytest.warns(GoodfitWarning, match="joins the batch"):
        fit(model, DataLoader(DATA, batch_size=8), VALID, WeightDecay(0.0), optimizer=lambda p: SGD(p, 1e-4), epochs=1)
    optimizer = SGD(other.parameters(), 1e-4)
    for x, y in ((ROWS[:8], ROWS[:8, 0]), (ROWS[8:], ROWS[8:, 0])):
        optimizer.zero_grad()
        F.mse_loss(other(x)[:, 0], y).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_norm_that_the_cocktail_inserts_counts_too_and_schedules_count_true_steps() -> None:
    model, rates = net(norm=False), []
    seen = seen_by(model)
    mix = gf.Cocktail(BatchNorm(), gf.Dropout(gf.schedules.linear(0.0, 0.5, epochs=1)))
    model[0].register_forward_hook(lambda m, *_: rates.append(model[1].dropout.p if m.training and seen else None))
    with pytest.warns(GoodfitWarning, match="17 rows"):
        fit(model, DataLoader(DATA, batch_size=8), VALID, mix, epochs=2)
    assert seen[1:] == [8, 9, 8, 9]  # building has looked at the example first
    assert [r for r in rates if r is not None] == [0.0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ("train", "sizes"),
    [
        (DataLoader(DATA, batch_sampler=[[*range(8)], [*range(8, 16)], [16]]), [8, 9]),
        (DataLoader(Stream(), batch_size=8), [8, 9]),
        (Stream(129), [128, 1]),
    ],
)
def test_what_cannot_be_foreseen_is_told_when_it_happens(train: Any, sizes: list[int]) -> None:
    if isinstance(train, Stream):
        train.rows = 17
        sizes = [17]
    model = net()
    seen = seen_by(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(model, train, VALID, WeightDecay(0.01), epochs=2)
    assert seen == sizes * 2
    assert [str(w.message)[:35] for w in told] == (["A single row of train joins the bat"] if len(sizes) > 1 else [])


@pytest.mark.parametrize(
    ("model", "train"),
    [
        (net(norm=False), DataLoader(DATA, batch_size=8)),
        (net(), DataLoader(DATA, batch_size=8, drop_last=True)),
        (net(), DataLoader(DATA, batch_size=5)),
        (nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 1)), (ROWS, ROWS[:, 0])),
    ],
)
def test_nothing_is_told_where_nothing_is_done(model: nn.Module, train: Any) -> None:
    fit(model.double(), train, VALID, WeightDecay(0.01), epochs=1, batch_size=8)  # a warning is an error here


def test_a_frozen_norm_needs_no_repair() -> None:
    model = net()
    model.train()
    model[1].eval()
    seen = seen_by(model)
    fit(model, DataLoader(DATA, batch_size=8), VALID, WeightDecay(0.01), epochs=1)
    assert seen == [8, 8, 1]


def test_the_validation_data_may_end_with_one_row() -> None:
    fit(net(), DataLoader(DATA, batch_size=17), DataLoader(DATA, batch_size=8), WeightDecay(0.01), epochs=1)


def images(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(size), nn.Flatten(), nn.Linear(4 * size**2, 1)
    )


@pytest.mark.parametrize(
    ("train", "size"), [((ROWS, ROWS[:, 0]), 1), ((ROWS[:1], ROWS[:1, 0]), 8), (DataLoader(DATA, batch_size=1), 1)]
)
def test_batches_of_one_row_are_refused_where_a_norm_has_one_value(train: Any, size: int) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GoodfitError, match="train gives batches of one row, of which the batch norm '1' has one value"):
        fit(model, train, VALID, WeightDecay(0.01), epochs=1, batch_size=size)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model[1]._forward_pre_hooks
    model[1].eval()
    fit(model, train, VALID, WeightDecay(0.01), epochs=1, batch_size=size)


def test_batches_of_one_image_train() -> None:
    x, y = torch.randn(5, 3, 4, 4), torch.randn(5)
    fit(images(2), (x, y), (x, y), WeightDecay(0.01), epochs=1, batch_size=1)
    inner = nn.Sequential(nn.AdaptiveAvgPool2d(1), images(1))
    with pytest.raises(GoodfitError, match=r"the batch norm '1\.1' has one value"):
        fit(inner, (x, y), (x, y), WeightDecay(0.01), epochs=1, batch_size=1)


def test_a_path_of_a_network_is_spared_too() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))

    x = torch.randn(9, 3)
    data = (x, x[:, 0])
    with pytest.warns(GoodfitWarning, match="train has 9 rows in batches of 4"):
        path = gf.path(build, DataLoader(TensorDataset(*data), batch_size=4), data, over=gf.L1, lams=[0.1, 1.0], epochs=1)
    assert len(path.points) == 2


# gradient accumulation


def loop(model: nn.Module, parts: int, steps: int = 3, mix: Any = None, none: bool = True, **how: Any) -> list[str]:
    """A loop of one's own with an attached run; what is told."""
    run = gf.Run(mix or WeightDecay(0.01), model, **how)
    optimizer = SGD(model.parameters(), 1e-3)
    run.attach(optimizer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=none)
            for x in ROWS[:16].chunk(parts):
                model(x).square().mean().backward()
            optimizer.step()
    return [str(w.message) for w in told if w.category is GoodfitWarning]


@pytest.mark.parametrize("none", [True, False])
def test_accumulation_beside_a_batch_norm_is_told_once(none: bool) -> None:
    model = net()
    told = loop(model, 4, none=none)
    assert len(told) == 1
    assert "the batch norm '1' normalizes each by its own statistics" in told[0]
    assert not model._forward_hooks
    assert not model[1].weight._post_accumulate_grad_hooks
    assert loop(net(), 1, none=none) == []
    assert loop(net(norm=False), 4, none=none) == []


def test_the_reference_loop_is_told_too() -> None:
    model = net()
    run = gf.Run(WeightDecay(0.01), model, loss=lambda o, y: (o[:, 0] - y).square().mean())
    optimizer = SGD(model.parameters(), 1e-3)

    def train() -> None:
        for _ in range(4):
            optimizer.zero_grad()
            for x in ROWS[:16].chunk(2):
                run.loss(*run.batch(x, x[:, 0])).backward()
            run.gradient(optimizer)
            optimizer.step()
            run.step(optimizer)

    with pytest.warns(GoodfitWarning, match="gradients of several batches go into one step") as told:
        train()
    assert len(told) == 1


def test_a_model_that_is_built_by_its_first_batch_is_told_too() -> None:
    model = net(norm=False)
    run = gf.Run(BatchNorm(), model)
    model(ROWS)
    optimizer = SGD(model.parameters(), 1e-3)
    run.attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        for x in ROWS[:16].chunk(2):
            model(x).square().mean().backward()
        optimizer.step()

    with pytest.warns(GoodfitWarning, match=r"the batch norm '0\.batchnorm'"):
        step()


def test_what_is_no_accumulation_is_not_told() -> None:
    model = net()
    run = gf.Run(WeightDecay(0.01), model)
    optimizer = SGD(model.parameters(), 1e-3)
    run.attach(optimizer)

    def siamese() -> None:
        (model(ROWS) - model(ROWS.flip(0) + 1)).square().mean().backward()

    def two_losses() -> None:
        y = model(ROWS)
        y.square().mean().backward(retain_graph=True)
        y.abs().mean().backward()

    def sharpness() -> None:
        model(ROWS).square().mean().backward()
        optimizer.zero_grad()
        model(ROWS).square().mean().backward()

    def late_zero() -> None:
        y = model(ROWS).square().mean()
        optimizer.zero_grad()
        y.backward()

    def looking() -> None:
        with torch.no_grad():
            model(ROWS)
        model(ROWS).square().mean().backward()
        model.eval()
        model(ROWS).square().mean().backward()
        model.train()

    def checkpointed() -> None:
        torch.utils.checkpoint.checkpoint(model, ROWS.clone().requires_grad_(), use_reentrant=False).square().mean().backward()

    def looking_between() -> None:
        y = model(ROWS)
        y.square().mean().backward(retain_graph=True)
        with torch.no_grad():
            model(ROWS)
        y.abs().mean().backward()

    def asking() -> None:
        model(ROWS).square().mean().backward()
        torch.autograd.grad(model(ROWS).square().mean(), list(model.parameters()))

    parts = (siamese, two_losses, sharpness, late_zero, looking, checkpointed, looking_between, asking)
    for part in parts:
        for _ in range(2):
            optimizer.zero_grad()
            part()
            optimizer.step()  # a warning is an error here


class Checkpointed(nn.Module):
    """One norm in two segments that are run again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.reentrant = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(2):
            h = torch.utils.checkpoint.checkpoint(lambda q: self.last(self.norm(q)).relu(), h, use_reentrant=self.reentrant)
        return h


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_segments_are_told_apart_from_batches(reentrant: bool) -> None:
    assert loop(Checkpointed(reentrant), 1) == []
    assert len(loop(Checkpointed(reentrant), 2)) == 1
    model = Checkpointed(reentrant)
    run = gf.Run(WeightDecay(0.01), model)
    optimizer = SGD(model.parameters(), 1e-3)
    run.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        y = model(ROWS)
        y.square().mean().backward(retain_graph=True)
        y.abs().mean().backward()  # a second loss of one batch; a warning is an error here
        optimizer.step()


def test_both_runs_before_both_gradients_are_accumulation() -> None:
    model = net()
    run = gf.Run(WeightDecay(0.01), model)
    run.attach(SGD(model.parameters(), 1e-3))
    losses = [model(x).square().mean() for x in ROWS[:16].chunk(2)]
    losses[0].backward()
    with pytest.warns(GoodfitWarning, match="several batches go into one step"):
        losses[1].backward()


@pytest.mark.parametrize("how", [{"affine": False}, {"track_running_stats": False}, {}])
def test_norms_without_weights_or_statistics_are_told_too(how: dict[str, bool]) -> None:
    model = net()
    model[1] = nn.BatchNorm1d(8, **how)
    if not how:
        model[1].requires_grad_(False)
    assert len(loop(model, 2)) == 1
    assert loop(model, 1) == []


def test_frozen_norms_and_ghosts_may_accumulate() -> None:
    def ghost(model: nn.Module) -> None:
        gf.convert_batchnorm(model, "ghost", size=4)

    for spare in (lambda m: m[1].eval(), gf.freeze_batchnorm, ghost):
        model = net()
        model.train()
        spare(model)
        assert loop(model, 4) == []


def test_the_watch_ends_after_the_first_steps() -> None:
    model = net()
    assert loop(model, 1, steps=11) == []
    assert not model._forward_hooks
    assert not model[1].weight._post_accumulate_grad_hooks


def test_the_watch_ends_with_its_run_and_copies_are_not_watched() -> None:
    model = net()
    run = gf.Run(WeightDecay(0.01), model)
    run.attach(SGD(model.parameters(), 1e-3))
    assert model._forward_hooks
    assert model[1].weight._post_accumulate_grad_hooks
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other[1].weight._post_accumulate_grad_hooks
        for x in ROWS[:16].chunk(2):
            other(x).square().mean().backward()  # a warning is an error here
    del run
    gc.collect()
    assert not model._forward_hooks
    assert not model[1].weight._post_accumulate_grad_hooks


def test_a_watched_model_compiles_whole() -> None:
    model = net()
    run = gf.Run(WeightDecay(0.01), model)
    run.attach(SGD(model.parameters(), 1e-3))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        compiled(ROWS).square().mean().backward()


def test_a_norm_converted_meanwhile_is_not_watched() -> None:
    model = net().double()
    run = gf.Run(WeightDecay(0.01), model)
    optimizer = SGD(model.parameters(), 1e-3)
    run.attach(optimizer)
    gf.convert_batchnorm(model, "group", [ROWS])
    for _ in range(2):
        for x in ROWS[:16].chunk(2):
            model(x).square().mean().backward()
        optimizer.step()
