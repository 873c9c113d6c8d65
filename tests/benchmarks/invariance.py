"""Does a unit change how others are computed? Hostile adapters over families and precisions, and what the answer costs.

`worst_change_over_paid` is the largest change that one longer record makes to a clipped sum, or to a sum of evaluation
vectors, over what the noise pays for; `bitwise` says whether every other unit's contribution and answer stayed the
same bits; `evaluation_time_ratio` is the time of evaluating packed records over that of padded ones with stock
kernels, as it was before, by medians over alternating runs on the packaged base.

    python tests/benchmarks/invariance.py --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.checks import check_layers
from fl_client.dp.records.packing import FULL
from fl_client.dp.records.records import Records, pad_ids
from fl_client.dp.rounding import slack

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from dp_step import build  # noqa: E402  # beside this file

from helpers.hostile_adapters import (  # noqa: E402  # as above
    ATTACKS,
    change_of_evaluation,
    change_of_sum,
    company,
    is_bitwise,
    logits,
)
from helpers.random_models import ARCHITECTURES, adapted_small, cast_base  # noqa: E402  # as above

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TINY = "tiny"
NORM = 0.5


def attack(adapted: AdaptedModel, name: str, units: int, vocabulary: int) -> tuple[float, float, bool]:
    """Change of sum and of evaluation over what is paid, and whether all bits stayed."""
    ATTACKS[name](adapted, np.random.default_rng(3))
    (classes,) = adapted.module.head.shape
    records = company(
        np.random.default_rng(5), units=units, vocabulary=vocabulary, classes=classes, low=3, high=9, longer=31
    )
    top_k = int(adapted.module.backbone.config.num_experts_per_tok)  # type: ignore[union-attr,arg-type]  # it is one
    paid = slack(units=units + 1, rows=top_k * FULL)
    return (
        change_of_sum(adapted, records, NORM, paid),
        change_of_evaluation(adapted, records),
        is_bitwise(adapted, records),
    )


def sweep(device: torch.device, units: int, families: tuple[str, ...]) -> list[dict[str, Any]]:
    """One entry for each family, precision and adapter; every model is held to its machine's check first."""
    found = []
    for family in families:
        for precision, dtype in DTYPES.items():
            if family == TINY:
                adapted, vocabulary = build(TINY, device, dtype)[0], 6000
            else:
                adapted, vocabulary = adapted_small(family, quantised=True), 96
                cast_base(adapted.module.to(device).backbone, dtype)
            check_layers(adapted, vocabulary=vocabulary)
            for name in ATTACKS:
                sums, evaluation, bitwise = attack(adapted, name, units, vocabulary)
                found.append({
                    "family": family, "precision": precision, "adapter": name, "sum": round(sums, 9),
                    "evaluation": round(evaluation, 9), "bitwise": bitwise, "heights": len(adapted.heights),
                })  # fmt: skip
    return found


def padded(adapted: AdaptedModel, records: Records, device: torch.device) -> None:
    """Evaluation as it was: padded to the longest record of 128, stock kernels."""
    order = sorted(range(records.units), key=lambda row: len(records.ids[row]))
    with torch.no_grad():
        for at in range(0, len(order), 128):
            adapted.module(*pad_ids([records.ids[row] for row in order[at : at + 128]], device))


def evaluation_ratio(device: torch.device, pairs: int) -> float:
    """Median over alternating pairs, packed over padded."""
    adapted, records = build(TINY, device)
    ratios = []
    for pair in range(pairs + 1):
        taken = {}
        for packed in (True, False) if pair % 2 else (False, True):
            before = time.process_time() if device.type == "cpu" else time.perf_counter()
            logits(adapted, records) if packed else padded(adapted, records, device)
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken[packed] = (time.process_time() if device.type == "cpu" else time.perf_counter()) - before
        ratios.append(taken[True] / taken[False])
    return statistics.median(ratios[1:])  # the first pair warms up


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--full", action="store_true", help="more units beside the longer one")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    entries = sweep(device, 128 if options.full else 24, (*ARCHITECTURES, TINY))
    found = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, 1 thread",
        "worst_change_over_paid": max(max(entry["sum"], entry["evaluation"]) for entry in entries),
        "bitwise": all(entry["bitwise"] for entry in entries),
        "evaluation_time_ratio": round(evaluation_ratio(device, 9 if options.full else 5), 3),
        "cases": len(entries),
        "entries": entries,
    }
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for entry in entries:
        kind = f"{entry['family']:12} {entry['precision']:9} {entry['adapter']:26}"
        print(f"{kind} {entry['sum']:.7f} {entry['bitwise']}")
    print({name: value for name, value in found.items() if name != "entries"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
