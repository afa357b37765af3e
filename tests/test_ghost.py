"""Ghost batch norm: chunks of a batch are normalized apart, as a loop over them would, and eval is torch's own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from goodfit.layers.ghost import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d

KINDS: list[tuple[Any, Any, tuple[int, ...]]] = [
    (GhostBatchNorm1d, nn.BatchNorm1d, ()),
    (GhostBatchNorm1d, nn.BatchNorm1d, (5,)),
    (GhostBatchNorm2d, nn.BatchNorm2d, (3, 2)),
    (GhostBatchNorm3d, nn.BatchNorm3d, (2, 2, 1)),
]
kinds = pytest.mark.parametrize(("kind", "plain", "space"), KINDS, ids=["rows", "1d", "2d", "3d"])


def pair(kind: Any = GhostBatchNorm2d, plain: Any = nn.BatchNorm2d, size: int = 4, **how: Any) -> tuple[Any, Any]:
    """A ghost norm and torch's, with the same numbers."""
    ghost, other = kind(3, **how), plain(3, **how)
    ghost.size = size
    for p in other.parameters():
        nn.init.normal_(p)
    ghost.load_state_dict(other.state_dict())
    return ghost, other


def chunks_of(rows: int, size: int, values: int) -> list[int]:
    """What the docstring says: full chunks, then what is left; one value per channel joins the chunk before."""
    sizes = [size] * (rows // size) + ([rows % size] if rows % size else [])
    if len(sizes) > 1 and sizes[-1] * values == 1:
        sizes[-2:] = [sizes[-2] + 1]
    return sizes


@kinds
@given(rows=st.integers(2, 23), size=st.integers(2, 9))
@settings(max_examples=25, deadline=None)
def test_it_is_a_loop_over_chunks(kind: Any, plain: Any, space: tuple[int, ...], rows: int, size: int) -> None:
    torch.set_default_dtype(torch.float64)
    ghost, other = pair(kind, plain, size)
    x = torch.randn(rows, 3, *space)
    sizes = chunks_of(rows, size, x[0, 0].numel())
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = ghost(a)
    meant = [F.batch_norm(c, None, None, other.weight, other.bias, True, 0.1, 1e-5) for c in b.split(sizes)]
    slope = torch.randn_like(x)
    (y * slope).sum().backward()
    (torch.cat(meant) * slope).sum().backward()
    torch.testing.assert_close(y, torch.cat(meant))
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ghost.weight.grad, other.weight.grad)
    torch.testing.assert_close(ghost.bias.grad, other.bias.grad)
    axes = [i for i in range(x.ndim) if i != 1]
    seen = zip(sizes, x.split(sizes), strict=True)
    mean, var = (sum(parts) / rows for parts in zip(*((n * c.mean(axes), n * c.var(axes)) for n, c in seen), strict=True))
    torch.testing.assert_close(ghost.running_mean, 0.1 * mean)
    torch.testing.assert_close(ghost.running_var, 0.9 + 0.1 * var)
    torch.testing.assert_close(ghost.running_mean, 0.1 * x.mean(axes))


def test_statistics_by_hand() -> None:
    """Chunks (0, 2), (10, 14) and (5, 6, 7): means 1, 12, 6, unbiased variances 2, 8, 1, by rows 2, 2, 3."""
    ghost = GhostBatchNorm1d(1, affine=False, momentum=1.0, eps=1e-12)
    ghost.size = 2
    y = ghost(torch.tensor([[0.0], [2], [10], [14], [5], [6], [7]]))
    edge = 1.5**0.5
    assert torch.allclose(y.flatten(), torch.tensor([-1, 1, -1, 1, -edge, 0, edge]))
    assert float(ghost.running_mean) == pytest.approx(44 / 7)
    assert float(ghost.running_var) == pytest.approx((2 * 2 + 2 * 8 + 3 * 1) / 7)


@kinds
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_eval_and_small_batches_are_bitwise_torchs(kind: Any, plain: Any, space: tuple[int, ...], rows: int) -> None:
    ghost, other = pair(kind, plain, size=5)
    x = torch.randn(rows, 3, *space)
    if x.numel() > 3:
        assert torch.equal(ghost(x), other(x))
    assert all(torch.equal(a, b) for a, b in zip(ghost.state_dict().values(), other.state_dict().values(), strict=True))
    ghost.eval()
    many = torch.cat([x] * 4)
    before = copy.deepcopy(ghost.state_dict())
    assert torch.equal(ghost(many), other.eval()(many))
    assert all(torch.equal(before[k], v) for k, v in ghost.state_dict().items())


