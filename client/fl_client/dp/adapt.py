"""Put LoRA and a task's head on a frozen base model, under one list of what may move that the checks hold it to."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from fl_client.dp.layers.attention import packed_attention
from fl_client.dp.layers.core import CoreExperts, CoreLinear
from fl_client.dp.layers.head import Head
from fl_client.dp.layers.lora import ADAPTER, LoraExperts, LoraLinear, PlainExperts
from fl_client.dp.layers.scope import BatchScope
from fl_client.dp.objective import Objective
from fl_client.dp.records.packing import HEIGHTS, Packed
from fl_client.model.architectures import Architecture, architecture_of
from fl_client.model.quantised.layers import QuantExperts, QuantLinear
from fl_shared.documents.spec import LoraSection
from fl_shared.errors import EngineError

PREFIX = "base_model.model.model."  # PEFT's name of the base inside a causal language model
HEAD = "classifier."


class HeadedModel(nn.Module):
    """Base model with LoRA, and a task's head on its last hidden states.

    Attributes:
        backbone: the Hugging Face model without its language-model head.
        head: the task's.
        scope: shared with every LoRA layer and the head.
    """

    def __init__(self, backbone: nn.Module, head: Head, scope: BatchScope) -> None:
        super().__init__()
        self.backbone, self.head, self.scope = backbone, head, scope

    def packed(self, batch: Packed) -> Tensor:
        """The head's outputs `[R, ...]` for a packed micro-batch; each row follows from its own record alone."""
        self.scope.packed = batch
        backbone: Any = self.backbone
        try:
            with packed_attention(backbone.config, batch):
                hidden = backbone(
                    input_ids=batch.ids.unsqueeze(0), position_ids=batch.positions.unsqueeze(0), use_cache=False
                ).last_hidden_state
            return self.head.packed(hidden.squeeze(0).float(), batch)
        finally:
            self.scope.packed = None

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and 0/1 mask `[B, T]`, padded on the right, to the head's outputs `[B, ...]`."""
        self.scope.kept = None if bool(mask.all()) else torch.nonzero(mask.flatten()).squeeze(-1)
        try:
            hidden = self.backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        finally:
            self.scope.kept = None
        return self.head.padded(hidden, mask)


@dataclass
class AdaptedModel:
    """A model with its head, and what may move in it. With cores (Fed-SB) the factors A and B stay frozen all the same.

    Attributes:
        module: the model.
        objective: built its head, and gives its losses.
        trainable: tensor name on the wire to parameter, in a fixed order. Nothing else moves; a run may freeze some.
        groups: tensor name to `attention`, `shared_experts`, `routed_experts` or `head`.
        layers: path to adapted layer.
        core: whether an r x r core lies between the factors.
        plain_experts: path to routed experts without LoRA.
        heights: numbers of rows that a packed micro-batch may have.
        base_norms: set by `magnitude.check_magnitude`.
        probe_error, probed: set by `checks.check_layers` once the layers have passed, and for which engine.
        witness: digest of what public units contribute here, set by `invariance.check_invariance`.
    """

    module: HeadedModel
    objective: Objective
    architecture: Architecture
    lora: LoraSection
    trainable: dict[str, nn.Parameter]
    groups: dict[str, str]
    layers: dict[str, nn.Module] = field(repr=False)
    core: bool = False
    plain_experts: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    heights: tuple[int, ...] = HEIGHTS
    probe_error: float | None = None
    probed: str = ""
    witness: str = ""
    base_norms: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def dimensions(self) -> int:
        """Coordinates of all trainable tensors together."""
        return sum(p.numel() for p in self.trainable.values())

    @property
    def scope(self) -> BatchScope:
        """The batch scope of all its layers."""
        return self.module.scope


def backbone_of(module: nn.Module) -> nn.Module:
    """The transformer without its language-model head."""
    inner = getattr(module, "base_model", module)
    return inner if isinstance(inner, nn.Module) else module


_MARK = "_concordat_adapted"


