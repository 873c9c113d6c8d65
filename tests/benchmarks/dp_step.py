"""What privacy costs per training step: book-keeping engine against non-private LoRA and against Opacus' hooks.

Same model, layers, batch, precision and optimizer; the private step includes clipping, sum and noise. Steps of the two
alternate; the time is the median over pairs of neighbours. Peak memory is the whole process's. The base computes in
float32 on CPU and in bfloat16 on CUDA, as `load_model` has it.

    python tests/benchmarks/dp_step.py --json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config

from fl_client.data.icd10 import hospital_split
from fl_client.data.units import UnitData
from fl_client.dp.adapt import AdaptedModel, adapt
from fl_client.dp.audit.canaries import worst_case_adapter
from fl_client.dp.engine import DPEngine, precision_of
from fl_client.dp.objective import losses_of
from fl_client.dp.records.records import Records, micro_batches
from fl_client.model.load import load_model
from fl_client.tasks.classification import Classification, CrossEntropy
from fl_shared.documents.spec import LoraSection
from fl_shared.privacy.mechanism import Mechanism

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from helpers.random_models import cast_base, float_model, quantise_in_place, random_records  # noqa: E402 - as above

CLASSES = 22  # the chapters of ICD-10
PAIR = ("plain", "book")
VARIANTS = (*PAIR, "hooks")
LORA = LoraSection(rank=8, alpha=16.0, targets=("attention", "shared_experts", "routed_experts"))
MECHANISM = Mechanism(noise_multiplier=1.0, sampling_probability=1.0, steps=1, clipping_norm=1.0)
PAIRS = 6  # at least
# The base that ships with the package on the scenario's own texts: name and records in a step. 338 is what a step of
# the hospital scenario samples on average.
TINY = {"tiny": 338, "tiny, 64 units": 64}


@dataclass(frozen=True)
class Shape:
    """A DeepseekV3 with random weights, and random records of `tokens` (low, high)."""

    hidden: int
    layers: int
    inner: int
    experts: int
    tokens: tuple[int, int]
    units: int


SHAPES = {
    "small-100M": Shape(hidden=512, layers=6, inner=384, experts=32, tokens=(32, 64), units=24),
    "random tiny": Shape(hidden=256, layers=4, inner=128, experts=16, tokens=(4, 16), units=338),
    "small-100M, 512 tokens": Shape(hidden=512, layers=6, inner=384, experts=32, tokens=(512, 512), units=4),
}
DEFAULT = ("tiny", "small-100M")
FULL = (*TINY, *SHAPES)


def build(name: str, device: torch.device, dtype: torch.dtype | None = None) -> tuple[AdaptedModel, Records]:
    """An int8 model under a random adapter, and the records of one step.

    `dtype` is what the base computes in; by default as `load_model` chooses.
    """
    kind = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    source = _tiny(TINY[name], device, kind) if name in TINY else _random(SHAPES[name], device, kind)
    model, mean, std, records = source
    adapted = adapt(model, LORA, CrossEntropy(CLASSES), mean, std)
    worst_case_adapter(adapted, np.random.default_rng(0), scale=0.02)
    return adapted, records


def _tiny(units: int, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor, Records]:
    """The packaged base and so many of the first hospital's records."""
    loaded = load_model("tiny", str(device), dtype)
    held = hospital_split()[0][::3]
    rows = [held[at] for at in np.random.default_rng(0).choice(len(held), units, replace=False)]
    texts, labels = zip(*rows, strict=True)
    data = UnitData(texts, labels, np.arange(units), units, "0" * 64)
    task = Classification(tuple(str(chapter) for chapter in range(1, CLASSES + 1)), 32)
    return loaded.module, loaded.feature_mean, loaded.feature_std, task.encode(data, loaded.tokenizer)


def _random(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor, Records]:
    config = DeepseekV3Config(
        vocab_size=4096, hidden_size=shape.hidden, num_hidden_layers=shape.layers, moe_intermediate_size=shape.inner,
        n_routed_experts=shape.experts, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=2 * shape.hidden, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1,
        kv_lora_rank=64, q_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, n_group=1,
        topk_group=1,
    )  # fmt: skip
    model = cast_base(quantise_in_place(float_model(config)).to(device), dtype)
    low, high = shape.tokens
    records = random_records(shape.units, low=low, high=high, vocabulary=4096, classes=CLASSES)
    return model, torch.zeros(shape.hidden, device=device), torch.ones(shape.hidden, device=device), records


