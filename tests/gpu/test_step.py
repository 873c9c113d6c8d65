"""The GPU benchmark's way of making a model of the real shape, as far as it can be walked without a GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_client.dp.engine import DPEngine
from fl_client.dp.records.packing import Packed
from fl_client.model.load import with_quantised_layers
from helpers.benchmarks import load_benchmark

gpu_step = load_benchmark("step", "gpu")


def test_the_real_shape_is_that_of_deepseek_v2_lite() -> None:
    """15.7 billion parameters; int8 with its scales and the float rest take less than 17 GB. On the meta device."""
    model = gpu_step.empty_model(small=False)
    parameters = sum(p.numel() for p in model.parameters())
    assert 15.6e9 < parameters < 15.8e9
    quantised = with_quantised_layers(model, 8, 128)
    kept = {torch.int8: 1, torch.float32: 4}
    scales = sum(p.numel() * 4 for name, p in quantised.named_parameters() if name.endswith("scale"))
    levels = sum(p.numel() for p in quantised.parameters() if p.dtype == torch.int8)
    rest = parameters - levels
    assert {p.dtype for p in quantised.parameters()} <= set(kept)
    assert levels > 0.96 * parameters
    assert levels + scales + 2 * rest < 17e9


def test_random_weights_are_made_without_a_float_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No float tensor as large as the smallest expert tensor is made, and the model is complete and computes."""
    made: list[int] = []
    random = gpu_step._random

    def watched(leaf: str, *rest: object) -> torch.Tensor:
        value: torch.Tensor = random(leaf, *rest)
        if value.is_floating_point() and "weight" not in leaf:
            made.append(value.numel())
        return value

    monkeypatch.setattr(gpu_step, "_random", watched)
    model = gpu_step.quantised_model(torch.device("cpu"), small=True)
    experts = [p for name, p in model.named_parameters() if "experts.down_proj_qweight" in name]
    assert experts
    assert all(p.dtype == torch.int8 for p in experts)
    assert max(made) < min(p.numel() for p in experts)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    with torch.no_grad():
        logits = model(torch.arange(3, 23).view(2, 10)).logits
    assert logits.dtype == torch.bfloat16
    assert math.isfinite(float(logits.float().norm()))


@pytest.mark.parametrize("variant", gpu_step.VARIANTS)
def test_every_variant_takes_a_step(variant: str) -> None:
    """Private, non-private, PEFT and forward alone, at two layers on CPU."""
    found = gpu_step.measure_one(variant, torch.device("cpu"), small=True, turns=1)
    assert found["variant"] == variant
    assert found["seconds_per_step"] > 0
    assert found["units_per_micro_batch"] == gpu_step.UNITS


@pytest.mark.parametrize("room", [3, 0])
def test_a_private_step_that_runs_out_of_memory_says_so(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The micro-batch that the engine came down to is reported; so is its error when not even one unit fits."""
    whole = DPEngine.forward_backward

    def scarce(self: DPEngine, batch: Packed) -> None:
        if batch.units > room:
            raise torch.OutOfMemoryError
        whole(self, batch)

    monkeypatch.setattr(DPEngine, "forward_backward", scarce)
    found = gpu_step.measure_one("book", torch.device("cpu"), small=True, turns=1)
    if room:
        assert found["units_per_micro_batch"] == 2  # 8, 4, 2
    else:
        assert found["variant"] == "book"
        assert "does not fit into memory" in found["failed"]


def test_a_variant_that_fails_leaves_the_others_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Out of memory or killed, the rest is measured; order turns round; every process's result is kept at once."""
    order: list[str] = []
    kept: list[int] = []
    file = tmp_path / "found.json"

    def child(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        variant = command[command.index("--variant") + 1]
        order.append(variant)
        if file.exists():
            kept.append(len(json.loads(file.read_text(encoding="utf-8"))["models"][0]["variants"]))
        measured = {
            "variant": variant, "tokens_per_s": 1.0, "peak_bytes": 10 * len(order), "units_per_micro_batch": 8,
            "seconds_per_step": 1.0 if variant == "plain" else 1.0 + len(order),
        }  # fmt: skip
        if variant == "forward":
            measured = {"variant": variant, "failed": "OutOfMemoryError: no room"}
        return subprocess.CompletedProcess(command, -9 if variant == "peft" else 0, json.dumps(measured) + "\n")

    monkeypatch.setattr(subprocess, "run", child)
    monkeypatch.setattr(sys, "argv", ["step.py", "--small", "--device", "cpu", "--json", "--out", str(file)])
    assert gpu_step.main() == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads(file.read_text(encoding="utf-8"))
    assert order == [*gpu_step.VARIANTS, *reversed(gpu_step.VARIANTS)]
    assert kept == [1, 2, 3, 4, 4, 4, 4]
    (entry,) = said["models"]
    found = {each["variant"]: each for each in entry["variants"]}
    assert found["book"]["seconds_per_step_of_each_process"] == [2.0, 9.0]
    assert (entry["time_ratio"], entry["memory_ratio"]) == (5.5, round(80 / 60, 3))
    assert entry["time_vs_peft"] is None
    assert found["peft"] == {"variant": "peft", "failed": "the process ended with -9"}
    assert found["forward"] == {"variant": "forward", "failed": "OutOfMemoryError: no room"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the benchmark would run")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No CUDA: exit code 0, no figure, and the reason; the real shape on CPU is refused."""
    monkeypatch.setattr(sys, "argv", ["step.py", "--json"])
    assert gpu_step.main() == 0
    said = json.loads(capsys.readouterr().out)
    assert said["models"] == []
    assert "no CUDA device" in said["skipped"]
    monkeypatch.setattr(sys, "argv", ["step.py", "--device", "cpu"])
    with pytest.raises(SystemExit):
        gpu_step.main()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", gpu_step.VARIANTS)
def test_every_variant_takes_a_step_on_cuda(variant: str) -> None:
    """The same on CUDA, with the fused kernels."""
    found = gpu_step.measure_one(variant, torch.device("cuda"), small=True, turns=1)
    assert found["peak_bytes"] > 0
