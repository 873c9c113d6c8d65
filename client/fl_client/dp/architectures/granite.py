"""GraniteMoE: no shared experts; the router is called `router`."""

from fl_client.dp.architectures.base import Architecture

ARCHITECTURES = (
    Architecture(
        model_type="granitemoe",
        attention=tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        shared_experts=(),
        routed_experts="block_sparse_moe.experts",
        router=("block_sparse_moe.router",),
    ),
)
