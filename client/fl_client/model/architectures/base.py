"""What a family's file says about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Architecture:
    """Names of the adaptable layers, relative to one decoder layer (`layers.<i>.`).

    Attributes:
        model_type: Hugging Face's name of the family.
        attention: linear layers of the attention that carry LoRA; absent ones are skipped layer by layer.
        shared_experts: linear layers of the experts that every token passes; empty when the family has none.
        routed_experts: the module with the fused expert weights; absent in a dense layer.
        router: modules that stay frozen whatever is asked for, and float in a quantised model.
        renames: ends of tensor names as checkpoints have them, and as transformers has them in memory. Experts that lie
            one by one (`experts.<n>.gate_proj` or `.w1`) need none.
    """

    model_type: str
    attention: tuple[str, ...]
    shared_experts: tuple[str, ...]
    routed_experts: str
    router: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] = ()

    def groups(self) -> dict[str, tuple[str, ...]]:
        """LoRA target name (as in the run spec) to layer names."""
        return {
            "attention": self.attention,
            "shared_experts": self.shared_experts,
            "routed_experts": (self.routed_experts,),
        }
