"""The benchmark of a private step runs on a small model and reports what it says it reports."""

from __future__ import annotations

import pytest
import torch

from fl_client.dp.engine import precision_of
from helpers.benchmarks import load_benchmark

dp_step = load_benchmark("dp_step")
torch.set_num_threads(1)


def test_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant takes its steps on the same records, and memory is that of forked copies."""
    small = dp_step.Shape(hidden=64, layers=2, inner=32, experts=4, tokens=(3, 5), units=6)
    monkeypatch.setattr(dp_step, "SHAPES", {"small": small})
    monkeypatch.setattr(dp_step, "PAIRS", 2)
    found = dp_step.measure("small", "cpu", 0.0)
    assert (found["name"], found["units"], found["steps_measured"]) == ("small", 6, 2)
    assert 3 <= found["tokens"] <= 5
    assert {"time_ratio", "memory_ratio", "vs_opacus_hooks"} <= set(found)
    assert all(seconds > 0 for seconds in found["seconds_per_step"].values())
    assert found["memory_ratio"] > 0.5
    assert found["precision"] == "float32"


def test_every_variant_takes_steps_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on CUDA: base and activations in bfloat16, scales and factors in float32; also on `tiny`."""
    small = dp_step.Shape(hidden=64, layers=2, inner=32, experts=4, tokens=(3, 5), units=6)
    monkeypatch.setattr(dp_step, "SHAPES", {"small": small})
    monkeypatch.setattr(dp_step, "TINY", {"tiny": 6})
    monkeypatch.setattr(dp_step, "PAIRS", 2)
    for name in ("small", "tiny"):
        adapted, records = dp_step.build(name, torch.device("cpu"), torch.bfloat16)
        assert precision_of(adapted) == torch.bfloat16
        assert {p.dtype for p in adapted.trainable.values()} == {torch.float32}
        scales = {p.dtype for at, p in adapted.module.backbone.named_parameters() if at.endswith("scale")}
        assert scales == {torch.float32}
        taken = dp_step.times(adapted, records, torch.device("cpu"), 0.0)
        assert {variant: len(steps) for variant, steps in taken.items()} == {"plain": 2, "book": 2, "hooks": 1}


def test_the_packaged_model_and_its_texts() -> None:
    """`tiny` is the base that ships, on records of the first hospital."""
    adapted, records = dp_step.build("tiny", torch.device("cpu"))
    assert adapted.architecture.model_type == "deepseek_v3"
    assert records.units == dp_step.TINY["tiny"]
    assert max(len(ids) for ids in records.ids) <= 32
    assert set(records.targets) <= set(range(dp_step.CLASSES))
