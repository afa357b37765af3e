"""A stack that is killed at any moment goes on to the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = """
import sys
import torch
from safetensors.torch import save_file
from torch import nn
import goodfit as gf

folder, out = sys.argv[1:]
x = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
y = nn.functional.one_hot((x[:, 0] > 0).long() + (x[:, 1] > 1).long(), 3).float()
models = []
for k in range(6):
    torch.manual_seed(k)
    models.append(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
mixes = [
    "BatchNorm(), Dropout(0.2), L1(1e-3), EMA(0.9), EarlyStopping(3)",
    "BatchNorm(), Dropout(0.4), WeightDecay(0.1), EarlyStopping(1)",
    "MixUp(0.4), SAM(0.05), L2(1e-3), EarlyStopping(9)",
    "MixUp(0.1), SAM(0.1), Lookahead(0.5), SWA()",
    "GroupLasso(1e-3), GradientNoise(0.01)",
    "GroupLasso(1e-2), ClipNorm(0.1), Dropout(linear(0, 0.5, steps=60))",
]
stack = gf.Stack(mixes, models, task="classes", example=x[:16], lr=[1e-3 * (k + 1) for k in range(6)], seeds=list(range(6)))
saving = gf.Checkpoints(folder, every=1).watch(stack=stack)
step = saving.restore()
print(step, flush=True)
while step < 96 and stack.members:
    i = 16 * (step % 4)
    stack.learn(x[i : i + 16], y[i : i + 16])
    step += 1
    if step % 4 == 0:
        with stack.view([(x[:64], y[:64])]):
            stack.epoch(stack.score([(x[64:], y[64:])]))
    saving(step)
save_file({f"{k}.{n}": t for k, m in enumerate(stack.finish([(x[:64], y[:64])])) for n, t in m.state_dict().items()}, out)
"""


def started(folder: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(folder), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)


@pytest.mark.slow
def test_a_stack_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = started(tmp_path / "whole", tmp_path / "whole.safetensors")
    whole.communicate(timeout=120)
    assert whole.returncode == 0
    random.seed(3)
    begun, kills = [], 0
    for _ in range(12):
        process = started(tmp_path / "killed", tmp_path / "killed.safetensors")
        assert process.stdout is not None
        begun.append(int(process.stdout.readline()))
        time.sleep(random.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
    if process.returncode != 0:
        process = started(tmp_path / "killed", tmp_path / "killed.safetensors")
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert kills >= 4
    assert begun == sorted(begun)
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[name]) for name, t in one.items())
