"""What the parts share: results kept as they come, and a stand-in where torch is older than the pinned one."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Report:
    """A part's figures: written to the file after each one, so that a part cut short leaves what it had."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.figures: dict[str, Any] = {}

    def put(self, **figures: Any) -> None:
        """Add figures and write all of them."""
        self.figures |= figures
        if self._file is not None:
            self._file.write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")

    def skip(self, reason: str) -> int:
        """Say why there are no figures; the exit status."""
        self.put(skipped=reason)
        return 0


def options(text: str | None) -> argparse.Namespace:
    """`--device`, `--small` and `--out`, which every part has."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the figures here as they come")
    return parser.parse_args()


def exact_products() -> None:
    """No TF32, no sums in half precision."""
    torch.set_num_threads(1)
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = False


def grouped_products() -> str:
    """Where `grouped_mm` comes from: torch, or (before 2.10) a loop put in its place."""
    if hasattr(F, "grouped_mm"):
        return "torch"

    def loop(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        ends = offs.tolist()
        rows = zip([0, *ends], ends, strict=False)
        return torch.cat([x[start:stop] @ weight[at] for at, (start, stop) in enumerate(rows)])

    F.grouped_mm = loop  # type: ignore[assignment]
    return f"a loop: torch {torch.__version__} has no grouped_mm"


def milliseconds(work: Callable[[], Any], device: torch.device, turns: int) -> list[float]:
    """Milliseconds of each turn after two for warming up."""
    taken = []
    for turn in range(turns + 2):
        before = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn > 1:
            taken.append(1e3 * (time.perf_counter() - before))
    return taken


def median(values: list[float]) -> float:
    """Rounded to four significant digits."""
    return float(f"{statistics.median(values):.4g}")
