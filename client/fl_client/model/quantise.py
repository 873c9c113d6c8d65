"""Quantise a Hugging Face MoE directory to int8 symmetric group-128, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fl_client.model.layout import (
    QUANTISATION_KEY,
    Stored,
    expert_modules,
    quantised_linears,
    read_config,
    skeleton,
    stored_tensors,
)
from fl_client.model.quant_layers import GROUP, quantise_tensor
from fl_shared.errors import ModelError

SHARD_BYTES = 1 << 30
_COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
           "features.safetensors", "report.json", "MODEL_CARD.md")  # fmt: skip


@dataclass(frozen=True, slots=True)
class QuantisationReport:
    """Bytes of all tensors before and after, and of those that were quantised."""

    bytes_before: int
    bytes_after: int
    quantised_before: int
    quantised_after: int


def quantise_directory(
    src: Path,
    out: Path,
    bits: int = 8,
    group: int = GROUP,
    *,
    keep_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> QuantisationReport:
    """Quantise `src` into the new directory `out`.

    One tensor (for fused experts: one expert) is read at a time, and shards of about 1 GiB are written as they fill:
    the float model is never in memory whole.

    Args:
        src: a Hugging Face directory with safetensors weights.
        out: must not exist, or be empty.
        bits: 8, or 4 (same container, 15 levels).
        group: inputs that share a scale.
        keep_dtype: store what stays float (embeddings, norms, router) in this type instead of its own.
        progress: called with (tensors done, tensors in all).

    Raises:
        ModelError: unsupported or already quantised, or `out` holds files.
    """
    config = read_config(src)
    if QUANTISATION_KEY in config:
        raise ModelError(f"{src} is already quantised", fix="name the original directory")
    if bits not in (4, 8):
        raise ModelError(f"{bits} bits are not supported", fix="use 8 or 4")
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out} holds files", fix="name a new or empty folder")
    model = skeleton(src)
    linears = {f"{name}.weight" for name in quantised_linears(model)}
    experts = {f"{name}.{part}" for name in expert_modules(model) for part in ("gate_up_proj", "down_proj")}
    known = set(model.state_dict())
    tensors = [each for each in stored_tensors(src) if each.name in known]
    missing = known - {each.name for each in tensors} - {"lm_head.weight"}
    if missing:
        raise ModelError(f"{src} lacks {sorted(missing)[0]} ({len(missing)} in all)", fix="copy the model again, whole")
    out.mkdir(parents=True, exist_ok=True)
    before = after = q_before = q_after = 0
    shard: dict[str, Tensor] = {}
    shards: list[Path] = []
    index: dict[str, str] = {}

    def flush() -> None:
        if shard:
            path = out / f"model-{len(shards) + 1:05d}.safetensors"
            save_file(shard, path, metadata={"format": "pt"})
            index.update(dict.fromkeys(shard, path.name))
            shards.append(path)
            shard.clear()

    for done, stored in enumerate(tensors, start=1):
        chosen = stored.name in linears or stored.name in experts
        size, made = _convert(stored, quantise=chosen, bits=bits, group=group, keep=keep_dtype)
        made_bytes = sum(t.numel() * t.element_size() for t in made.values())
        before += size
        after += made_bytes
        if len(made) > 1:
            q_before += size
            q_after += made_bytes
        shard |= made
        if sum(t.numel() * t.element_size() for t in shard.values()) >= SHARD_BYTES:
            flush()
        if progress is not None:
            progress(done, len(tensors))
    flush()
    if len(shards) == 1:
        shards[0].rename(out / "model.safetensors")
    else:
        (out / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": after}, "weight_map": index}, indent=1), encoding="utf-8"
        )
    config[QUANTISATION_KEY] = {"bits": bits, "group": group}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in _COPIED:
        if (src / name).is_file():
            shutil.copyfile(src / name, out / name)
    return QuantisationReport(before, after, q_before, q_after)


def _convert(
    stored: Stored, *, quantise: bool, bits: int, group: int, keep: torch.dtype | None
) -> tuple[int, dict[str, Tensor]]:
    """(bytes read, what is written) for one tensor."""
    size = 0
    qweights, scales, floats = [], [], []
    for piece in stored.read():
        size += piece.numel() * piece.element_size()
        if quantise:
            qweight, scale = quantise_tensor(piece, group, bits)
            qweights.append(qweight)
            scales.append(scale)
        else:
            floats.append(piece if keep is None or not piece.is_floating_point() else piece.to(keep))
    if not quantise:
        return size, {stored.name: floats[0] if stored.experts == 0 else torch.stack(floats)}
    base = stored.name.removesuffix(".weight")
    join = "." if stored.name.endswith(".weight") else "_"
    whole = (lambda parts: parts[0]) if stored.experts == 0 else torch.stack
    return size, {f"{base}{join}qweight": whole(qweights), f"{base}{join}scale": whole(scales)}
