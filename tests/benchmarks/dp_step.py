"""What privacy costs per training step: book-keeping engine against non-private LoRA and against Opacus' hooks.

Same model, layers, batch, precision and optimizer; the private step includes clipping, sum and noise. Stretches of
steps of the variants alternate, and medians are compared. Peak memory is the whole process's, each variant in its own.

    python tests/benchmarks/dp_step.py --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV3Config

from fl_client.dp.adapt import AdaptedModel, adapt
from fl_client.dp.batches import Records, micro_batches
from fl_client.dp.canaries import worst_case_adapter
from fl_client.dp.engine import DPEngine, per_record_loss
from fl_shared.manifest import LoraSection
from fl_shared.privacy import Mechanism

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from helpers.random_models import float_model, quantise_in_place, random_records  # noqa: E402 - made importable above

CLASSES = 20
VARIANTS = ("plain", "book", "hooks")
LORA = LoraSection(rank=8, alpha=16.0, targets=("attention", "shared_experts", "routed_experts"))
# name: config, tokens of a record (low, high), units in a step; 338 is what the hospital scenario samples in a step on
# average. `--full` adds longer records and smaller batches.
SHAPES: dict[str, tuple[dict[str, int], tuple[int, int], int]] = {
    "tiny": (
        {"hidden_size": 256, "num_hidden_layers": 4, "moe_intermediate_size": 128, "n_routed_experts": 16},
        (4, 16),
        338,
    ),
    "small-100M": (
        {"hidden_size": 512, "num_hidden_layers": 6, "moe_intermediate_size": 384, "n_routed_experts": 32},
        (32, 64),
        24,
    ),
    "tiny, 64 units": (
        {"hidden_size": 256, "num_hidden_layers": 4, "moe_intermediate_size": 128, "n_routed_experts": 16},
        (4, 16),
        64,
    ),
    "small-100M, 512 tokens": (
        {"hidden_size": 512, "num_hidden_layers": 6, "moe_intermediate_size": 384, "n_routed_experts": 32},
        (512, 512),
        4,
    ),
}
DEFAULT = ("tiny", "small-100M")
STRETCH = 3


def build(name: str, device: torch.device) -> tuple[AdaptedModel, Records]:
    """An int8 DeepseekV3 of that shape under a random adapter, and its records."""
    shape, (low, high), units = SHAPES[name]
    config = DeepseekV3Config(
        vocab_size=4096, num_attention_heads=4, num_key_value_heads=4, intermediate_size=2 * shape["hidden_size"],
        n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=64, q_lora_rank=96,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, n_group=1, topk_group=1, **shape,
    )  # fmt: skip
    model = quantise_in_place(float_model(config)).to(device)
    hidden = shape["hidden_size"]
    adapted = adapt(model, LORA, CLASSES, torch.zeros(hidden, device=device), torch.ones(hidden, device=device))
    worst_case_adapter(adapted, np.random.default_rng(0), scale=0.02)
    records = random_records(units, low=low, high=high, vocabulary=4096, classes=CLASSES)
    return adapted, records


class Stepper:
    """One logical step of a variant on all records."""

    def __init__(self, variant: str, adapted: AdaptedModel, records: Records) -> None:
        self.variant, self.adapted, self.records = variant, adapted, records
        self.units = list(range(records.units))
        self.device = next(iter(adapted.plan.values())).device
        self.plain = torch.optim.SGD(list(adapted.plan.values()), lr=1e-6, momentum=0.9)
        self.mechanism = Mechanism(noise_multiplier=1.0, sampling_probability=1.0, steps=1, clipping_norm=1.0)
        self.engine: DPEngine | None = None

    def open(self) -> None:
        """Make the engine outside the measured time: a round makes it once."""
        if self.variant != "plain":
            self.engine = DPEngine(
                self.adapted, self.records, self.mechanism, learning_rate=1e-6, head_learning_rate=1e-6,
                momentum=0.9, engine="hooks" if self.variant == "hooks" else "book",
            )  # fmt: skip

    def close(self) -> None:
        """Take hooks off again."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def step(self) -> None:
        """The step itself."""
        if self.engine is not None:
            self.engine.step(self.units)
        else:
            self.plain.zero_grad(set_to_none=True)
            for batch in micro_batches(self.records, self.units, self.device):
                loss = per_record_loss(self.adapted.classifier(batch.ids, batch.mask), batch.labels)
                (loss.sum() / len(self.units)).backward()
            self.plain.step()
            self.plain.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def times(name: str, device: torch.device, seconds: float) -> dict[str, float]:
    """Median seconds a step of each variant, in alternating stretches of steps, for about `seconds` in all.

    A round takes its steps one after another, so each stretch begins with one that is not counted.
    """
    adapted, records = build(name, device)
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    # One thread on a shared machine: its own CPU time says more than the wall clock.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    started, turn = time.perf_counter(), 0
    while turn < 2 or time.perf_counter() - started < seconds:
        order = VARIANTS if turn % 2 else VARIANTS[::-1]
        for variant in order:
            if variant == "hooks" and turn > 0:
                continue  # slow, and only a footnote
            stepper = Stepper(variant, adapted, records)
            stepper.open()
            stepper.step()
            for _ in range(1 if variant == "hooks" else STRETCH):
                before = clock()
                stepper.step()
                found[variant].append(clock() - before)
            stepper.close()
        turn += 1
    return {variant: statistics.median(values) for variant, values in found.items()} | {
        "steps": float(len(found["book"]))
    }


