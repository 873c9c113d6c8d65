"""Where the tensors of a Hugging Face MoE directory lie on disk, and under which names they live in memory.

transformers 5 fuses each layer's experts into `experts.gate_up_proj [E, 2I, H]` and `experts.down_proj [E, H, I]`;
checkpoints keep one matrix per expert (DeepSeek, Qwen, OLMoE, Mixtral) or another fused name (GraniteMoE).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fl_client.model.architectures import Architecture, architecture_of, known_architectures
from fl_shared.canonical import file_sha256, sha256_hex
from fl_shared.errors import ModelError

QUANTISATION_KEY = "concordat_quantisation"
OUTPUT_HEAD = "lm_head"
_SCALE = "_scale_inv"  # DeepSeek's name: what a float8 block is multiplied by
INDEX = "model.safetensors.index.json"
_BESIDE = ("features.safetensors", "adapter_model.safetensors")
_LFS = b"version https://git-lfs.github.com/spec/"
_OTHER_WEIGHTS = ("*.gguf", "*.bin", "*.pt", "*.pth")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_DIGESTED = ("config.json", *TOKENIZER_FILES, "features.safetensors")
_EXPERT = re.compile(
    r"(?P<layer>.*\blayers\.\d+)\.(?:\w+\.)*experts\.(?P<expert>\d{1,6})"
    r"\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def read_config(directory: Path) -> dict[str, Any]:
    """The directory's config.json; ModelError when it is missing, broken or of an unsupported architecture."""
    _refuse_other_kinds(directory)
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{directory}: no readable config.json ({error.strerror})", fix="name a Hugging Face model directory"
        ) from error
    except (ValueError, RecursionError) as error:
        raise unreadable(directory / "config.json", "JSON", error) from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    known = known_architectures()
    if not isinstance(kind, str) or kind not in known:
        fix = f"use {', '.join(sorted(known))}"
        raise ModelError(f"{directory}: architecture {kind!r} is not supported", fix=fix)
    settings = config.get(QUANTISATION_KEY, {"bits": 8, "group": 128})
    whole = isinstance(settings, dict) and all(type(settings.get(key)) is int for key in ("bits", "group"))
    if not whole or settings["bits"] not in (4, 8) or settings["group"] < 1:
        raise ModelError(
            f"{directory / 'config.json'}: {QUANTISATION_KEY} is {settings!r}",
            fix='it reads {"bits": 8, "group": 128}; quantise the model again',
        )
    if settings["bits"] == 4 and settings["group"] % 2:
        raise ModelError(f"int4 groups of {settings['group']} cannot be packed", fix="quantise the model again")
    return config  # type: ignore[no-any-return]  # checked to be a dict above


def unreadable(path: Path, form: str, error: object) -> ModelError:
    """What to raise for a file of a model directory that is not in the `form` that its name says."""
    with contextlib.suppress(OSError), path.open("rb") as source:
        if source.read(len(_LFS)) == _LFS:
            return ModelError(f"{path} is a Git LFS pointer, not the file itself", fix="fetch the files: git lfs pull")
    return ModelError(f"{path} is no {form} file: {error}", fix="copy the model directory again, whole")


def _refuse_other_kinds(directory: Path) -> None:
    """ModelError for what is no model directory: an adapter, or a GGUF file; and for a path that libraries lose."""
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        raise ModelError(
            f"{str(directory)!a}: the path is no UTF-8 text, or this process has no locale for it",
            fix="rename it, or run the command with LC_ALL=C.UTF-8",
        ) from None
    if (directory / "adapter_config.json").is_file():
        raise ModelError(
            f"{directory} holds a LoRA adapter, not a base model",
            fix="name the base's directory; to build on the adapter, merge it into the base (PEFT: merge_and_unload)",
        )
    gguf = [directory] if directory.suffix == ".gguf" else sorted(directory.glob("*.gguf"))
    if gguf and not (directory / "config.json").is_file():
        raise ModelError(
            f"{gguf[0]} is a GGUF file: already quantised, for llama.cpp",
            fix="get the float release of the model as a Hugging Face directory, and quantise that",
        )


