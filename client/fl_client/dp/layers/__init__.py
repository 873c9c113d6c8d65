"""How each kind of layer gives a unit's gradient norm and the clipped sum: LoRA, cores, experts, attention."""
