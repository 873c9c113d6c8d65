"""OLMoE: no shared experts."""

from fl_client.model.architectures.base import Architecture

ARCHITECTURES = (
    Architecture(
        model_type="olmoe",
        attention=tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        shared_experts=(),
        routed_experts="mlp.experts",
        router=("mlp.gate",),
    ),
)