def skeleton(directory: Path) -> nn.Module:
    """The model of the directory's config on the meta device: names and shapes, no memory."""
    read_config(directory)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            # SDPA takes the fastest kernel that fits: on CUDA FlashAttention, cuDNN or the memory-efficient one.
            model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except Exception as error:  # a wrong number fails anywhere in the family's own code, divisions and all
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"{directory / 'config.json'}: {reason}", fix="take config.json from the model's release"
        ) from error
    most = expert_count(model)
    if most and not 0 < config.num_experts_per_tok <= most:
        raise ModelError(
            f"{directory / 'config.json'}: {config.num_experts_per_tok} of {most} experts for a token",
            fix="take config.json from the model's release",
        )
    return model


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files with the weights, sorted: those of the index, or `model.safetensors`, or all there are.

    ModelError when there is none, and when the index names one that is not there.
    """
    whole, index = directory / "model.safetensors", directory / INDEX
    if index.is_file():
        files = _indexed(directory, index)
        if whole.exists() and whole not in files:
            raise ModelError(f"{directory} holds both {whole.name} and {INDEX}", fix="remove the one that is stale")
        return files
    if whole.exists():
        return [whole]
    files = sorted(path for path in directory.glob("*.safetensors") if path.name not in _BESIDE)
    if not files:
        others = sorted(path.name for pattern in _OTHER_WEIGHTS for path in directory.glob(pattern))
        beside = f", but {others[0]}" if others else ""
        raise ModelError(
            f"{directory} holds no safetensors weights{beside}",
            fix="get the release in safetensors, or convert it (transformers' save_pretrained): GGUF is quantised "
            "already, and pickle is refused because it runs code",
        )
    return files


def _indexed(directory: Path, index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("its weight_map must name files of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of weights ({error})", fix="copy the model directory again") from error
    for name in sorted(names):
        if not (directory / name).is_file():
            raise ModelError(f"{directory}: {INDEX} names {name}, which is missing", fix="copy the model again, whole")
    return sorted(directory / name for name in names)


def directory_digest(directory: Path) -> str:
    """`sha256:` over the sorted `name, sha256` lines of config, tokenizer, feature statistics and weights."""
    read_config(directory)
    paths = [directory / name for name in _DIGESTED if (directory / name).is_file()] + weight_files(directory)
    lines = sorted(f"{path.name} {file_sha256(path)}\n" for path in paths)
    return f"sha256:{sha256_hex(''.join(lines).encode())}"


@dataclass(frozen=True)
class Piece:
    """One tensor of a file. `scale` is where a float8 one's block scales lie; `block` is a block's height and width."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: tuple[Path, str] | None = None
    block: tuple[int, int] | None = None

    def read(self) -> Tensor:
        """The tensor; a float8 one as the float32 values that it stands for."""
        value = _read(self.path, self.name)
        return value if self.scale is None else dequantise_float8(value, _read(*self.scale), self.block, self.name)

    def read_slices(self) -> Iterator[Tensor]:
        """The tensor's slices along its first axis, one after the other."""
        scales = None if self.scale is None else _read(*self.scale)
        try:
            with safe_open(self.path, framework="pt") as source:
                stored = source.get_slice(self.name)
                for index in range(stored.get_shape()[0]):
                    value = stored[index]
                    if scales is not None:
                        scale = scales[index] if scales.ndim == 3 else scales
                        value = dequantise_float8(value, scale, self.block, self.name)
                    yield value
        except (OSError, SafetensorError, IndexError) as error:
            raise ModelError(f"{self.path}: {self.name}: {error}", fix="copy the model again, whole") from error


