"""A private training step at the real shape on a GPU: random weights of DeepSeek-V2-Lite's size, int8, 512 tokens.

Four variants, each in processes of its own, once in this order and once in reverse: this project's private step
(`book`), what a non-private user would run (`peft`: Hugging Face and PEFT, LoRA on the same layers, bfloat16 weights),
the private step's layers without privacy (`plain`), and int8 without training (`forward`). The quantised model is made
tensor by tensor on the device; no float copy of it ever exists. A GPU with less memory gets fewer of the 27 layers, and
the output says how many. A variant that runs out of memory says so beside the others' figures. Without a CUDA device
nothing is measured, and the output says so; `--small --device cpu` takes the same way with a model of 2 layers and
proves only that.

    python tests/gpu/step.py --json --out step.json
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV2Config

from fl_client.dp.adapt import adapt
from fl_client.dp.engine import DPEngine, is_out_of_memory
from fl_client.dp.objective import losses_of
from fl_client.dp.records.packing import cut
from fl_client.dp.records.records import Records, cut_units, micro_batches
from fl_client.model.architectures import architecture_of
from fl_client.model.layout import expert_modules
from fl_client.model.load import make_rotary, with_quantised_layers
from fl_client.model.quantised.tensor import GROUP
from fl_client.tasks.classification import CrossEntropy
from fl_shared.documents.spec import LoraSection
from fl_shared.errors import EngineError
from fl_shared.privacy.mechanism import Mechanism

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from compat import exact_products, grouped_products  # noqa: E402 - made importable above

from helpers.random_models import random_records  # noqa: E402 - made importable above

CLASSES = 20
VARIANTS = ("book", "peft", "plain", "forward")
LORA = LoraSection(rank=8, alpha=16.0, targets=("attention", "shared_experts", "routed_experts"))
MECHANISM = Mechanism(noise_multiplier=1.0, sampling_probability=1.0, steps=1, clipping_norm=1.0)
V2_LITE = {
    "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "kv_lora_rank": 512,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 1,
    "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
}  # fmt: skip
SMALL = V2_LITE | {
    "vocab_size": 512, "hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 256, "moe_intermediate_size": 96, "n_routed_experts": 8, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
UNITS, TOKENS = 8, 512


def layers_that_fit(device: torch.device) -> int:
    """Layers of V2-Lite, at most 27, whose bfloat16 weights (1.2 GB each) take 6 tenths of the GPU's memory."""
    room = torch.cuda.get_device_properties(device).total_memory * 0.6 - 1e9
    return max(2, min(int(V2_LITE["num_hidden_layers"] or 0), int(room / 1.2e9)))


def empty_model(*, small: bool, layers: int | None = None) -> nn.Module:
    """The architecture on the meta device, with all its layers or the first few."""
    shape = SMALL if small else V2_LITE
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            DeepseekV2Config(**(shape | ({"num_hidden_layers": layers} if layers else {}))), attn_implementation="sdpa"
        )
    model.set_experts_implementation("grouped_mm")
    return model  # type: ignore[no-any-return]


