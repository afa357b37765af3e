"""Batches of one row, which a batch norm cannot take: foreseen, and joined to the batch before."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, default_collate

from goodfit.batchnorms.present import by_batch
from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.order import Order
from goodfit.rows import joined, rows_of
from goodfit.surgery.running import call_model, quiet

__all__ = ["Merged", "merge_last", "merged_for_norms", "refuse_single_values"]

_WHY = "since a batch norm takes no batch of one"


def merge_last(loader: Iterable[Any]) -> Iterable[Any]:
    """A loader whose last batch is never a single row: such a row joins the batch before it, for models with batch norms.

    Formula:  n rows in batches of b, where n mod b = 1 and n > b: the last batch has b + 1 rows.
    Shapes:   batches keep their form: tensors with rows on axis 0, in tuples, lists and dicts. `len` is there where a
              DataLoader makes a row of each item.
    Ranges:   any iterable of batches. A row that stands alone before the end joins too. Where the loader tells that its last
              batch has more rows, or all have one, it is given back as it is.
    Errors:   GoodfitError while it is iterated, where a single row is of another shape than the batch before.
    Source:   this package; torch's way, drop_last=True, leaves rows out.

    >>> loader = DataLoader(range(5), batch_size=2)
    >>> [len(batch) for batch in loader], [len(batch) for batch in merge_last(loader)]
    ([2, 2, 1], [2, 3])
    """
    foreseen = _foreseen(loader)
    return loader if foreseen is not None and not _single(*foreseen) else Merged(loader)


class Merged:
    """An iterable of batches in which no single row stands behind a batch of several."""

    def __init__(self, loader: Iterable[Any], untold: str = "") -> None:
        self.loader, self.untold = loader, untold

    def __len__(self) -> int:
        foreseen, collate = _foreseen(self.loader), getattr(self.loader, "collate_fn", default_collate)
        if foreseen is None or collate is not default_collate:
            raise TypeError("How many batches come is not known beforehand.")
        return len(self.loader) - _single(*foreseen)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        held, foreseen = None, _foreseen(self.loader)
        until = 0 if foreseen is None else foreseen[0] // foreseen[1] - 1  # no look ahead where the next is known to be whole
        for number, batch in enumerate(self.loader):
            if number < until:
                yield batch
                continue
            if rows_of(batch) == 1 and (rows_of(held) or 0) > 1:
                held = self._joined(held, batch)
                continue
            if held is not None:
                yield held
            held = batch
        if held is not None:
            yield held

    def _joined(self, held: Any, single: Any) -> Any:
        if self.untold:
            warnings.warn(f"A single row of {self.untold} joins the batch before it, {_WHY}.", GoodfitWarning, stacklevel=3)
            self.untold = ""
        try:
            return joined([held, single])
        except GoodfitError as problem:
            raise GoodfitError(
                f"A batch of one row must join the batch before it, but: {problem} Give drop_last=True."
            ) from None


def merged_for_norms(batches: Any, name: str, each: int = 1) -> Any:
    """Batches of fit for a model with batch norms; what is done is told, where it can be before anything is trained.

    each: rows that every process needs of a batch, two where its batch norms are alone with them.
    """
    foreseen, order = _foreseen(batches), _order(batches)
    if isinstance(order, Order):
        order.each = each
    joins = order.joins if isinstance(order, Order) else 1 if foreseen is not None and _single(*foreseen) else 0
    if joins and foreseen is not None:
        rows, size = foreseen
        last = "last row joins" if joins == 1 else f"last {joins} rows join"
        warnings.warn(
            f"{name} has {rows} rows in batches of {size}: the {last} the batch before it, {_WHY}.",
            GoodfitWarning,
            stacklevel=3,
        )
    if isinstance(order, Order):
        return batches
    merged = merge_last(batches)
    return Merged(batches, untold=name) if merged is not batches and foreseen is None else merged


def refuse_single_values(model: nn.Module, x: Any) -> None:
    """Refuse training on batches of one row where a batch norm has but one value per channel of them."""
    found: list[str] = []

    def note(name: str) -> Any:
        def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            if values is not None and values.ndim > 1 and values.numel() == values.shape[1]:
                found.append(name)

        return hook

    handles = [m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in by_batch(model).items()]
    try:
        with quiet(model):
            call_model(model, x)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        raise GoodfitError(
            f"train gives batches of one row, of which the batch norm {found[0]!r} has one value per channel, and no variance: "
            "give more rows and a batch_size >= 2, or hold the norm still by gf.freeze_batchnorm(model)."
        )


def _order(batches: Any) -> Any:
    """What decides which rows a batch has, where it is known."""
    return getattr(batches, "order", None) or getattr(batches, "batch_sampler", None)


def _foreseen(batches: Any) -> tuple[int, int] | None:
    """How many rows there are, in batches of how many, the last one shorter; None where that cannot be known beforehand."""
    order = _order(batches)
    if isinstance(order, Order):
        return order.rows, order.size
    if type(batches) is not DataLoader or type(order) is not BatchSampler or isinstance(batches.dataset, IterableDataset):
        return None
    try:
        rows = len(order.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    return rows - (rows % order.batch_size if order.drop_last else 0), order.batch_size


def _single(rows: int, size: int) -> bool:
    return rows > size > 1 and rows % size == 1
