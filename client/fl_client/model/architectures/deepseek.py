"""DeepSeek-V2 and -V3: latent attention, shared experts."""

from fl_client.model.architectures.base import Architecture

_ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

ARCHITECTURES = tuple(
    Architecture(
        model_type=model_type,
        attention=tuple(f"self_attn.{name}" for name in _ATTENTION),
        shared_experts=tuple(f"mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
        routed_experts="mlp.experts",
        router=("mlp.gate",),
    )
    for model_type in ("deepseek_v2", "deepseek_v3")
)
