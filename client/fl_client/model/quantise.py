"""Quantise a Hugging Face MoE directory to int8 or int4, symmetric, group 128, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fl_client.model.checkpoint import fast_tokenizer, float_tensors
from fl_client.model.layout import (
    INDEX,
    QUANTISATION_KEY,
    TOKENIZER_FILES,
    Stored,
    expert_modules,
    quantised_linears,
    read_config,
    skeleton,
)
from fl_client.model.load import read_features
from fl_client.model.quantised.tensor import GROUP, quantise_tensor
from fl_client.site.files import filled_or_gone, require_empty
from fl_shared.errors import ModelError
from fl_shared.files import write_durably

SHARD_BYTES = 1 << 30
_COPIED = (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json", "features.safetensors", "report.json",
           "MODEL_CARD.md")  # fmt: skip


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

    One tensor (of experts: one expert's) is read at a time, and shards of about 1 GiB are written as they fill:
    the float model is never in memory whole.

    Args:
        src: a Hugging Face directory with safetensors weights.
        out: must not exist, or be empty.
        bits: 8, or 4 (two to a byte).
        group: inputs that share a scale; even for 4 bits.
        keep_dtype: store float matrices that stay float (embeddings, router) in this type instead of their own;
            vectors (norms, the router's selection bias) keep theirs.
        progress: called with (tensors done, tensors in all).

    Raises:
        ModelError: unsupported, already quantised, incomplete, not finite, without a tokenizer, or `out` holds files.
            Nothing is left in `out` then.
    """
    config = read_config(src)
    if QUANTISATION_KEY in config:
        raise ModelError(f"{src} is already quantised", fix="name the original directory")
    if bits not in (4, 8):
        raise ModelError(f"{bits} bits are not supported", fix="use 8 or 4")
    if group < 1 or (bits == 4 and group % 2):
        raise ModelError(f"groups of {group} do not fit {bits} bits", fix="use the default, 128")
    require_empty(out)
    model = skeleton(src)
    linears = {f"{name}.weight" for name in quantised_linears(model)}
    experts = {f"{name}.{part}" for name in expert_modules(model) for part in ("gate_up_proj", "down_proj")}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]  # a method of PreTrainedModel
    tensors = float_tensors(src, model)
    tokenizer, converted = fast_tokenizer(src, rows)
    read_features(src, int(model.config.hidden_size))  # type: ignore[union-attr,arg-type]  # every supported config has it
    with filled_or_gone(out):
        for name in _COPIED:
            if (src / name).is_file():
                shutil.copyfile(src / name, out / name)
        if converted:
            tokenizer.save_pretrained(out)
        report = _write_weights(tensors, shapes, linears | experts, out, bits, group, keep_dtype, progress)
        config = {name: value for name, value in config.items() if name != "quantization_config"}
        config[QUANTISATION_KEY] = {"bits": bits, "group": group}
        # Last: without it the folder is no model.
        write_durably(out / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), mode=0o644)
    return report


def _write_weights(
    tensors: list[Stored],
    shapes: dict[str, tuple[int, ...]],
    chosen: set[str],
    out: Path,
    bits: int,
    group: int,
    keep: torch.dtype | None,
    progress: Callable[[int, int], None] | None,
) -> QuantisationReport:
    """Write the shards, those `chosen` quantised, and their index when there are several."""
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
        quantise = stored.name in chosen
        size, converted = _convert(stored, shapes[stored.name], quantise=quantise, bits=bits, group=group, keep=keep)
        converted_bytes = sum(t.numel() * t.element_size() for t in converted.values())
        before += size
        after += converted_bytes
        if quantise:
            q_before += size
            q_after += converted_bytes
        shard |= converted
        if sum(t.numel() * t.element_size() for t in shard.values()) >= SHARD_BYTES:
            flush()
        if progress is not None:
            progress(done, len(tensors))
    flush()
    if len(shards) == 1:
        shards[0].rename(out / "model.safetensors")
    else:
        (out / INDEX).write_text(
            json.dumps({"metadata": {"total_size": after}, "weight_map": index}, indent=1), encoding="utf-8"
        )
    return QuantisationReport(before, after, q_before, q_after)


def _convert(
    stored: Stored, shape: tuple[int, ...], *, quantise: bool, bits: int, group: int, keep: torch.dtype | None
) -> tuple[int, dict[str, Tensor]]:
    """(bytes read, what is written) for one tensor of this shape in memory; ModelError if a value is not finite."""
    size = 0
    qweights, scales, floats = [], [], []
    stacked = stored.experts > 0 or (quantise and len(shape) == 3)
    for piece in stored.read(by_expert=stacked):
        size += piece.numel() * piece.element_size()
        if quantise:
            qweight, scale = quantise_tensor(piece, group, bits)
            qweights.append(qweight)
            scales.append(scale)
        else:
            floats.append(piece if keep is None or piece.ndim < 2 or not piece.is_floating_point() else piece.to(keep))
        # The largest magnitude of each group is in its scale, and NaN and infinity with it.
        if not bool(torch.isfinite(scales[-1] if quantise else floats[-1]).all()):
            raise ModelError(f"{stored.name} holds NaN or infinity", fix="this checkpoint is broken: get it again")
    whole = torch.stack if stacked else (lambda parts: parts[0])
    value = whole(qweights if quantise else floats)
    if not quantise:
        return size, {stored.name: value}
    base = stored.name.removesuffix(".weight")
    join = "." if stored.name.endswith(".weight") else "_"
    return size, {f"{base}{join}qweight": value, f"{base}{join}scale": whole(scales)}
