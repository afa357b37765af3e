"""How `gf.shrink` does on model zoos: how many architectures shrink, how many are refused and why, and that none is wrong.

    python -m venv zoo && zoo/bin/pip install torch numpy pillow pyyaml safetensors huggingface_hub transformers
    zoo/bin/pip install --no-deps torchvision timm
    PYTHONPATH=src zoo/bin/python benchmarks/shrink_zoo.py [--stub FOLDER_OF_ZOO_STUB] [--only GLOB] [--largest 150]

Each model gets random weights, random batch norm statistics and scales, zeros in a seeded 30 % of the rows of its linear and
convolution layers (weight and bias), and one head in three of its attention where that is told by names. It is shrunk on one
example; that nothing is wrong is checked on *fresh* random inputs in float64. Writes shrink_zoo.csv beside itself.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import goodfit as gf
from goodfit.surgery.proof import answers, largest_error

Build = Callable[[], tuple[nn.Module, Any, Any]]

TIMM = (
    "resnet18 resnetv2_50 resnext50_32x4d res2net50_26w_4s seresnet50 skresnet18 resnest14d ecaresnet26t "
    "convnext_atto convnextv2_atto efficientnet_b0 mobilenetv3_small_100 mobilenetv4_conv_small mnasnet_small "
    "ghostnet_100 fbnetc_100 mixnet_s tinynet_e regnety_002 regnetx_002 densenet121 vgg11 inception_v3 "
    "inception_v4 xception41 dpn48b dla34 hrnet_w18_small vovnet39a vit_tiny_patch16_224 deit_tiny_patch16_224 "
    "deit3_small_patch16_224 beit_base_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224 "
    "swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 mixer_s32_224 gmlp_ti16_224 resmlp_12_224 poolformer_s12 "
    "pvt_v2_b0 coat_tiny levit_128s mobilevit_xxs mobileone_s0 edgenext_xx_small efficientformer_l1 fastvit_t8 "
    "repvgg_a0 nf_resnet26 nfnet_l0 rexnet_100 tf_efficientnetv2_b0 lcnet_050 hardcorenas_a cspresnet50 "
    "cspdarknet53 gernet_s crossvit_tiny_240 volo_d1_224 maxvit_rmlp_pico_rw_256 coatnet_pico_rw_224 "
    "eva02_tiny_patch14_224 visformer_tiny convmixer_768_32 hgnet_tiny starnet_s1 inception_next_tiny "
    "focalnet_tiny_srf davit_tiny mambaout_femto caformer_s18 tiny_vit_5m_224 repvit_m1 tresnet_m"
)

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 96, "vocab_size": 101}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
TEXTS: dict[str, dict[str, Any]] = {
    "Bert": SMALL,
    "Roberta": SMALL,
    "Electra": {**SMALL, "embedding_size": 48},
    "Albert": {**SMALL, "embedding_size": 24},
    "MPNet": SMALL,
    "GPT2": {"n_embd": 48, "n_layer": 2, "n_head": 6, "vocab_size": 101, "n_positions": 64},
    "GPTNeoX": SMALL,
    "OPT": {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 48, "max_position_embeddings": 64},
    "Llama": {**SMALL, "num_key_value_heads": 6},
    "Mistral": {**SMALL, "num_key_value_heads": 3},
    "Qwen2": {**SMALL, "num_key_value_heads": 6},
    "DistilBert": {"dim": 48, "n_layers": 2, "n_heads": 6, "hidden_dim": 96, "vocab_size": 101},
    "T5Encoder": {"d_model": 48, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 6, "vocab_size": 101},
}
IMAGES: dict[str, dict[str, Any]] = {
    "ViT": IMAGE,
    "DeiT": IMAGE,
    "Dinov2": {**IMAGE, "mlp_ratio": 2},
    "CLIPVision": IMAGE,
    "SiglipVision": IMAGE,
    "Beit": IMAGE,
    "Swin": {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4},
    "ConvNext": {"hidden_sizes": [24, 48], "depths": [2, 2], "num_stages": 2, "image_size": 32},
    "ResNet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2]},
    "Segformer": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
}


def zoo(stub: str | None) -> Iterator[tuple[str, Build]]:
    """Names and builders: (model, example, fresh input)."""
    if stub:
        sys.path.insert(0, stub)
        importlib.import_module("zoo_stub")
    hf: Any = importlib.import_module("transformers")
    for kinds, images in ((TEXTS, False), (IMAGES, True)):
        for name, numbers in kinds.items():
            yield f"transformers/{name}", partial(_hf, hf, name, numbers, images)
    vision: Any = importlib.import_module("torchvision.models")
    for name in vision.list_models(module=vision):
        yield f"torchvision/{name}", partial(_vision, vision, name)
    timm: Any = importlib.import_module("timm")
    for name in TIMM.split():
        yield f"timm/{name}", partial(_timm, timm, name)


def _vision(vision: Any, name: str) -> tuple[nn.Module, Any, Any]:
    fixed = {"vit": 224, "maxvit": 224, "inception": 96, "swin": 64, "alexnet": 64}
    side = next((size for start, size in fixed.items() if name.startswith(start)), 64)
    numbers: dict[str, Any] = {"weights": None, "num_classes": 10}
    if name in {"googlenet", "inception_v3"}:
        numbers["init_weights"] = False
    if name.startswith("vit"):
        side = 64 if not name.startswith("vit_h") else 56
        numbers["image_size"] = side
    return vision.get_model(name, **numbers), torch.randn(1, 3, side, side), torch.randn(2, 3, side, side)


def _timm(timm: Any, name: str) -> tuple[nn.Module, Any, Any]:
    model = timm.create_model(name, pretrained=False, num_classes=10)
    side = model.pretrained_cfg["input_size"][-1] if _fixed(model) else 96
    return model, torch.randn(1, 3, side, side), torch.randn(2, 3, side, side)


def _fixed(model: Any) -> bool:
    return bool(model.pretrained_cfg.get("fixed_input_size")) or any(
        "pos_emb" in n or "relative" in n for n, _ in model.named_parameters()
    )


def _hf(hf: Any, name: str, numbers: dict[str, Any], images: bool) -> tuple[nn.Module, Any, Any]:
    kind = {"T5Encoder": "T5", "CLIPVision": "CLIPVision", "SiglipVision": "SiglipVision"}.get(name, name)
    config = getattr(hf, f"{kind}Config")(**numbers)
    config.use_cache = False  # a cache is an output, and keeps what it holds
    model = getattr(hf, f"{name}Model")(config)
    if images:
        return model, *({"pixel_values": torch.randn(n, 3, 32, 32)} for n in (1, 2))
    return model, *({"input_ids": torch.randint(3, 100, (n, 7))} for n in (1, 2))


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
    example, fresh = _double(example), _double(fresh)
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


def _double(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _double(v) for k, v in value.items()}
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def main() -> None:
    """Print one line for each model, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stub", help="folder of zoo_stub.py, for a torchvision beside a CPU build of torch")
    parser.add_argument("--only", default="*")
    parser.add_argument("--largest", type=float, default=150, help="skip models with more million parameters")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    columns = ["model", "status", "before", "after", "flops", "latency", "heads", "kept", "error", "seconds", "reason"]
    rows = []
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for name, build in zoo(options.stub):
            if fnmatch(name, options.only):
                rows.append(measure(name, build, options.largest))
                writer.writerow(rows[-1])
                file.flush()
                print(*(rows[-1].get(c, "") for c in columns), sep="  ", flush=True)
                gc.collect()
    for family in ("torchvision", "timm", "transformers"):
        own = [r["status"] for r in rows if r["model"].startswith(family)]
        print(family, {status: own.count(status) for status in dict.fromkeys(own)})


if __name__ == "__main__":
    main()
