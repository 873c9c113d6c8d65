"""Small models of every supported architecture, made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from fl_client.model.recipe.pretrain import train_tokenizer

# 200 inputs make one whole group of 128 and a shorter one of 72.
_COMMON = {"vocab_size": 320, "hidden_size": 200, "num_hidden_layers": 2, "num_attention_heads": 4}
_GQA = {**_COMMON, "num_key_value_heads": 2}
_DEEPSEEK = {
    **_COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": 144,
    "moe_intermediate_size": 136,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "deepseek_v2": lambda: DeepseekV2Config(**_DEEPSEEK, q_lora_rank=None),
    "deepseek_v3": lambda: DeepseekV3Config(**_DEEPSEEK, q_lora_rank=24, n_group=1, topk_group=1),
    "granitemoe": lambda: GraniteMoeConfig(**_GQA, intermediate_size=136, num_local_experts=4, num_experts_per_tok=2),
    "mixtral": lambda: MixtralConfig(**_GQA, intermediate_size=136, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": lambda: OlmoeConfig(**_GQA, intermediate_size=136, num_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_GQA,
        intermediate_size=144,
        moe_intermediate_size=136,
        shared_expert_intermediate_size=72,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_GQA,
        intermediate_size=144,
        moe_intermediate_size=136,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=12,
        tie_word_embeddings=True,
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of few merges."""
    return train_tokenizer(["cholera due to vibrio cholerae", "a room where patients are seen"] * 3)


def build(architecture: str) -> PreTrainedModel:
    """A float model with random weights that are large enough to route tokens apart."""
    torch.manual_seed(7)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.05)
    return model


@pytest.fixture(scope="session")
def float_model(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], tuple[PreTrainedModel, Path]]:
    """architecture -> (the float model, its Hugging Face directory with a tokenizer); each is made once."""
    made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def make(architecture: str) -> tuple[PreTrainedModel, Path]:
        if architecture not in made:
            directory = tmp_path_factory.mktemp(architecture)
            model = build(architecture)
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            made[architecture] = (model, directory)
        return made[architecture]

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `architecture` runs once for each supported one."""
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", sorted(CONFIGS))
