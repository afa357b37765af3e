"""A host that is missing, broken or there under two names; weights that are sharded; a second Regularization."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

import goodfit as gf
from goodfit.adapters.host import Hosted, imported, monitored, refuse_sharded, submodule


def test_a_missing_host_is_one_line_with_the_command() -> None:
    with pytest.raises(gf.GoodfitError, match=r'no_such_host, which is not installed; pip install "goodfit\[lightning\]"'):
        imported("lightning", "no_such.other", "no_such_host")


def test_a_host_that_lacks_something_itself_says_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_host.py").write_text("import no_such_thing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
        imported("lightning", "broken_host")


def test_of_two_names_the_one_in_use_counts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first_host", "second_host"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("second_host")
    assert imported("lightning", "first_host", "second_host").__name__ == "second_host"
    del sys.modules["second_host"]
    assert imported("lightning", "first_host", "second_host").__name__ == "first_host"
    del sys.modules["first_host"]


def test_metrics_and_modules_by_name() -> None:
    assert monitored({"valid_loss": 0.5}, "valid_loss", "the host") == 0.5
    with pytest.raises(gf.GoodfitError, match=r"'valid_loss' must name a metric of .*; the host has: none"):
        monitored({}, "valid_loss", "the host")
    model = nn.Sequential(nn.Linear(1, 1))
    assert submodule(model, "0") is model[0]
    with pytest.raises(gf.GoodfitError, match="Sequential has no submodule '1'; known: 0"):
        submodule(model, "1")


def test_sharded_weights_are_refused(tmp_path: Any) -> None:
    """What FSDP and tensor parallelism make of a weight."""
    group = torch.distributed
    group.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = group.device_mesh.init_device_mesh("cpu", (1,))
        model = nn.Linear(4, 4)
        refuse_sharded(model)
        model.weight = nn.Parameter(group.tensor.distribute_tensor(model.weight.data, mesh, [group.tensor.Shard(0)]))
        with pytest.raises(gf.GoodfitError, match="weight is sharded over processes"):
            refuse_sharded(model)
    finally:
        group.destroy_process_group()


def test_a_second_regularization_may_only_stop() -> None:
    first, stopping = Hosted("L2(0.1)", seed=5), Hosted("EarlyStopping(3), L2(0)", monitor="valid_loss")
    stopping._join([first, stopping])
    assert stopping.seed == first.seed
    more = Hosted("EarlyStopping(3), Dropout(0.1)", monitor="valid_loss")
    with pytest.raises(gf.GoodfitError, match=r"may only stop the training, got Dropout\(0\.1\)"):
        more._join([first, more])
    with pytest.raises(
        gf.GoodfitError, match=r"EMA\(0\.5, warmup=False\) averages weights, of which a second Regularization knows nothing"
    ):
        stopping._join([Hosted(gf.EMA(0.5, warmup=False)), stopping])


# What hosts do with a run, without a host


def test_a_closure_that_runs_no_backward_gives_no_second_gradient() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gf.Run(gf.SAM(0.1), model).attach(optimizer)
    model(torch.ones(2, 3)).sum().backward()
    before = model.weight.detach().clone()
    with pytest.raises(gf.GoodfitError, match="A second gradient needs a closure that runs backward"):
        optimizer.step(lambda: None)
    assert torch.equal(model.weight, before)
    assert model.weight.grad is not None


def test_a_state_that_comes_back_draws_as_it_did() -> None:
    """Also within the very step: what a search for a rate drew before it put the state back does not count."""
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    run = gf.Run("Dropout(0.5)", model, example=torch.ones(2, 3))
    state = run.state_dict()
    first, second = model(torch.ones(2, 3)), model(torch.ones(2, 3))
    assert not torch.equal(first, second)
    run.load_state_dict(state)
    assert torch.equal(model(torch.ones(2, 3)), first)