@dataclass(frozen=True)
class Stored:
    """One tensor in memory, and the pieces on disk that make it."""

    name: str
    pieces: tuple[Piece, ...]
    experts: int = 0  # 0: the single piece as it is; E: per expert [gate, up] or [down], stacked

    def misshapen(self, shape: tuple[int, ...]) -> str:
        """What the files' headers hold in place of a tensor of this shape; nothing when they hold it."""
        per = len(self.pieces) // self.experts if self.experts else 1
        if self.experts not in (0, shape[0]):
            return f"{self.name} has {self.experts} experts, config.json says {shape[0]}"
        expected = (shape[1] // per, *shape[2:]) if self.experts else shape
        odd = [piece for piece in self.pieces if piece.shape != expected]
        return f"{odd[0].name} has shape {odd[0].shape}, config.json says {expected}" if odd else ""

    def read(self, *, by_expert: bool) -> Iterator[Tensor]:
        """The tensor whole, or expert by expert (whatever its layout on disk), so that only one is held at a time."""
        if self.experts == 0:
            yield from self.pieces[0].read_slices() if by_expert else (self.pieces[0].read(),)
            return
        per = len(self.pieces) // self.experts
        for expert in range(self.experts):
            parts = [piece.read() for piece in self.pieces[expert * per : (expert + 1) * per]]
            try:
                yield parts[0] if per == 1 else torch.cat(parts, dim=0)
            except RuntimeError as error:
                raise ModelError(f"{self.name}: {error}", fix="copy the model again, whole") from error


def _read(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as source:
            tensor: Tensor = source.get_tensor(name)
            return tensor
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: {name}: {error}", fix="copy the model directory again, whole") from error


def dequantise_float8(value: Tensor, scale: Tensor, block: tuple[int, int] | None, name: str) -> Tensor:
    """float8 `[..., out, in]` times the float32 scale of each block of `block` = (height, width), or of all of it.

    ModelError when the scales are not as many as the blocks.
    """
    scale = scale.float()
    if scale.numel() == 1 and block is None:
        return value.float() * scale.reshape(())
    rows, columns = value.shape[-2:] if value.ndim > 1 else (0, 0)
    if block is None or scale.shape != (*value.shape[:-2], -(-rows // block[0]), -(-columns // block[1])):
        raise ModelError(
            f"{name} is float8 {tuple(value.shape)} with scales {tuple(scale.shape)}, which are not one per block of "
            f"{block} of config.json's weight_block_size",
            fix="take config.json and weights from the same release",
        )
    spread = scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return value.float() * spread


def _pieces(directory: Path) -> list[Piece]:
    """Every tensor of the directory's files, float8 ones with their scales."""
    pieces: dict[str, Piece] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118  # safe_open is no mapping
                    if name in pieces:
                        raise ModelError(
                            f"{pieces[name].path.name} and {path.name} both hold {name}", fix="remove the stale file"
                        )
                    stored = source.get_slice(name)
                    pieces[name] = Piece(path, name, str(stored.get_dtype()), tuple(stored.get_shape()))
        except (OSError, SafetensorError) as error:
            raise unreadable(path, "safetensors", error) from error
    settings = read_config(directory).get("quantization_config")
    block = _block_of(settings.get("weight_block_size")) if isinstance(settings, dict) else None
    for name in [name for name in pieces if name.endswith(_SCALE)]:
        weight = pieces.get(name.removesuffix(_SCALE))
        if weight is not None and weight.dtype == "F8_E4M3":
            pieces[weight.name] = replace(weight, scale=(pieces.pop(name).path, name), block=block)
    return list(pieces.values())


def _block_of(value: Any) -> tuple[int, int] | None:
    whole = isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)
    return (value[0], value[1]) if whole else None


def stored_tensors(directory: Path) -> list[Stored]:
    """Every tensor under its in-memory name, experts fused; ModelError when a piece is missing."""
    architecture = known_architectures()[read_config(directory)["model_type"]]
    plain: list[Stored] = []
    experts: dict[tuple[str, str], dict[tuple[int, str], Piece]] = {}
    for piece in _pieces(directory):
        match = _EXPERT.fullmatch(piece.name)
        if match is None:
            plain.append(Stored(_rename(piece.name, architecture.renames), (piece,)))
            continue
        part = _PARTS[match["part"]]
        fused = "down_proj" if part == "down" else "gate_up_proj"
        key = (f"{match['layer']}.{architecture.routed_experts}", fused)
        experts.setdefault(key, {})[int(match["expert"]), part] = piece
    fused_tensors = []
    for (prefix, fused), pieces in experts.items():
        count = max(expert for expert, _ in pieces) + 1
        order = ("down",) if fused == "down_proj" else ("gate", "up")
        if count * len(order) != len(pieces):
            expert, part = next((e, p) for e in range(count) for p in order if (e, p) not in pieces)
            raise ModelError(f"{directory}: {prefix}.{expert} has no {part} matrix", fix="copy the model again")
        ordered = tuple(pieces[expert, part] for expert in range(count) for part in order)
        fused_tensors.append(Stored(f"{prefix}.{fused}", ordered, count))
    return sorted(plain + fused_tensors, key=lambda tensor: tensor.name)


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


def expert_count(model: nn.Module) -> int:
    """Routed experts of a layer; a text-only config names their number differently by family, the tensors say it."""
    return max((int(next(module.parameters()).shape[0]) for module in expert_modules(model).values()), default=0)


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