def peak_bytes(name: str, variant: str, device: torch.device) -> tuple[int, int]:
    """Peak memory of two steps, whole and above what lay there before them: bytes."""
    adapted, records = build(name, device)
    stepper = Stepper(variant, adapted, records)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building
        before = _status("VmRSS")
    stepper.open()
    for _ in range(2):
        stepper.step()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")
    return peak, peak - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _peak_in_child(name: str, variant: str, device: str) -> tuple[int, int]:
    out = subprocess.run(
        [sys.executable, __file__, "--peak", name, variant, "--device", device],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    whole, above = json.loads(out.splitlines()[-1])
    return whole, above


def measure(name: str, device: str, seconds: float) -> dict[str, Any]:
    """One entry of `models`."""
    median = times(name, torch.device(device), seconds)
    peaks = {variant: _peak_in_child(name, variant, device) for variant in ("plain", "book")}
    _, (low, high), units = SHAPES[name]
    return {
        "name": name,
        "units": units,
        "tokens": [low, high],
        "time_ratio": round(median["book"] / median["plain"], 3),
        "memory_ratio": round(peaks["book"][0] / peaks["plain"][0], 3),
        "memory_above_model_ratio": round(peaks["book"][1] / max(1, peaks["plain"][1]), 3),
        "vs_opacus_hooks": round(median["book"] / median["hooks"], 3),
        "seconds_per_step": {variant: round(median[variant], 4) for variant in VARIANTS},
        "steps_measured": int(median["steps"]),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--full", action="store_true", help="all shapes, and longer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        name, variant = options.peak
        print(json.dumps(peak_bytes(name, variant, torch.device(options.device))))
        return 0
    names = list(SHAPES) if options.full else list(DEFAULT)
    models = [measure(name, options.device, 60.0 if options.full else 6.0) for name in names]
    where = torch.cuda.get_device_name() if options.device == "cuda" else "cpu, 1 thread"
    if options.json:
        print(json.dumps({"device": where, "models": models}, indent=2))
        return 0
    for entry in models:
        print(
            f"{entry['name']:24} time {entry['time_ratio']:.2f} x, memory {entry['memory_ratio']:.2f} x non-private, "
            f"{entry['vs_opacus_hooks']:.2f} x Opacus' hooks"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
