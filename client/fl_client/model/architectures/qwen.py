"""Qwen2-MoE (one gated shared expert) and Qwen3-MoE (none)."""

from fl_client.model.architectures.base import Architecture

_ATTENTION = tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj"))

ARCHITECTURES = (
    Architecture(
        model_type="qwen2_moe",
        attention=_ATTENTION,
        shared_experts=tuple(f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
        routed_experts="mlp.experts",
        router=("mlp.gate", "mlp.shared_expert_gate"),
    ),
    Architecture(
        model_type="qwen3_moe",
        attention=_ATTENTION,
        shared_experts=(),
        routed_experts="mlp.experts",
        router=("mlp.gate",),
    ),
)
