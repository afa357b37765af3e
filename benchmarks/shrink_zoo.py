"""How `gf.shrink` does on model zoos: how many architectures shrink, how many are refused and why, and that none is wrong.

    python -m venv zoo && zoo/bin/pip install torch numpy pillow pyyaml safetensors huggingface_hub transformers
    zoo/bin/pip install --no-deps torchvision timm
    PYTHONPATH=src zoo/bin/python benchmarks/shrink_zoo.py [--stub FOLDER_OF_ZOO_STUB] [--only GLOB] [--largest 150]

Each model gets random weights, random batch norm statistics and scales, zeros in a seeded 30 % of the rows of its linear and
convolution layers (weight and bias), and one head in three of its attention where that is told by names. It is shrunk on one
example; that nothing is wrong is checked on *fresh* random inputs in float64. Writes shrink_zoo.csv beside itself.
"""

from __future__ import annotations

import time
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from zoo import Build, as_double, asked, counts, recorded, zoo

import goodfit as gf
from goodfit.surgery.proof import answers, largest_error

COLUMNS = ["model", "status", "before", "after", "flops", "latency", "heads", "kept", "error", "seconds", "reason"]


def prepare(model: nn.Module) -> nn.Module:
    """Random statistics, and zeros in three rows of ten and in one head of three."""
    with torch.no_grad():
        module: Any
        for module in model.modules():
            weight: Any = getattr(module, "weight", None)
            if isinstance(module, nn.modules.batchnorm._NormBase):
                for tensor in (module.weight, module.running_var):
                    if tensor is not None:
                        tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    if tensor is not None:
                        tensor.normal_(0, 0.3)
            elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or hasattr(module, "nf"):
                axis = 1 if getattr(module, "transposed", False) or hasattr(module, "nf") else 0
                rows = torch.rand(weight.shape[axis]) < 0.3
                weight.index_fill_(axis, rows.nonzero().flatten(), 0.0)
                if module.bias is not None and len(rows) == len(module.bias):
                    module.bias[rows] = 0.0
        for module in model.modules():
            _zero_heads(module)
    return model


def _zero_heads(module: Any) -> None:
    inner = getattr(module, "self", module)
    holders = (inner, getattr(inner, "config", None))
    names = ("num_heads", "num_attention_heads", "n_heads")
    heads = next((n for holder in holders for k in names if isinstance(n := getattr(holder, k, None), int)), 0)
    beside = getattr(module, "output", module) if inner is not module else module
    outs = ("out_proj", "proj", "dense", "o_proj", "c_proj", "out_lin", "o")
    out = next((m for k in outs if isinstance(m := getattr(beside, k, None), nn.Linear) or hasattr(m, "nf")), None)
    if heads > 1 and out is not None and "ttention" in type(module).__name__:
        axis = 0 if hasattr(out, "nf") else 1
        width, rest = divmod(out.weight.shape[axis], heads)
        if rest == 0:
            out.weight.narrow(axis, 0, width * max(1, heads // 3)).zero_()


def measure(name: str, build: Build, largest: float) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"model": name}
    start = time.perf_counter()
    try:
        model, example, fresh = build()
    except Exception as problem:
        return row | {"status": "not built", "reason": f"{type(problem).__name__}: {problem}"[:120]}
    if sum(p.numel() for p in model.parameters()) > largest * 1e6:
        return row | {"status": "skipped", "reason": f"more than {largest:g} M parameters"}
    model = prepare(model).double().eval()
    example, fresh = as_double(example), as_double(fresh)
    try:
        truth = answers(model, fresh)
    except Exception as problem:
        return row | {"status": "not run", "reason": f"{type(problem).__name__}: {problem}"[:120]}
    try:
        result = gf.shrink(model, example)
    except Exception as refusal:
        status = "refused" if isinstance(refusal, gf.GoodfitError) else "BROKEN"
        return row | {"status": status, "reason": str(refusal)[:400], "seconds": round(time.perf_counter() - start, 1)}
    over, error = largest_error(truth, answers(model, fresh))
    heads = sum(count for _, what, count, _ in result.removed if what == "heads")
    row |= {"status": "WRONG" if over > 100 else "shrunk" if result.removed else "nothing to remove", "error": f"{error:.1e}"}
    row |= {"before": result.parameters[0], "after": result.parameters[1], "heads": heads}
    row |= {"flops": round(result.flops[1] / max(result.flops[0], 1), 3)}
    row |= {"latency": round(result.latency[1] / result.latency[0], 3), "seconds": round(time.perf_counter() - start, 1)}
    why = sorted({reason for _, _, reason in result.kept})
    return row | {"kept": sum(n for _, n, _ in result.kept), "reason": "; ".join(r for r in why if "read by" not in r)[:200]}


def main() -> None:
    """Print one line for each model, and the sums."""
    options = asked(__doc__, __file__, largest=150).parse_args()
    found = (measure(name, build, options.largest) for name, build in zoo(options.stub) if fnmatch(name, options.only))
    rows = recorded(found, COLUMNS, options.out)
    for family in ("torchvision", "timm", "transformers"):
        print(family, counts((r for r in rows if r["model"].startswith(family)), "status"))


if __name__ == "__main__":
    main()
