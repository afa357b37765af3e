"""The best weights and buffers in a file, for who has no room for a second copy in memory."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from goodfit.errors import GoodfitError

__all__ = ["is_kept", "read", "write"]

FORMAT = "goodfit kept 1"


def write(path: str | Path, tensors: Mapping[str, Tensor], run: str = "") -> None:
    """Write named tensors of a run into a safetensors file, whole or not at all: it replaces the one that is there."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    apart = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}  # tied memory is refused
    try:
        save_file(apart, draft, metadata={"format": FORMAT, "run": run})
        os.replace(draft, path)
    except (OSError, SafetensorError, ValueError, KeyError) as wrong:
        raise GoodfitError(f"The best weights cannot be kept in {str(path)!r} ({_line(wrong)}); give another path.") from None
    finally:
        draft.unlink(missing_ok=True)


def is_kept(path: Path) -> bool:
    """Whether a file is one that `write` wrote."""
    try:
        read(path)
    except GoodfitError:
        return False
    return True


def read(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """The tensors that `write` wrote, on the CPU, and the run that they are of."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError("another format")
            return {name: file.get_tensor(name) for name in file.keys()}, about.get("run", "")  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValueError) as wrong:
        raise GoodfitError(
            f"{str(path)!r} must be a file in which goodfit kept the best weights, and cannot be read ({_line(wrong)}); give "
            "the path that EarlyStopping(...).watch(model, keep=path) has written."
        ) from None


def _line(wrong: Exception) -> str:
    return (str(wrong).strip().splitlines() or [type(wrong).__name__])[0][:200]
