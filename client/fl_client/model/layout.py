"""Where the tensors of a Hugging Face MoE directory lie on disk, and under which names they live in memory.

transformers 5 fuses each layer's experts into `experts.gate_up_proj [E, 2I, H]` and `experts.down_proj [E, H, I]`;
checkpoints keep one matrix per expert (DeepSeek, Qwen, OLMoE, Mixtral) or another fused name (GraniteMoE).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fl_client.dp.architectures import Architecture, architecture_of, known_architectures
from fl_shared.canonical import file_sha256, sha256_hex
from fl_shared.errors import ModelError

QUANTISATION_KEY = "concordat_quantisation"
OUTPUT_HEAD = "lm_head"
_DIGESTED = ("config.json", "tokenizer.json", "tokenizer_config.json", "features.safetensors")
_EXPERT = re.compile(
    r"(?P<layer>.*\blayers\.\d+)\.(?:\w+\.)*experts\.(?P<expert>\d+)"
    r"\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def read_config(directory: Path) -> dict[str, Any]:
    """The directory's config.json; ModelError when it is missing, broken or of an unsupported architecture."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{directory}: no readable config.json ({error.strerror})", fix="name a Hugging Face model directory"
        ) from error
    except ValueError as error:
        raise ModelError(f"{directory / 'config.json'} is not JSON", fix="download the model again") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    known = known_architectures()
    if kind not in known:
        fix = f"use {', '.join(sorted(known))}"
        raise ModelError(f"{directory}: architecture {kind!r} is not supported", fix=fix)
    settings = config.get(QUANTISATION_KEY, {"bits": 8, "group": 128})
    whole = isinstance(settings, dict) and all(type(settings.get(key)) is int for key in ("bits", "group"))
    if not whole or settings["bits"] not in (4, 8) or settings["group"] < 1:
        raise ModelError(
            f"{directory / 'config.json'}: {QUANTISATION_KEY} is {settings!r}",
            fix='it reads {"bits": 8, "group": 128}; quantise the model anew',
        )
    if settings["bits"] == 4 and settings["group"] % 2:
        raise ModelError(f"int4 groups of {settings['group']} cannot be packed", fix="quantise the model anew")
    return config  # type: ignore[no-any-return]  # checked to be a dict above


def skeleton(directory: Path) -> nn.Module:
    """The model of the directory's config on the meta device: names and shapes, no memory."""
    read_config(directory)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            # SDPA takes the fastest kernel that fits: on CUDA FlashAttention, cuDNN or the memory-efficient one.
            model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{directory / 'config.json'}: {error}", fix="repair the configuration") from error
    return model


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the weights, sorted; ModelError when there is none."""
    files = sorted(path for path in directory.glob("*.safetensors") if path.name != "features.safetensors")
    if not files:
        raise ModelError(
            f"{directory} holds no safetensors weights", fix="convert the checkpoint to safetensors; pickle is refused"
        )
    return files


def directory_digest(directory: Path) -> str:
    """`sha256:` over the sorted `name, sha256` lines of config, tokenizer, feature statistics and weights."""
    read_config(directory)
    paths = [directory / name for name in _DIGESTED if (directory / name).is_file()] + weight_files(directory)
    lines = sorted(f"{path.name} {file_sha256(path)}\n" for path in paths)
    return f"sha256:{sha256_hex(''.join(lines).encode())}"


@dataclass(frozen=True)
class Stored:
    """One tensor in memory, and the pieces on disk that make it: (file, name) each."""

    name: str
    pieces: tuple[tuple[Path, str], ...]
    experts: int = 0  # 0: the single piece as it is; E: per expert [gate, up] or [down], stacked

    def read(self, *, by_expert: bool) -> Iterator[Tensor]:
        """The tensor whole, or expert by expert (whatever its layout on disk), so that only one is held at a time."""
        if self.experts == 0:
            yield from _read_slices(*self.pieces[0]) if by_expert else (_read(*self.pieces[0]),)
            return
        per = len(self.pieces) // self.experts
        for expert in range(self.experts):
            parts = [_read(*piece) for piece in self.pieces[expert * per : (expert + 1) * per]]
            yield parts[0] if per == 1 else torch.cat(parts, dim=0)


def _read(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as source:
            tensor: Tensor = source.get_tensor(name)
            return tensor
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: {name}: {error}", fix="copy the model directory again, whole") from error


def _read_slices(path: Path, name: str) -> Iterator[Tensor]:
    """The tensor's slices along its first axis, one after the other."""
    try:
        with safe_open(path, framework="pt") as source:
            stored = source.get_slice(name)
            for index in range(stored.get_shape()[0]):
                yield stored[index]
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: {name}: {error}", fix="copy the model directory again, whole") from error


def stored_tensors(directory: Path) -> list[Stored]:
    """Every tensor under its in-memory name, experts fused; ModelError when a piece is missing."""
    architecture = known_architectures()[read_config(directory)["model_type"]]
    plain: list[Stored] = []
    experts: dict[tuple[str, str], dict[tuple[int, str], tuple[Path, str]]] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as source:
                names = list(source.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is no safetensors file: {error}", fix="copy the model directory again") from error
        for name in names:
            match = _EXPERT.fullmatch(name)
            if match is None:
                plain.append(Stored(_rename(name, architecture.renames), ((path, name),)))
                continue
            part = _PARTS[match["part"]]
            fused = "down_proj" if part == "down" else "gate_up_proj"
            key = (f"{match['layer']}.{architecture.routed_experts}", fused)
            experts.setdefault(key, {})[int(match["expert"]), part] = (path, name)
    fused_tensors = []
    for (prefix, fused), pieces in experts.items():
        count = max(expert for expert, _ in pieces) + 1
        order = ("down",) if fused == "down_proj" else ("gate", "up")
        for expert in range(count):
            for part in order:
                if (expert, part) not in pieces:
                    raise ModelError(f"{directory}: {prefix}.{expert} has no {part} matrix", fix="copy the model again")
        ordered = tuple(pieces[expert, part] for expert in range(count) for part in order)
        fused_tensors.append(Stored(f"{prefix}.{fused}", ordered, count))
    return sorted(plain + fused_tensors, key=lambda each: each.name)


def _rename(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for stored, ours in renames:
        if name.endswith(stored):
            return name.removesuffix(stored) + ours
    return name


def quantised_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are stored quantised, by name: all but the output head and what is the router's."""
    routers = _architecture(model).router
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] != OUTPUT_HEAD
        and not any(f".{router}." in f".{name}." for router in routers)
    }


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold fused experts, by name."""
    end = f".{_architecture(model).routed_experts}"
    return {name: module for name, module in model.named_modules() if name.endswith(end)}


def target_groups(model: nn.Module) -> tuple[str, ...]:
    """Which of the groups of layers that a run may adapt the model has, in the order of the run spec."""
    names = [name for name, _ in model.named_modules()]
    return tuple(
        group
        for group, layers in _architecture(model).groups().items()
        if any(re.search(rf"\blayers\.\d+\.{re.escape(layer)}$", name) for layer in layers for name in names)
    )


def _architecture(model: nn.Module) -> Architecture:
    config: Any = model.config
    return architecture_of(str(config.model_type))