def adapt(
    module: nn.Module, lora: LoraSection, objective: Objective, mean: Tensor, std: Tensor, *, core: bool = False
) -> AdaptedModel:
    """LoRA layers and a head on `module`, reused when it already carries the same ones.

    Args:
        module: a Hugging Face MoE model, plain or with quantised layers. It is changed in place.
        lora: rank, alpha and target groups.
        objective: what is learnt; it builds the head.
        mean, std: `[H]`, the public feature statistics.
        core: put an r x r core between the factors, and train it instead of them.

    Raises:
        EngineError: unsupported architecture, a target group that the model does not have, an unsupported layer.
    """
    key = (lora, objective, core)
    known: tuple[Any, AdaptedModel] | None = getattr(module, _MARK, None)
    if known is not None and known[0] == key:
        return known[1]
    if known is not None:
        remove(module)
    backbone = backbone_of(module)
    _refuse_coupled_rotary(backbone)
    config: Any = getattr(module, "config", None)
    architecture = architecture_of(str(getattr(config, "model_type", type(module).__name__)))
    targets = _targets(backbone, architecture, lora)
    _inject(backbone, list(targets), lora, core=core)
    scope = BatchScope()
    headed = HeadedModel(backbone, objective.head(mean, std, scope), scope)
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    trainable: dict[str, nn.Parameter] = {}
    groups: dict[str, str] = {}
    layers: dict[str, nn.Module] = {}
    for path, group in targets.items():
        layer = backbone.get_submodule(path)
        if not isinstance(layer, LoraLinear | LoraExperts):
            raise EngineError(f"PEFT left {path} as it was ({type(layer).__name__})", fix="report this defect")
        layer.scope = scope
        layers[path] = layer
        for name, parameter in layer.named_parameters():
            if name.startswith("lora_"):
                wire = f"{PREFIX}{path}.{name.replace(f'.{ADAPTER}.', '.')}"
                trainable[wire], groups[wire] = parameter, group
    for name, parameter in headed.head.named_parameters():
        trainable[HEAD + name], groups[HEAD + name] = parameter, "head"
    device = mean.device
    for name, parameter in trainable.items():
        parameter.data = parameter.data.to(device=device, dtype=torch.float32)
        parameter.requires_grad_(not core or groups[name] == "head" or ".lora_R" in name)
    adapted = AdaptedModel(headed, objective, architecture, lora, trainable, groups, layers, core)
    for path, experts in _experts_left(backbone, architecture, targets).items():
        adapted.plain_experts[path] = PlainExperts(experts, scope)
        _put(backbone, path, adapted.plain_experts[path])
    setattr(module, _MARK, (key, adapted))  # lives and dies with the module
    return adapted


def _refuse_coupled_rotary(backbone: nn.Module) -> None:
    """Refuse rotary embeddings whose frequencies follow the longest record that shares, or shared, a batch."""
    for path, module in backbone.named_modules():
        kind = str(getattr(module, "rope_type", ""))
        if "dynamic" in kind or "longrope" in kind:
            raise EngineError(
                f"{path} has rope_type {kind!r}: one record's length would change how others are computed",
                fix="use a base with fixed rotary frequencies (default, linear, yarn, llama3)",
            )


def remove(module: nn.Module) -> None:
    """Take the LoRA layers off again; the base is as it was."""
    known: tuple[Any, AdaptedModel] | None = getattr(module, _MARK, None)
    if known is None:
        return
    delattr(module, _MARK)
    backbone = backbone_of(module)
    for path, layer in {**known[1].layers, **known[1].plain_experts}.items():
        base: Any = layer.base_layer
        _put(backbone, path, base)


def _put(backbone: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(backbone.get_submodule(parent), leaf, layer)


def _experts_left(backbone: nn.Module, architecture: Architecture, targets: Container[str]) -> dict[str, nn.Module]:
    """Routed experts that carry no LoRA, by path."""
    return {
        name: module
        for name, module in backbone.named_modules()
        if re.fullmatch(rf"layers\.\d+\.{re.escape(architecture.routed_experts)}", name) and name not in targets
    }


def _targets(backbone: nn.Module, architecture: Architecture, lora: LoraSection) -> dict[str, str]:
    """Full path of every layer to adapt, and its group. Router and dense layers are never among them."""
    present = dict(backbone.named_modules())
    indices = sorted({int(m.group(1)) for m in (re.match(r"layers\.(\d+)$", name) for name in present) if m})
    chosen: dict[str, str] = {}
    for group in lora.targets:
        paths = [
            f"layers.{index}.{name}"
            for index in indices
            for name in architecture.groups()[group]
            if present.get(f"layers.{index}.{name}") is not None
        ]
        if not paths:
            raise EngineError(
                f"a {architecture.model_type} model has no {group}", fix=f"take {group!r} out of [lora] targets"
            )
        chosen.update(dict.fromkeys(paths, group))
    for path in chosen:
        if any(path.endswith(f".{name}") for name in architecture.router):
            raise EngineError(f"{path} is the router and must stay frozen", fix="correct the architecture's file")
    return chosen


def _inject(backbone: nn.Module, paths: list[str], lora: LoraSection, *, core: bool) -> None:
    """Let PEFT replace the layers, and nothing but them.

    The backbone is handed over inside a module without `config`: with a Hugging Face config PEFT rewrites targets
    (on DeepseekV3 the shared experts vanish without a word).
    """
    linear = CoreLinear if core else LoraLinear
    kinds: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: linear, QuantLinear: linear}
    for path in paths:
        layer = backbone.get_submodule(path)
        if isinstance(layer, nn.Linear | QuantLinear):
            continue
        if not isinstance(layer, QuantExperts) and getattr(layer, "down_proj", None) is None:
            raise EngineError(f"{path} is a {type(layer).__name__}, which LoRA cannot adapt", fix="drop the target")
        kinds[type(layer)] = CoreExperts if core else LoraExperts
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # PEFT divides it by r, whatever its type
        target_modules="(" + "|".join(re.escape(f"model.{path}") for path in paths) + ")",
        init_lora_weights=False,
    )
    settings._register_custom_module(kinds)
    wrapper = nn.Module()
    wrapper.model = backbone
    try:
        inject_adapter_in_model(settings, wrapper, ADAPTER)
    except (ValueError, StopIteration, TypeError) as error:
        raise EngineError(f"PEFT cannot adapt this model: {error}", fix="check the LoRA targets") from error