class Stepper:
    """One logical step of a variant on all records."""

    def __init__(self, variant: str, adapted: AdaptedModel, records: Records) -> None:
        self.variant, self.adapted, self.records = variant, adapted, records
        self.units = list(range(records.units))
        self.device = next(iter(adapted.trainable.values())).device
        self.plain = torch.optim.SGD(list(adapted.trainable.values()), lr=1e-6, momentum=0.9)
        self.engine: DPEngine | None = None  # made once, as a round makes it
        if variant != "plain":
            self.engine = DPEngine(
                adapted, records, MECHANISM, learning_rate=1e-6, head_learning_rate=1e-6, momentum=0.9,
                engine="hooks" if variant == "hooks" else "book",
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
                loss = losses_of(self.adapted.objective, self.adapted.module(batch.ids, batch.mask), batch.targets)
                (loss.sum() / len(self.units)).backward()
            self.plain.step()
            self.plain.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def times(adapted: AdaptedModel, records: Records, device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds of each variant's steps: `plain` and `book` take turns, first one and then the other leading.

    Opacus' hooks are slow and only a footnote: one step.
    """
    # One thread on a shared machine: its own CPU time says more than the wall clock.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}

    def take(steppers: Sequence[Stepper]) -> None:
        for stepper in steppers:
            before = clock()
            stepper.step()
            found[stepper.variant].append(clock() - before)

    pair = [Stepper(variant, adapted, records) for variant in PAIR]
    for stepper in pair:
        stepper.step()
    started = time.perf_counter()
    while len(found["book"]) < PAIRS or time.perf_counter() - started < seconds:
        take(pair)
        pair.reverse()
    hooks = Stepper("hooks", adapted, records)
    take([hooks])
    hooks.close()
    return found


def peak_bytes(variant: str, adapted: AdaptedModel, records: Records, device: torch.device) -> tuple[int, int]:
    """Peak memory of two steps, whole and above what lay there before them: bytes.

    On the CPU a forked copy of this process takes them, so that no variant finds what another left on the heap.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _two_steps(variant, adapted, records)
        peak = torch.cuda.max_memory_allocated()
        return peak, peak - before
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()

    def resident() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building
        before = _status("VmRSS")
        _two_steps(variant, adapted, records)
        found.put((_status("VmHWM"), before))

    child = context.Process(target=resident)
    child.start()
    child.join()
    if child.exitcode != 0:
        raise RuntimeError(f"the steps of {variant} ended with {child.exitcode}")
    peak, before = found.get()
    return peak, peak - before


def _two_steps(variant: str, adapted: AdaptedModel, records: Records) -> None:
    stepper = Stepper(variant, adapted, records)
    for _ in range(2):
        stepper.step()
    stepper.close()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(name: str, device: str, seconds: float) -> dict[str, Any]:
    """One entry of `models`."""
    place = torch.device(device)
    adapted, records = build(name, place)
    peaks = {variant: peak_bytes(variant, adapted, records, place) for variant in PAIR}
    taken = times(adapted, records, place, seconds)
    median = {variant: statistics.median(values) for variant, values in taken.items()}
    low, middle, high = statistics.quantiles(
        [book / plain for plain, book in zip(taken["plain"], taken["book"], strict=True)], n=4
    )
    return {
        "name": name,
        "precision": str(precision_of(adapted)).removeprefix("torch."),
        "units": records.units,
        "tokens": round(statistics.mean(len(ids) for ids in records.ids), 1),
        "time_ratio": round(middle, 3),
        "time_ratio_quartiles": [round(low, 3), round(high, 3)],
        "ratio_of_median_times": round(median["book"] / median["plain"], 3),
        "memory_ratio": round(peaks["book"][0] / peaks["plain"][0], 3),
        "memory_above_model_ratio": round(peaks["book"][1] / max(1, peaks["plain"][1]), 3),
        "vs_opacus_hooks": round(median["book"] / median["hooks"], 3),
        "seconds_per_step": {variant: round(median[variant], 4) for variant in VARIANTS},
        "steps_measured": len(taken["book"]),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--full", action="store_true", help="all shapes, and longer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = FULL if options.full else DEFAULT
    models = [measure(name, options.device, 40.0 if options.full else 13.0) for name in names]
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
