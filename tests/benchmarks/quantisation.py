"""What quantised weights cost and save: speed, size and error against float32 of the same model.

float32 is the ordinary Hugging Face model with its fast experts (`set_experts_implementation("grouped_mm")`) and SDPA.
Forward and backward are of the decoder without the output head, as in training here; backward is the gradient of the
embedded tokens through all frozen layers. Forward, backward and generation of the two alternate, one torch thread,
this thread's CPU time, medians of the ratios of neighbours.

    python tests/benchmarks/quantisation.py --json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config

from fl_client.model.layout import expert_modules, quantised_linears
from fl_client.model.load import load_model
from fl_client.model.quantised.layers import QuantExperts, QuantLinear

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from helpers.random_models import float_model, quantise_in_place  # noqa: E402 - made importable above

NEW_TOKENS = 16
_LATENT = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "kv_lora_rank": 64, "q_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 32, "n_group": 1, "topk_group": 1, "vocab_size": 4096,
}  # fmt: skip
# 66 M parameters, 57 M of them in experts; and SmolLM2's width of 576, whose last group has 64 inputs.
LARGER = {
    "hidden_size": 512, "num_hidden_layers": 4, "moe_intermediate_size": 384, "n_routed_experts": 32,
    "intermediate_size": 1536,
}  # fmt: skip
WIDTH_576 = {
    "hidden_size": 576, "num_hidden_layers": 4, "moe_intermediate_size": 192, "n_routed_experts": 16,
    "intermediate_size": 1536,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Two forms of one model, and the batch `[sequences, tokens]` they are timed on."""

    name: str
    build: Callable[[], tuple[nn.Module, nn.Module]]
    sequences: int
    tokens: int
    full: bool = False


def shipped() -> nn.Module:
    """The base that ships with the package, int8."""
    return load_model("tiny", "cpu").module


def dequantised(quantised: nn.Module) -> nn.Module:
    """The ordinary Hugging Face model with the float32 weights that a quantised one stands for."""
    made: Any = AutoModelForCausalLM.from_config(quantised.config)
    state = dict(quantised.state_dict())
    for name, module in quantised.named_modules():
        if isinstance(module, QuantLinear):
            state[f"{name}.weight"] = module.weight_as(torch.float32)
        elif isinstance(module, QuantExperts):
            for part in ("gate_up_proj", "down_proj"):
                state[f"{name}.{part}"] = module.weight_as(part, torch.float32)
    made.load_state_dict({name: state[name] for name in made.state_dict()})
    made.set_experts_implementation("grouped_mm")
    made.requires_grad_(requires_grad=False)
    return made.eval()  # type: ignore[no-any-return]


def _shipped_pair() -> tuple[nn.Module, nn.Module]:
    quantised = shipped()
    return dequantised(quantised), quantised


def _shipped_in_four_bits() -> tuple[nn.Module, nn.Module]:
    exact = dequantised(shipped())
    return exact, quantise_in_place(copy.deepcopy(exact), 4)


def _random(shape: dict[str, int] | None, bits: int) -> Callable[[], tuple[nn.Module, nn.Module]]:
    def build() -> tuple[nn.Module, nn.Module]:
        config = shipped().config if shape is None else DeepseekV3Config(**_LATENT, **shape)
        exact = float_model(config)
        return exact, quantise_in_place(copy.deepcopy(exact), bits)

    return build


# The engine's own micro-batches: up to 128 units; 24 of 64 tokens are the step that `dp_step.py` measures.
CASES = (
    Case("tiny, int8 as shipped", _shipped_pair, 128, 16),
    Case("tiny, int4", _shipped_in_four_bits, 128, 16),
    Case("tiny's shape, random, int8", _random(None, 8), 128, 16),
    Case("66M, random, int8", _random(LARGER, 8), 24, 64),
    Case("66M, random, int4", _random(LARGER, 4), 24, 64),
    Case("width 576, random, int8", _random(WIDTH_576, 8), 24, 64),
    Case("width 576, random, int4", _random(WIDTH_576, 4), 24, 64),
    Case("66M, random, int8, long", _random(LARGER, 8), 8, 512, full=True),
    Case("66M, random, int4, long", _random(LARGER, 4), 8, 512, full=True),
)


