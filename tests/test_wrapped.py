"""Models that are wrapped after building: two real processes under DDP exchange gradients, a compiled model is what runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from goodfit import L1, L2, Cocktail, Dropout, GoodfitError, Run, WeightDecay
from together import in_two_processes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed", "ignore::FutureWarning")
SEEN = torch.linspace(-1, 1, 32, dtype=torch.float64).view(8, 4)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).double()


def train(cocktail: Cocktail, x: torch.Tensor, ddp: bool) -> dict[str, torch.Tensor]:
    model = net()
    run = Run(cocktail, model, example=x, task="numbers")
    wrapped = DistributedDataParallel(model) if ddp else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run.attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        run.loss(x, x.sum(1), through=wrapped).backward()
        optimizer.step()
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def process(rank: int, folder: str) -> None:
    mine = SEEN[rank::2]
    found = {"plain": train(Cocktail(L2(0.01), L1(0.02), WeightDecay(0.1)), mine, ddp=True)}
    found["noisy"] = train(Cocktail(Dropout(0.5)), mine, ddp=True)
    try:
        train(Cocktail(L2(0.01)), mine, ddp=False)
    except GoodfitError as refused:
        found["refused"] = str(refused)
    torch.save(found, f"{folder}/{rank}.pt")


def test_two_processes_equal_one_and_stay_equal_under_noise(tmp_path: Path) -> None:
    in_two_processes(process, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = train(Cocktail(L2(0.01), L1(0.02), WeightDecay(0.1)), SEEN, ddp=False)
    for name, weight in alone.items():
        torch.testing.assert_close(first["plain"][name], weight, rtol=1e-12, atol=1e-14)
        assert torch.equal(first["noisy"][name], second["noisy"][name])
    assert "through=ddp_model" in first["refused"]


def test_a_compiled_model_is_what_runs() -> None:
    model = net()
    run = Run(L2(0.1), model, task="numbers")
    ran: list[int] = []
    compiled = torch.compile(model, backend=lambda graph, inputs: ran.append(1) or graph.forward)
    loss = run.loss(SEEN, SEEN.sum(1), through=compiled)
    assert ran
    assert torch.equal(loss, run.loss(SEEN, SEEN.sum(1)))