def test_one_value_per_channel_is_refused_as_torch_does() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        pair(GhostBatchNorm1d, nn.BatchNorm1d)[0](torch.randn(1, 3))
    assert pair(GhostBatchNorm1d, nn.BatchNorm1d, 2)[0](torch.randn(3, 3)).shape == (3, 3)


def test_the_cumulative_average_counts_batches() -> None:
    ghost, _ = pair(momentum=None)
    batches = [torch.randn(8, 3, 2, 2) + i for i in range(3)]
    for x in batches:
        ghost(x)
    assert int(ghost.num_batches_tracked) == 3
    torch.testing.assert_close(ghost.running_mean, torch.cat(batches).mean((0, 2, 3)))


def test_without_running_statistics() -> None:
    ghost, other = pair(track_running_stats=False)
    x = torch.randn(8, 3, 2, 2)
    torch.testing.assert_close(ghost(x), torch.cat([other(c) for c in x.split(4)]))
    assert torch.equal(ghost.eval()(x), other.eval()(x))


def test_without_bias_or_affine() -> None:
    x = torch.randn(8, 3, 2, 2)
    for how in ({"affine": False}, {"bias": False}):
        ghost, other = pair(**how)
        torch.testing.assert_close(ghost(x), torch.cat([other(c) for c in x.split(4)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("whole", [True, False])
def test_half_precision(dtype: torch.dtype, whole: bool) -> None:
    ghost, other = pair()
    ghost, other = (m.to(dtype if whole else torch.float32) for m in (ghost, other))
    x = torch.randn(10, 3, 4, 4).to(dtype)
    y = ghost(x)
    assert y.dtype == dtype
    meant = torch.cat([other(c) for c in x.split(4)])
    torch.testing.assert_close(y, meant, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(ghost.running_mean.double(), 0.1 * x.double().mean((0, 2, 3)), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("rows", [8, 10])
def test_channels_last_stays(rows: int) -> None:
    for kind, plain, space, layout in (
        (GhostBatchNorm2d, nn.BatchNorm2d, (4, 5), torch.channels_last),
        (GhostBatchNorm3d, nn.BatchNorm3d, (2, 4, 5), torch.channels_last_3d),
    ):
        ghost, _ = pair(kind, plain)
        again = copy.deepcopy(ghost)
        x = torch.randn(rows, 3, *space)
        y = ghost(x.contiguous(memory_format=layout))
        assert y.is_contiguous(memory_format=layout)
        torch.testing.assert_close(y, again(x), check_stride=False)


def test_shapes_are_checked_as_torch_does() -> None:
    for ghost in (GhostBatchNorm2d(3), GhostBatchNorm2d(3).eval()):
        with pytest.raises(ValueError, match="expected 4D input"):
            ghost(torch.randn(64, 3))


def test_it_is_a_batch_norm_that_can_be_copied_pickled_and_shown() -> None:
    ghost, _ = pair(size=7)
    assert isinstance(ghost, GhostBatchNorm)
    assert isinstance(ghost, nn.BatchNorm2d)
    assert ghost.state_dict().keys() == nn.BatchNorm2d(3).state_dict().keys()
    x = torch.randn(20, 3, 2, 2)
    for other in (copy.deepcopy(ghost), pickle.loads(pickle.dumps(ghost))):
        assert torch.equal(other(x), copy.deepcopy(ghost)(x))
    assert repr(ghost).endswith("track_running_stats=True, size=7)")


def test_many_at_once_under_vmap() -> None:
    norms = [pair(size=3)[0] for _ in range(2)]
    for norm in norms:
        nn.init.normal_(norm.weight)
    weights, buffers = torch.func.stack_module_state(norms)
    x = torch.randn(2, 7, 3, 2, 2)

    def one(w: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(norms[0], (w, b), (x,))

    y = torch.func.vmap(one)(weights, buffers, x)
    for i, norm in enumerate(norms):
        torch.testing.assert_close(y[i], norm(x[i]))
        torch.testing.assert_close(buffers["running_var"][i], norm.running_var)


def test_compiled_it_says_the_same() -> None:
    ghost, _ = pair(size=4)
    ghost, again, x = ghost.float(), copy.deepcopy(ghost).float(), torch.randn(10, 3, 2, 2).float()
    torch.testing.assert_close(torch.compile(ghost, backend="aot_eager")(x), again(x))
    torch.testing.assert_close(ghost.running_var, again.running_var)
