"""Load a quantised (or plain) model directory; a quantised one never has a float copy of its int8 or int4 weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from fl_client.model.checkpoint import float_tensors, load_tokenizer, require_quantised, ties_head
from fl_client.model.layout import (
    QUANTISATION_KEY,
    directory_digest,
    expert_modules,
    quantised_linears,
    read_config,
    skeleton,
    unreadable,
    weight_files,
)
from fl_client.model.quantised.layers import QuantExperts, QuantLinear
from fl_shared.errors import ModelError

CPU = torch.device("cpu")
TINY = Path(__file__).resolve().parent / "tiny"


@dataclass(frozen=True)
class LoadedModel:
    """A base model, ready to be adapted.

    Attributes:
        module: the Hugging Face causal language model, frozen, in eval mode.
        feature_mean, feature_std: `[H]`, public statistics of the mean-pooled last hidden state.
        engine: how it is trained privately, and answers: `book` in packed micro-batches, `hooks` unit by unit.
    """

    module: nn.Module
    tokenizer: PreTrainedTokenizerFast
    config: Mapping[str, Any]
    digest: str
    feature_mean: Tensor
    feature_std: Tensor
    directory: Path
    engine: Literal["book", "hooks"] = "book"

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.module.parameters()).device


def resolve(directory: str | Path) -> Path:
    """`tiny` is the base that ships with the package; everything else is a path."""
    return TINY if str(directory) == "tiny" else Path(directory)


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda`; ModelError when CUDA is wanted and absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("device 'cuda' is wanted, and this machine has none", fix='write device = "cpu" or "auto"')
    return torch.device(name)


def load_model(directory: str | Path, device: str = "auto", dtype: torch.dtype | None = None) -> LoadedModel:
    """Load config, tokenizer and weights; the model is frozen.

    Args:
        directory: a model directory, or `tiny`.
        device: `auto`, `cpu` or `cuda`.
        dtype: what is computed in, and what stays float is kept in; by default bfloat16 on CUDA and float32 on CPU.

    Raises:
        ModelError: missing files, an unsupported architecture, or weights that do not fit the config.
    """
    path, place = resolve(directory), choose_device(device)
    config = read_config(path)
    if dtype is None:
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    if QUANTISATION_KEY in config:
        module = _load_quantised(path, config, place, dtype)
    else:
        module = _load_plain(path, place, dtype)
    module.requires_grad_(requires_grad=False)
    module.eval()
    rows = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # a method of PreTrainedModel
    tokenizer = load_tokenizer(path, int(rows))
    mean, std = read_features(path, int(module.config.hidden_size), place)  # type: ignore[union-attr,arg-type]  # all have it
    return LoadedModel(module, tokenizer, config, directory_digest(path), mean, std, path)


def _load_plain(path: Path, place: torch.device, dtype: torch.dtype) -> nn.Module:
    """The float model, its tensors read one by one: what `fl-model quantize` reads of the directory, and no more."""
    model = skeleton(path)
    tensors = float_tensors(path, model)
    if any(piece.scale is not None for tensor in tensors for piece in tensor.pieces):
        raise ModelError(f"{path} is stored in float8", fix="quantise it first: `fl-model quantize` reads it")
    state: dict[str, Tensor] = {}
    for stored in tensors:
        parts = [_kept(stored.name, part, dtype).to(place) for part in stored.read(by_expert=stored.experts > 0)]
        state[stored.name] = torch.stack(parts) if stored.experts else parts[0]
    loaded = _filled(path, model, state, place)
    loaded.set_experts_implementation("grouped_mm")  # type: ignore[operator]  # a method of PreTrainedModel
    return loaded


def _kept(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, unless it holds whole numbers, scales, or what chooses experts."""
    if name.endswith("e_score_correction_bias"):
        return tensor.float()
    return tensor.to(dtype) if tensor.is_floating_point() and not name.endswith("scale") else tensor


def with_quantised_layers(model: nn.Module, bits: int, group: int) -> nn.Module:
    """Put empty quantised layers on the meta device where a model's weights are stored quantised; the same model."""
    for name, linear in quantised_linears(model).items():
        quantised = QuantLinear(
            linear.in_features, linear.out_features, linear.bias is not None, group, bits, device="meta"
        )
        _replace(model, name, quantised)
    for name, experts in expert_modules(model).items():
        count, hidden, intermediate = experts.down_proj.shape  # type: ignore[misc]  # a tensor [E, H, I]
        _replace(model, name, QuantExperts(count, hidden, intermediate, group, experts.act_fn, bits, device="meta"))
    return model


def _load_quantised(path: Path, config: Mapping[str, Any], place: torch.device, dtype: torch.dtype) -> nn.Module:
    settings = config[QUANTISATION_KEY]
    model = with_quantised_layers(skeleton(path), int(settings["bits"]), int(settings["group"]))
    require_quantised(path, model)
    state: dict[str, Tensor] = {}
    for file in weight_files(path):
        try:
            tensors = load_file(file, device=str(place))
        except (SafetensorError, OSError) as error:
            raise unreadable(file, "safetensors", error) from error
        state |= {name: _kept(name, tensor, dtype) for name, tensor in tensors.items()}
    return _filled(path, model, state, place)


def _filled(path: Path, model: nn.Module, state: dict[str, Tensor], place: torch.device) -> nn.Module:
    """The model of a skeleton with these tensors, which have been found to fit."""
    model.load_state_dict(state, strict=False, assign=True)
    if ties_head(model):
        model.tie_weights()  # type: ignore[operator]  # a method of PreTrainedModel
    make_rotary(model, place)
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise ModelError(f"{path}: no value for {empty[0]} ({len(empty)} in all)", fix="quantise the model again")
    return model


def make_rotary(model: nn.Module, place: torch.device) -> None:
    """Rotary frequencies are computed from the config, not stored: build them again off the meta device."""
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):
            _replace(model, name, type(module)(config=model.config).to(place))


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def read_features(path: Path, hidden: int, place: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[hidden]` of the directory's features.safetensors, 0 and 1 without one."""
    file = path / "features.safetensors"
    if not file.is_file():
        return torch.zeros(hidden, device=place), torch.ones(hidden, device=place)
    try:
        stored = load_file(file, device=str(place))
    except (SafetensorError, OSError) as error:
        raise unreadable(file, "safetensors", error) from error
    shapes = {name: tuple(value.shape) for name, value in stored.items()}
    if shapes != {"mean": (hidden,), "std": (hidden,)} or not all(bool(v.isfinite().all()) for v in stored.values()):
        raise ModelError(
            f"{file} does not hold a finite mean and std of {hidden} values", fix="build the feature statistics again"
        )
    return stored["mean"].float(), stored["std"].float().clamp_min(1e-6)
