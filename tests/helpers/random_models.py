"""MoE models with random weights, float or int8, for benchmarks and tests that need a shape and no knowledge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from fl_client.dp.adapt import AdaptedModel, adapt
from fl_client.dp.audit.canaries import worst_case_adapter
from fl_client.dp.records.records import Records
from fl_client.model.layout import expert_modules, quantised_linears
from fl_client.model.quantised.layers import QuantExperts, QuantLinear
from fl_client.tasks.classification import CrossEntropy
from fl_shared.documents.spec import LoraSection


def float_model(config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    """A frozen causal language model with seeded random weights; experts run as grouped products."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation("grouped_mm")
    model.requires_grad_(requires_grad=False)
    model.eval()
    return model  # type: ignore[no-any-return]


def quantise_in_place(model: nn.Module, bits: int = 8) -> nn.Module:
    """Replace what `fl-model quantize` would replace by int8 or int4 layers."""
    for name, linear in list(quantised_linears(model).items()):
        _replace(model, name, QuantLinear.from_linear(linear, bits=bits))
    for name, experts in list(expert_modules(model).items()):
        source: Any = experts
        made = QuantExperts.from_fused(source.gate_up_proj, source.down_proj, source.act_fn, bits=bits)
        _replace(model, name, made)
    return model


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def cast_base(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The base's floats in `dtype`, as `load_model` leaves them: scales and LoRA's factors stay float32."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not name.endswith("scale") and ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    return model


def random_records(units: int, *, low: int, high: int, vocabulary: int, classes: int, seed: int = 0) -> Records:
    """Units of one record with `low` to `high` random tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(low, high + 1, units)
    return Records(
        tuple(tuple(int(i) for i in rng.integers(0, vocabulary, n)) for n in lengths),
        rng.integers(0, classes, units).astype(np.int64),
        tuple(np.array([unit]) for unit in range(units)),
        0,
    )


def small_config(architecture: str, *, experts: int = 8, top_k: int = 2) -> PreTrainedConfig:
    """A two-layer config of a supported family. 136 inputs make one whole group of 128 and a shorter one."""
    common = {"vocab_size": 96, "hidden_size": 136, "num_hidden_layers": 2, "num_attention_heads": 4,
              "max_position_embeddings": 64, "initializer_range": 0.15}  # fmt: skip
    grouped = {**common, "num_key_value_heads": 2, "num_experts_per_tok": top_k}
    latent = {
        **common, "num_key_value_heads": 4, "intermediate_size": 40, "moe_intermediate_size": 20,
        "n_shared_experts": 1, "n_routed_experts": experts, "num_experts_per_tok": top_k, "first_k_dense_replace": 1,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
    }  # fmt: skip
    made: dict[str, Callable[[], PreTrainedConfig]] = {
        "deepseek_v2": lambda: DeepseekV2Config(**latent, q_lora_rank=None),
        "deepseek_v3": lambda: DeepseekV3Config(**latent, q_lora_rank=24, n_group=2, topk_group=2),
        "granitemoe": lambda: GraniteMoeConfig(
            **grouped, intermediate_size=20, num_local_experts=experts, embedding_multiplier=2.0,
            residual_multiplier=0.7, attention_multiplier=0.2,
        ),
        "mixtral": lambda: MixtralConfig(**grouped, intermediate_size=20, num_local_experts=experts),
        "olmoe": lambda: OlmoeConfig(**grouped, intermediate_size=20, num_experts=experts),
        "qwen2_moe": lambda: Qwen2MoeConfig(
            **grouped, intermediate_size=40, moe_intermediate_size=20, shared_expert_intermediate_size=28,
            num_experts=experts, decoder_sparse_step=1,
        ),
        "qwen3_moe": lambda: Qwen3MoeConfig(
            **grouped, intermediate_size=40, moe_intermediate_size=20, num_experts=experts, head_dim=16,
        ),
    }  # fmt: skip
    return made[architecture]()


ARCHITECTURES = ("deepseek_v2", "deepseek_v3", "granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def units_of_records(
    sizes: Sequence[Sequence[int]], *, vocabulary: int = 96, classes: int = 5, seed: int = 0
) -> Records:
    """Units whose records have the given numbers of tokens; ids and labels are random."""
    rng = np.random.default_rng(seed)
    lengths = [length for unit in sizes for length in unit]
    ends = np.cumsum([len(unit) for unit in sizes])
    return Records(
        tuple(tuple(int(i) for i in rng.integers(0, vocabulary, n)) for n in lengths),
        rng.integers(0, classes, len(lengths)).astype(np.int64),
        tuple(np.split(np.arange(len(lengths)), ends[:-1])),
        0,
    )


def adapted_small(
    architecture: str,
    *,
    quantised: bool,
    bits: int = 8,
    experts: int = 8,
    top_k: int = 2,
    rank: int = 3,
    classes: int = 5,
    core: bool = False,
) -> AdaptedModel:
    """A small model under a random adapter and random feature statistics, so that no gradient vanishes."""
    config = small_config(architecture, experts=experts, top_k=top_k)
    model = float_model(config)
    if quantised:
        quantise_in_place(model, bits)
    shared = architecture in ("deepseek_v2", "deepseek_v3", "qwen2_moe")
    targets = ("attention", "shared_experts", "routed_experts") if shared else ("attention", "routed_experts")
    rng = np.random.default_rng(1)
    hidden = int(config.hidden_size)
    mean = torch.from_numpy(rng.normal(0, 0.3, hidden).astype(np.float32))
    std = torch.from_numpy(rng.uniform(0.5, 2.0, hidden).astype(np.float32))
    made = adapt(model, LoraSection(rank=rank, alpha=6.0, targets=targets), CrossEntropy(classes), mean, std, core=core)
    worst_case_adapter(made, rng)
    return made
