"""A round on two processes, one GPU each over NCCL (on the CPU over gloo), against the same round in one process."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from compat import Report, exact_products, grouped_products, options

from fl_client.data.units import UnitData
from fl_client.model.load import TINY, load_model
from fl_client.site.config import ModelConfig
from fl_client.training.ranks.group import RankGroup
from fl_client.training.round import train_round
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import EngineError
from fl_shared.privacy.mechanism import Mechanism
from helpers.specs import run_spec

TEXTS = ("cough", "fever and cough", "chest pain", "pain", "a broken rib", "asthma")
LABELS = ("lungs", "lungs", "heart", "heart", "heart", "lungs")
DATA = UnitData(TEXTS, LABELS, np.array([0, 0, 1, 2, 3, 4]), 5, "f" * 64)
# So little noise that the update is the data's, and everybody is in: any number of processes must give the same one.
ALMOST_NONE = Mechanism(noise_multiplier=1e-4, sampling_probability=1.0, steps=2, clipping_norm=1.0)


def spec(digest: str) -> RunSpec:
    """A run over two labels."""
    return run_spec(
        base_model=digest, sites=["site-a"], labels=["lungs", "heart"], targets=["attention", "routed_experts"],
        steps_per_round=2,
    )  # fmt: skip


def main() -> int:
    """Measure; the exit status is 1 when the updates differ by more than float rounding and the noise explain."""
    chosen = options(__doc__)
    report = Report(chosen.out)
    if chosen.device == "cuda" and torch.cuda.device_count() < 2:
        return report.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}")
    exact_products()
    report.put(backend="nccl" if chosen.device == "cuda" else "gloo", grouped_mm=grouped_products())
    model = load_model(TINY, device=chosen.device)
    made_for = spec(model.digest)
    alone = train_round(model, DATA, made_for, ALMOST_NONE, {}, round=1)
    with tempfile.TemporaryDirectory(prefix="r") as home:
        config = ModelConfig(directory=TINY, device=chosen.device, threads=1, processes=2)
        group = RankGroup(
            config, digest=model.digest, directory=Path(home) / "ranks", log_file=Path(home) / "ranks.log"
        )
        before = time.perf_counter()
        try:
            group.start()
            report.put(seconds_to_start=round(time.perf_counter() - before, 1))
            together = group.train(
                DATA, made_for, ALMOST_NONE, {}, round=1, progress=lambda **_: None, expected_batch=None, private=True
            )
        except EngineError:
            sys.stderr.write((Path(home) / "ranks.log").read_text(errors="replace")[-4000:])
            raise
        finally:
            group.stop()
    apart = max(float(np.abs(together.update[name] - value).max()) for name, value in alone.update.items())
    size = max(float(np.abs(value).max()) for value in alone.update.values())
    report.put(largest_difference=apart, largest_update=size)
    return 0 if apart < 1e-2 * size else 1


if __name__ == "__main__":
    sys.exit(main())