def fill(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random values straight onto the device, tensor by tensor, each in the type it is kept in; frozen, in eval mode.

    Levels are uniform; the scale makes weights of standard deviation 0.02.
    """
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        value = nn.Parameter(_random(leaf, parameter, device, dtype, generator), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, value)
    for name, buffer in list(model.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        if buffer.is_meta and not parent.endswith("rotary_emb"):
            model.get_submodule(parent)._buffers[leaf] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
    make_rotary(model, device)
    return model.eval()


def _random(leaf: str, like: Tensor, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if leaf.endswith("qweight"):
        low, high = (-127, 128) if like.dtype == torch.int8 else (0, 256)
        return torch.randint(low, high, like.shape, dtype=like.dtype, device=device, generator=generator)
    if leaf.endswith("scale"):
        return torch.full(like.shape, 0.02 / 73.6, device=device)
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=dtype, device=device)
    return torch.empty(like.shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)


def quantised_model(device: torch.device, *, small: bool, layers: int | None = None) -> nn.Module:
    """The int8 model; what stays float is bfloat16."""
    return fill(with_quantised_layers(empty_model(small=small, layers=layers), 8, GROUP), device, torch.bfloat16)


@dataclass(frozen=True)
class Stepper:
    """Takes one step of a variant."""

    step: Callable[[], None]
    records: Records
    engine: DPEngine | None = None

    def micro_batch(self) -> int:
        """Units in the largest micro-batch. The engine of `book` halves it when memory runs out; nothing else does."""
        if self.engine is None:
            return max(map(len, cut_units(self.records, range(UNITS))))
        heights = self.engine.adapted.heights
        return max(map(len, cut(self.records, range(UNITS), max_units=self.engine.max_units, heights=heights)))


def stepper(variant: str, device: torch.device, *, small: bool, layers: int | None = None) -> Stepper:
    """A variant, ready to step; all are given the same records."""
    shape = SMALL if small else V2_LITE
    tokens = 32 if small else TOKENS
    records = random_records(UNITS, low=tokens, high=tokens, vocabulary=int(shape["vocab_size"] or 0), classes=CLASSES)
    if variant == "peft":
        plain = fill(empty_model(small=small, layers=layers), device, torch.bfloat16)
        return Stepper(_peft_step(plain, records, device), records)
    model = quantised_model(device, small=small, layers=layers)
    if variant == "forward":
        backbone: Any = model.model

        def forward() -> None:
            with torch.no_grad():
                for batch in micro_batches(records, list(range(UNITS)), device):
                    backbone(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)

        return Stepper(forward, records)
    hidden = int(shape["hidden_size"] or 0)
    adapted = adapt(
        model, LORA, CrossEntropy(CLASSES), torch.zeros(hidden, device=device), torch.ones(hidden, device=device)
    )
    if variant == "plain":
        return Stepper(_plain_step(adapted.module, list(adapted.trainable.values()), records, device), records)
    engine = DPEngine(
        adapted, records, MECHANISM, learning_rate=1e-6, head_learning_rate=1e-6, momentum=0.9, engine="book"
    )
    return Stepper(lambda: engine.step(list(range(UNITS))), records, engine)


def _plain_step(
    classifier: Callable[[Tensor, Tensor], Tensor], trained: list[Any], records: Records, device: torch.device
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9)

    def step() -> None:
        for batch in micro_batches(records, list(range(UNITS)), device):
            loss = losses_of(CrossEntropy(CLASSES), classifier(batch.ids, batch.mask), batch.targets)
            (loss.sum() / UNITS).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _peft_step(model: nn.Module, records: Records, device: torch.device) -> Callable[[], None]:
    """PEFT's own LoRA: layers by name, the fused experts by `target_parameters`; mean pooling and a linear head."""
    inner: Any = model.model
    groups = architecture_of("deepseek_v2").groups()
    suffixes = tuple(f".{name}" for group in ("attention", "shared_experts") for name in groups[group])
    linears = [path for path, module in inner.named_modules() if path.endswith(suffixes)]
    experts = list(expert_modules(inner))
    wrapper = nn.Module()  # without a Hugging Face config, or PEFT drops the shared experts
    wrapper.model = inner
    settings = LoraConfig(
        r=LORA.rank, lora_alpha=int(LORA.alpha),
        target_modules="(" + "|".join(re.escape(f"model.{path}") for path in linears) + ")",
        target_parameters=[f"model.{path}.{part}" for path in experts for part in ("gate_up_proj", "down_proj")],
    )  # fmt: skip
    inject_adapter_in_model(settings, wrapper)
    head = nn.Linear(int(inner.config.hidden_size), CLASSES, device=device)
    trained = [p for name, p in wrapper.named_parameters() if "lora_" in name]
    wanted = 2 * (len(linears) + 2 * len(experts))
    if len(trained) != wanted:
        raise RuntimeError(f"PEFT adapts {len(trained)} tensors, not {wanted}")

    def classify(ids: Tensor, mask: Tensor) -> Tensor:
        last = inner(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        real = mask.unsqueeze(-1).float()
        logits: Tensor = head((last * real).sum(1) / real.sum(1))
        return logits

    return _plain_step(classify, [*trained, *head.parameters()], records, device)


def measure_one(
    variant: str, device: torch.device, *, small: bool, turns: int, layers: int | None = None
) -> dict[str, Any]:
    """Median seconds a step, units in a micro-batch and, on CUDA, peak memory; no memory left is a result, too."""
    cuda = device.type == "cuda"
    try:
        made = stepper(variant, device, small=small, layers=layers)
        taken = []
        for turn in range(turns + 2):
            if cuda and turn == 2:  # the first ones compile kernels, warm up, and find the micro-batch that fits
                torch.cuda.reset_peak_memory_stats()
            before = time.perf_counter()
            made.step()
            if cuda:
                torch.cuda.synchronize()
            if turn > 1:
                taken.append(time.perf_counter() - before)
    except (EngineError, RuntimeError, MemoryError) as error:
        if not isinstance(error, EngineError) and not is_out_of_memory(error):
            raise
        return {"variant": variant, "failed": f"{type(error).__name__}: {error}"}
    return {
        "variant": variant,
        "seconds_per_step": statistics.median(taken),
        "tokens_per_s": UNITS * (32 if small else TOKENS) / statistics.median(taken),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "units_per_micro_batch": made.micro_batch(),
    }


def merged(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One entry from a variant's processes: medians, the largest peak, the smallest micro-batch, the first failure."""
    entry: dict[str, Any] = {"variant": runs[0]["variant"]}
    measured = [run for run in runs if "failed" not in run]
    if measured:
        seconds = [run["seconds_per_step"] for run in measured]
        entry |= {
            "seconds_per_step": statistics.median(seconds),
            "seconds_per_step_of_each_process": seconds,
            "tokens_per_s": statistics.median(run["tokens_per_s"] for run in measured),
            "peak_bytes": max((run["peak_bytes"] for run in measured if run["peak_bytes"]), default=None),
            "units_per_micro_batch": min(run["units_per_micro_batch"] for run in measured),
        }
    if len(measured) < len(runs):
        entry["failed"] = next(run["failed"] for run in runs if "failed" in run)
    return entry


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--full", action="store_true", help="more steps")
    parser.add_argument("--small", action="store_true", help="2 layers instead of 27")
    parser.add_argument(
        "--rounds", type=int, choices=range(1, 10), default=2, metavar="N", help="processes of a variant"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the result so far here, after every process")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu only with --small")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="only these")
    parser.add_argument("--layers", type=int, metavar="N", help="layers of the real shape (as many as fit, up to 27)")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu" and not options.small:
        parser.error("the real shape needs a GPU; take --small with --device cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        reason = "not measured: this machine has no CUDA device"
        print(json.dumps({"device": None, "models": [], "skipped": reason}) if options.json else reason)
        return 0
    device, turns = torch.device(options.device), 20 if options.full else 5
    exact_products()
    if options.variant:
        grouped_products()
        found = measure_one(options.variant, device, small=options.small, turns=turns, layers=options.layers)
        print(json.dumps(found))
        return 0
    if options.layers is None and not options.small:
        options.layers = layers_that_fit(device)
    parameters = sum(p.numel() for p in empty_model(small=options.small, layers=options.layers).parameters())
    runs: dict[str, list[dict[str, Any]]] = {}
    for turn in range(options.rounds):
        for variant in options.variants if turn % 2 == 0 else reversed(options.variants):
            runs.setdefault(variant, []).append(_in_child(variant, options))
            result = json.dumps(_result(runs, options, parameters), indent=2)
            if options.out:
                options.out.write_text(f"{result}\n", encoding="utf-8")
    print(result)
    return 0


def _result(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], options: argparse.Namespace, parameters: int
) -> dict[str, Any]:
    """What is known after these processes."""
    found = {variant: merged(each) for variant, each in runs.items()}
    entry = {
        "name": "two small layers" if options.small else "DeepSeek-V2-Lite's shape",
        "parameters": parameters,
        "layers": 2 if options.small else options.layers,
        "whole_depth": int(V2_LITE["num_hidden_layers"] or 0),
        "units": UNITS,
        "tokens": 32 if options.small else TOKENS,
        "time_ratio": _ratio(found, "book", "plain", "seconds_per_step"),
        "memory_ratio": _ratio(found, "book", "plain", "peak_bytes"),
        "time_vs_peft": _ratio(found, "book", "peft", "seconds_per_step"),
        "time_vs_peft_of_each_pair": _pairs(runs),
        "memory_vs_peft": _ratio(found, "book", "peft", "peak_bytes"),
        "variants": list(found.values()),
    }
    return {"device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu", "models": [entry]}


def _pairs(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[float]:
    """Private over PEFT, of each round in which both were measured: neighbours in time."""
    both = zip(runs.get("book", []), runs.get("peft", []), strict=False)
    return [
        round(own["seconds_per_step"] / other["seconds_per_step"], 3)
        for own, other in both
        if "failed" not in own and "failed" not in other
    ]


def _in_child(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measured; when it died of something else than memory, its words are on stderr."""
    flags = [flag for flag in ("--full", "--small") if getattr(options, flag.removeprefix("--"))]
    if options.layers:
        flags += ["--layers", str(options.layers)]
    done = subprocess.run(
        [sys.executable, __file__, "--variant", variant, "--device", options.device, *flags],
        check=False, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        return {"variant": variant, "failed": f"the process ended with {done.returncode}"}
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _ratio(found: dict[str, dict[str, Any]], over: str, under: str, key: str) -> float | None:
    upper, lower = found.get(over, {}).get(key), found.get(under, {}).get(key)
    return round(upper / lower, 3) if upper and lower else None


if __name__ == "__main__":
    sys.exit(main())
