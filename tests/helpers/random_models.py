"""MoE models with random weights, float or int8, for benchmarks and tests that need a shape and no knowledge."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fl_client.dp.batches import Records
from fl_client.model.layout import expert_modules, quantised_linears
from fl_client.model.quant_layers import QuantExperts, QuantLinear


def float_model(config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    """A frozen causal language model with seeded random weights; experts run as grouped products."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation("grouped_mm")
    model.requires_grad_(requires_grad=False)
    model.eval()
    return model  # type: ignore[no-any-return]


def quantise_in_place(model: nn.Module) -> nn.Module:
    """Replace what `fl-model quantize` would replace by int8 layers."""
    for name, linear in list(quantised_linears(model).items()):
        _replace(model, name, QuantLinear.from_linear(linear))
    for name, experts in list(expert_modules(model).items()):
        source: Any = experts
        _replace(model, name, QuantExperts.from_fused(source.gate_up_proj, source.down_proj, source.act_fn))
    return model


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


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
