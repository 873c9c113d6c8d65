"""Greedy generation: the shipped base against its dequantised float form, and tokens/s at DeepSeek-V2-Lite's shape."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from compat import Report, exact_products, grouped_products, options
from step import empty_model, fill, layers_that_fit, quantised_model
from torch import Tensor, nn

from fl_client.model.load import load_model
from helpers.benchmarks import load_benchmark

PROMPT = 16


def prompts(rows: int, vocabulary: int, device: torch.device) -> Tensor:
    """Random token ids `[rows, PROMPT]`, without the special ones."""
    chance = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (rows, PROMPT), generator=chance).to(device)


def greedy(model: Any, ids: Tensor, new: int) -> Tensor:
    """The `new` tokens that follow, `[rows, new]`; an end-of-text token does not end them."""
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    tokens: Tensor = made[:, ids.shape[1] :]
    return tokens


def agreement(device: torch.device, new: int) -> dict[str, Any]:
    """The shipped int8 base and the float model that it stands for, float32 both."""
    quantised = load_model("tiny", str(device), dtype=torch.float32).module
    exact = load_benchmark("quantisation").dequantised(quantised).to(device)
    ids = prompts(8, 6000, device)
    with torch.no_grad():
        ours, theirs = greedy(quantised, ids, new), greedy(exact, ids, new)
        found, wanted = quantised(ids).logits, exact(ids).logits
    return {
        "same_tokens": bool(torch.equal(ours, theirs)),
        "share_of_same_tokens": float((ours == theirs).float().mean()),
        "logit_error": float((found - wanted).norm() / wanted.norm()),
    }


def pace(model: nn.Module, device: torch.device, rows: int, new: int) -> float:
    """Tokens a second over all rows, the better of two after one for warming up."""
    ids, best = prompts(rows, 500, device), 0.0
    with torch.no_grad():
        for turn in range(3):
            before = time.perf_counter()
            greedy(model, ids, new)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, rows * new / (time.perf_counter() - before)) if turn else 0.0
    return round(best, 1)


def main() -> int:
    """Measure."""
    chosen = options(__doc__)
    exact_products()
    device, report = torch.device(chosen.device), Report(chosen.out)
    new = 4 if chosen.small else 32
    report.put(grouped_mm=grouped_products())
    report.put(tiny=agreement(device, new))
    layers = 2 if chosen.small else layers_that_fit(device)
    report.put(layers=layers, tokens_per_s={})
    for name in ("int8", "bfloat16"):
        if name == "int8":
            model = quantised_model(device, small=chosen.small, layers=layers)
        else:
            model = fill(empty_model(small=chosen.small, layers=layers), device, torch.bfloat16)
        rows = (1,) if chosen.small else (1, 16)
        report.figures["tokens_per_s"][name] = {f"batch {n}": pace(model, device, n, new) for n in rows}
        report.put()
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
