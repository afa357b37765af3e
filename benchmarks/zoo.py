"""The model zoos that the benchmarks of edits run over: builders of models with random weights, and inputs."""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Build", "Row", "as_double", "asked", "counts", "recorded", "vision_zoo", "zoo"]

Build = Callable[[], tuple[nn.Module, Any, Any]]
Row = dict[str, Any]

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


def asked(doc: str | None, script: str, largest: float) -> argparse.ArgumentParser:
    """The options of every run over a zoo; single-threaded and without the models' own warnings from here on."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stub", help="folder of zoo_stub.py, for a torchvision beside a CPU build of torch")
    parser.add_argument("--only", default="*")
    parser.add_argument("--largest", type=float, default=largest, help="skip models with more million parameters")
    parser.add_argument("--out", type=Path, default=Path(script).with_suffix(".csv"))
    return parser


def recorded(rows: Iterable[Row], columns: list[str], out: Path) -> list[Row]:
    """The rows, each printed and written to `out` as it comes: a run of hours may be cut off."""
    told = []
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for row in rows:
            told.append(row)
            writer.writerow(row)
            file.flush()
            print(*(str(row.get(c, ""))[:200] for c in columns), sep="  ", flush=True)
            gc.collect()
    return told


def counts(rows: Iterable[Row], column: str) -> dict[str, int]:
    """How often each word stands in a column, before a colon."""
    return dict(Counter(str(row[column]).partition(":")[0] for row in rows if column in row))


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


def as_double(value: Any) -> Any:
    """Inputs in double precision."""
    if isinstance(value, dict):
        return {k: as_double(v) for k, v in value.items()}
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def vision_zoo(stub: str | None) -> Iterator[tuple[str, Build]]:
    """Every architecture of torchvision but the quantized, of transformers' vision tasks in two layers, and timm's above.

    Of torchvision's detectors it is the backbone: what is behind it needs compiled operations.
    """
    families = list(zoo(stub))
    yield from (one for one in families if one[0].startswith("torchvision"))
    vision: Any = importlib.import_module("torchvision.models")
    plain = set(vision.list_models(module=vision))
    for name in vision.list_models():
        if name not in plain and not name.startswith("quantized"):
            yield f"torchvision/{name}", partial(_task, vision, name)
    hf: Any = importlib.import_module("transformers")
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    tasks = ("IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "OBJECT_DETECTION", "KEYPOINT_DETECTION")
    maps = [getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in (*tasks, "UNIVERSAL_SEGMENTATION")]
    for names in (*maps, auto.MODEL_FOR_BACKBONE_MAPPING_NAMES):
        for config, kinds in names.items():
            for kind in (kinds,) if isinstance(kinds, str) else kinds:
                yield f"transformers/{kind}", partial(_hf_vision, hf, config, kind)
    yield from (one for one in families if one[0].startswith("timm"))


def _task(vision: Any, name: str) -> tuple[nn.Module, Any, Any]:
    numbers: dict[str, Any] = {"weights": None}
    if any(part in name for part in ("rcnn", "fcos", "retinanet", "ssd")):
        numbers["weights_backbone"] = None
        backbone = vision.get_model(name, **numbers).backbone
        side = 300 if name.startswith("ssd") else 96
        return backbone, torch.randn(1, 3, side, side), torch.randn(2, 3, side, side)
    if name.startswith("raft"):
        one, two = ((torch.randn(n, 3, 128, 128), torch.randn(n, 3, 128, 128), 2) for n in (1, 2))
        return vision.get_model(name, **numbers), one, two
    if any(part in name for part in ("deeplab", "fcn", "lraspp")):
        numbers["weights_backbone"] = None
        return vision.get_model(name, **numbers), torch.randn(1, 3, 64, 64), torch.randn(2, 3, 64, 64)
    shape = (3, 16, 224, 224) if name.startswith("mvit") else (3, 14, 224, 224) if name == "s3d" else (3, 4, 32, 32)
    return vision.get_model(name, **numbers), torch.randn(1, *shape), torch.randn(2, *shape)


def _hf_vision(hf: Any, config_name: str, kind: str) -> tuple[nn.Module, Any, Any]:
    config = hf.CONFIG_MAPPING[config_name]()
    for name, number in (("num_hidden_layers", 2), ("encoder_layers", 2), ("decoder_layers", 2)):
        if isinstance(getattr(config, name, None), int) and not hasattr(config, "depths"):
            setattr(config, name, number)
    config.use_pretrained_backbone = False
    size = getattr(config, "image_size", None)
    side = size if isinstance(size, int) else 128
    with torch.device("meta"):  # some have billions of parameters
        count = sum(p.numel() for p in getattr(hf, kind)(config).parameters())
    if count > 150e6:
        raise MemoryError(f"{count / 1e6:.0f} M parameters")
    model = getattr(hf, kind)(config)
    return model, *({"pixel_values": torch.randn(n, 3, side, side)} for n in (1, 2))
