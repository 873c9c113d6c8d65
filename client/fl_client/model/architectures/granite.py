"""GraniteMoE: no shared experts; the router is called `router`, and checkpoints name fused experts otherwise."""

from fl_client.model.architectures.base import Architecture

ARCHITECTURES = (
    Architecture(
        model_type="granitemoe",
        attention=tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        shared_experts=(),
        routed_experts="block_sparse_moe.experts",
        router=("block_sparse_moe.router",),
        renames=(
            (".block_sparse_moe.router.layer.weight", ".block_sparse_moe.router.weight"),
            (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
            (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
        ),
    ),
)