def size_ratio(exact: nn.Module, quantised: nn.Module) -> tuple[float, float]:
    """Bytes in memory over float32's: of the quantised layers' weights, and of the whole model."""
    names = [f"{name}.weight" for name in quantised_linears(exact)]
    names += [f"{name}.{part}" for name in expert_modules(exact) for part in ("gate_up_proj", "down_proj")]
    state = exact.state_dict()
    before = sum(_bytes(state[name]) for name in names)
    stored = quantised.state_dict()
    after = sum(
        _bytes(stored[f"{name}{join}{kind}"])
        for name, join in ((n.removesuffix(".weight"), "." if n.endswith(".weight") else "_") for n in names)
        for kind in ("qweight", "scale")
    )
    whole = sum(map(_bytes, {t.data_ptr(): t for t in state.values()}.values()))  # a tied head lies there once
    return after / before, (whole - before + after) / whole


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def outcome(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[B, T, V]`, and each token's experts in each layer, sorted: `[layers, B * T, K]`."""
    chosen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: chosen.append(args[1].sort(-1).values))
        for module in expert_modules(model).values()
    ]
    with torch.no_grad():
        logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return logits, torch.stack(chosen)


class Clock:
    """Seconds of forward, backward and generation of one model on one batch."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.decoder: Any = model.model
        self.found: dict[str, list[float]] = {"forward": [], "backward": [], "generate": []}

    def forward(self) -> float:
        """One forward pass without gradient."""
        with torch.no_grad():
            return _timed(lambda: self.decoder(self.ids, use_cache=False))

    def backward(self) -> float:
        """One backward pass; its forward pass is not counted."""
        embedded = self.decoder.embed_tokens(self.ids).detach().requires_grad_()
        out = self.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        seed = torch.ones_like(out)
        return _timed(lambda: out.backward(seed))

    def generate(self) -> float:
        """NEW_TOKENS tokens, greedily, one sequence, with the cache."""
        model: Any = self.model
        prompt = self.ids[:1, :8]
        with torch.no_grad():
            return _timed(
                lambda: model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                    min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=0,
                )
            )  # fmt: skip


def _timed(work: Callable[[], object]) -> float:
    before = time.thread_time()
    work()
    return time.thread_time() - before


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """One entry of `models`."""
    exact, quantised = case.build()
    vocabulary = int(exact.config.vocab_size)  # type: ignore[union-attr,arg-type]
    ids = torch.randint(3, vocabulary, (case.sequences, case.tokens), generator=torch.Generator().manual_seed(1))
    wanted, experts = outcome(exact, ids)
    logits, routed = outcome(quantised, ids)
    moved = (routed != experts).any(-1)
    clocks = {"float32": Clock(exact, ids), "quantised": Clock(quantised, ids)}
    started, turn = time.thread_time(), 0
    while turn < 6 or time.thread_time() - started < seconds:
        for part in ("forward", "backward", "generate"):
            if part == "generate" and turn % 3:
                continue
            for clock in clocks.values() if turn % 2 else reversed(clocks.values()):
                taken = getattr(clock, part)()
                if turn > 0:  # the first turn warms up
                    clock.found[part].append(taken)
        turn += 1
    # Neighbours in time are compared with each other: on a shared machine both slow down together.
    ratio = {
        part: statistics.median(
            ours / theirs
            for ours, theirs in zip(clocks["quantised"].found[part], clocks["float32"].found[part], strict=True)
        )
        for part in ("forward", "backward", "generate")
    }
    layers, whole = size_ratio(exact, quantised)
    return {
        "name": case.name,
        "batch": [case.sequences, case.tokens],
        "size_ratio": round(layers, 4),
        "size_ratio_with_embeddings": round(whole, 4),
        "forward_ratio": round(ratio["forward"], 3),
        "backward_ratio": round(ratio["backward"], 3),
        "generate_tokens_per_s_ratio": round(1 / ratio["generate"], 3),
        "logit_error": round(float((logits - wanted).norm() / wanted.norm()), 6),
        "same_top_token": round(float((logits.argmax(-1) == wanted.argmax(-1)).float().mean()), 4),
        "tokens_rerouted": round(float(moved.any(0).float().mean()), 4),
        "routing_changed_per_layer": round(float(moved.float().mean()), 4),
        "turns": turn - 1,
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--full", action="store_true", help="long sequences, too, and more turns")
    parser.add_argument("--only", help="only the cases whose name holds this text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [case for case in CASES if (options.full or not case.full) and (options.only or "") in case.name]
    models = [measure(case, 45.0 if options.full else 3.5) for case in cases]
    if options.json:
        print(json.dumps({"device": "cpu, 1 thread", "models": models}, indent=2))
        return 0
    for entry in models:
        print(
            f"{entry['name']:28} size {entry['size_ratio']:.3f}  forward {entry['forward_ratio']:.2f}  "
            f"backward {entry['backward_ratio']:.2f}  tokens/s {entry['generate_tokens_per_s_ratio']:.2f}  "
            f"logit error {entry['logit_error']:.4f}  rerouted {entry['tokens_rerouted']:.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
