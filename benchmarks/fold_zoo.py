"""How `gf.fold_batchnorm` does on vision models, beside torch's own fuser: what is folded, what is refused, and why.

    python -m venv zoo && zoo/bin/pip install torch numpy pillow pyyaml safetensors huggingface_hub transformers
    zoo/bin/pip install --no-deps torchvision timm
    PYTHONPATH=src zoo/bin/python benchmarks/fold_zoo.py [--stub FOLDER_OF_ZOO_STUB] [--only GLOB] [--largest 150]

Each model gets random weights, and random statistics, scales and shifts of its batch norms, so that no fold is the identity.
It is folded in float32 and, where it runs so, in float64; that nothing is wrong is checked on *fresh* inputs by goodfit's
bounds, and so is `torch.fx.experimental.optimization.fuse` in the finer of the two. latency is after over before, in float32.
Where float32 differs by more than its bound, rounding says how far the model is from float64, before and after the fold.
Writes fold_zoo.csv beside itself, line by line.
"""

from __future__ import annotations

import copy
import time
from fnmatch import fnmatch
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.optimization import fuse
from zoo import Build, as_double, asked, counts, recorded, vision_zoo

import goodfit as gf
from goodfit.folding.affine import batch_norms
from goodfit.surgery.proof import answers, largest_error

Case = tuple[nn.Module, Any, Any]  # model, example, fresh input

COLUMNS = ["model", "norms", "folded", "kept", "status", "error32", "rounding", "error64"]
COLUMNS += ["torch", "torch folded", "torch error", "behind", "latency", "seconds", "reason"]


def prepare(model: nn.Module) -> nn.Module:
    """Random statistics, scales and shifts."""
    with torch.no_grad():
        for module in batch_norms(model):
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if name in ("weight", "running_var"):
                    tensor.uniform_(0.5, 1.5)
                elif name in ("bias", "running_mean"):
                    tensor.normal_(0, 0.3)
    return model.eval()


def ours(models: dict[str, Case]) -> dict[str, Any]:
    """What the fold makes of the model in each precision."""
    row: dict[str, Any] = {}
    states: dict[str, str] = {}
    exact = answers(models["64"][0], models["64"][2]) if "64" in models else None
    for bits, (model, example, fresh) in models.items():
        truth = answers(model, fresh)
        try:
            result = gf.fold_batchnorm(model, example)
        except Exception as refusal:
            states[bits] = "refused" if isinstance(refusal, gf.GoodfitError) else "BROKEN"
            row["reason"] = f"{type(refusal).__name__}: {refusal}"[:300]
            continue
        over, error = largest_error(truth, answers(model, fresh))
        states[bits] = "nothing to fold" if not result.folded else "partly folded" if result.kept else "folded"
        if over > 1:
            states[bits] = "WRONG"
            if exact is not None and bits == "32":
                own, now = (largest_error(exact, said)[1] for said in (truth, answers(model, fresh)))
                row["rounding"] = f"{own:.1e} before, {now:.1e} after"
                states[bits] = "beyond 1e-5 by rounding" if error <= 1e-3 and now <= 2 * own else "WRONG"
        row[f"error{bits}"] = f"{error:.1e}"
        row.setdefault("folded", len(result.folded))
        row.setdefault("kept", len(result.kept))
        row.setdefault("latency", round(result.latency[1] / result.latency[0], 3))
        row.setdefault("reason", "; ".join(" ".join(one) for one in result.kept)[:300])
    same = len(set(states.values())) == 1
    return row | {"status": states["32"] if same else ", ".join(f"{state} in float{bits}" for bits, state in states.items())}


def torchs(model: nn.Module, fresh: Any) -> dict[str, Any]:
    """What torch's fuser makes of the model."""
    truth = answers(model, fresh)
    try:
        traced, fused = symbolic_trace(model), cast(GraphModule, fuse(model))
        over, error = largest_error(truth, answers(fused, fresh))
    except Exception as problem:
        return {"torch": "failed", "torch error": f"{type(problem).__name__}"}
    gone = _norms_called(traced, model) - _norms_called(fused, model)
    return {"torch": "right" if over <= 1 else "WRONG", "torch folded": gone, "torch error": f"{error:.1e}"}


def _norms_called(traced: GraphModule, model: nn.Module) -> int:
    norms = set(batch_norms(model).values())
    return sum(node.op == "call_module" and node.target in norms for node in traced.graph.nodes)


def measure(build: Build, largest: float) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        model, example, fresh = build()
    except MemoryError as problem:
        return {"status": "skipped", "reason": str(problem)}
    except BaseException as problem:
        return {"status": "not built", "reason": f"{type(problem).__name__}: {problem}"[:120]}
    if sum(p.numel() for p in model.parameters()) > largest * 1e6:
        return {"status": "skipped", "reason": f"more than {largest:g} M parameters"}
    row: dict[str, Any] = {"norms": len(batch_norms(prepare(model)))}
    models: dict[str, Case] = {"32": (model, example, fresh)}
    models["64"] = (copy.deepcopy(model).double(), as_double(example), as_double(fresh))
    for bits, (one, _, new) in list(models.items()):
        try:
            answers(one, new)
        except Exception as problem:
            row["reason"] = f"{type(problem).__name__}: {problem}"[:120]
            del models[bits]
    if "32" not in models:
        return row | {"status": "not run"}
    if row["norms"]:
        finest, _, new = list(models.values())[-1]
        row |= torchs(finest, new)
    row |= ours(models)
    row["behind"] = max(0, row.get("torch folded", 0) - row.get("folded", 0)) if row.get("torch") == "right" else 0
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    """Print one line for each model, and the sums."""
    options = asked(__doc__, __file__, largest=150).parse_args()
    models = ((name, build) for name, build in vision_zoo(options.stub) if fnmatch(name, options.only))
    rows = recorded(({"model": name} | measure(build, options.largest) for name, build in models), COLUMNS, options.out)
    for family in ("torchvision", "transformers", "timm"):
        own = [r for r in rows if r["model"].startswith(family)]
        print(family, "ours", counts(own, "status"), "torch's", counts(own, "torch"))
        print(family, "behind torch's fuser:", [r["model"] for r in own if r.get("behind")])


if __name__ == "__main__":
    main()
