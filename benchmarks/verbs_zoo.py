"""What builds, freezes, samples and recalibrates, on model zoos: right, refused with its reason, or wrong.

    OMP_NUM_THREADS=1 python benchmarks/verbs_zoo.py [--stub DIR] [--only 'timm/*'] [--largest 30] [--seconds 600]

Needs timm, transformers and torchvision (the top of shrink_zoo.py says how). Each verb has a model of its own, with random
weights and statistics, and is judged by what its docstring claims: eval mode unchanged bit by bit, masks that act, buffers
bit-identical, statistics after which eval mode says what train mode says of the data.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from fnmatch import fnmatch
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import Build, Row, as_double, asked, counts, recorded, zoo

import goodfit as gf
from goodfit.dataflow.flows import tensors_in
from goodfit.surgery.proof import answers, largest_error
from goodfit.surgery.running import call_model

BUILDERS = ("Dropout(0.3)", "ChannelDropout(0.3)", "DropPath(0.3)", "DropConnect(0.3)", "AttentionDropout(0.3)", "BatchNorm()")
COLUMNS = ["model", "parameters", *BUILDERS, "freeze", "mc_predict", "recalibrate", "seconds"]


def lively(model: nn.Module) -> None:
    """Random statistics for batch norms, and random numbers where a model starts at zero (heads, layer scales)."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        if float(parameter.detach().abs().max()) < 1e-3:
            nn.init.normal_(parameter, std=0.1)


def differs(model: nn.Module, x: Any) -> bool:
    """Whether inserted noise shows in one pass in train mode, with batch norms in eval mode."""
    before = answers(model, x)
    for module in model.modules():
        module.training = not isinstance(module, _BatchNorm)
    with torch.no_grad():
        torch.manual_seed(1)
        once = list(tensors_in(call_model(model, x)))
    model.eval()
    return len(once) != len(before) or not all(map(torch.equal, once, before))


def builds(text: str) -> Callable[[nn.Module, Any], bool]:
    def right(model: nn.Module, x: Any) -> bool:
        if text == "BatchNorm()":
            text_identity = "BatchNorm(calibrate='identity')"
            model, x = model.double(), as_double(x)
            before = answers(model, x)
            gf.Run(text_identity, model, example=x)
            return largest_error(before, answers(model, x))[0] <= 1
        before, keys = answers(model, x), list(model.state_dict())
        gf.Run(text, model, example=x)
        same = all(torch.equal(a, b) for a, b in zip(before, answers(model, x), strict=True))
        return same and list(model.state_dict()) == keys and differs(model, x)

    return right


def freezes(model: nn.Module, x: Any) -> bool:
    gf.freeze_batchnorm(model)
    before = [b.clone() for b in model.buffers()]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    model.train()
    with torch.no_grad():
        for _ in range(2):
            call_model(model, x)
    held = {id(b) for m in norms for b in m.buffers()}
    return all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True) if id(b) in held)


def samples(model: nn.Module, x: Any) -> bool:
    gf.Run("Dropout(0.3)", model, example=x)
    before, modes = [b.clone() for b in model.buffers()], [m.training for m in model.modules()]
    result = gf.mc_predict(model, x, samples=6)
    again = gf.mc_predict(model, x, samples=6)
    kept = all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    return (
        kept
        and modes == [m.training for m in model.modules()]
        and bool((result.variance > 0).any())
        and torch.equal(result.samples, again.samples)
    )


def recalibrates(model: nn.Module, x: Any) -> bool:
    model, x = model.double(), as_double(x)
    if not gf.recalibrate(model, [x]):
        raise gf.GoodfitError("no batch norm that runs")
    now = answers(model, x)
    for module in model.modules():
        module.training = isinstance(module, _BatchNorm)
    with torch.no_grad():
        whole = list(tensors_in(call_model(model, x)))
    return largest_error(now, whole)[1] <= 1e-9


VERBS = {**{text: builds(text) for text in BUILDERS}, "freeze": freezes, "mc_predict": samples, "recalibrate": recalibrates}


def judged(verb: Callable[[nn.Module, Any], bool], model: nn.Module, x: Any) -> str:
    try:
        return "right" if verb(model, x) else "WRONG"
    except gf.GoodfitError as reason:
        return f"refused: {str(reason)[:120]}"
    except Exception as failure:
        return f"FAILED: {type(failure).__name__}: {str(failure)[:120]}"


def measure(name: str, build: Build, largest: float) -> Row:
    """One model under every verb, a fresh one for each."""
    row: Row = {"model": name}
    start = time.time()
    for verb, right in VERBS.items():
        try:
            model, _, x = build()
        except Exception:
            break
        row["parameters"] = sum(p.numel() for p in model.parameters())
        if row["parameters"] > largest * 1e6:
            break
        lively(model.eval())
        row[verb] = judged(right, model, x)
        del model
        gc.collect()
    return row | {"seconds": round(time.time() - start, 1)}


def main() -> None:
    """Print one line for each model, and the sums."""
    parser = asked(__doc__, __file__, largest=30)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no model after so many")
    options = parser.parse_args()
    began = time.time()
    models = takewhile(lambda _: time.time() - began < options.seconds, zoo(options.stub))
    found = (measure(name, build, options.largest) for name, build in models if fnmatch(name, options.only))
    rows = recorded((row for row in found if row.keys() & VERBS), COLUMNS, options.out)
    for verb in VERBS:
        print(verb, counts(rows, verb))


if __name__ == "__main__":
    main()
