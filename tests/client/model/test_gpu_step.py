"""The GPU benchmark's way of making a model of the real shape, as far as it can be walked without a GPU."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from fl_client.model.load import with_quantised_layers
from helpers.benchmarks import load_benchmark

gpu_step = load_benchmark("gpu_step")


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
        value = random(leaf, *rest)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the benchmark would run")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No CUDA: exit code 0, no figure, and the reason; the real shape on CPU is refused."""
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", "--json"])
    assert gpu_step.main() == 0
    said = json.loads(capsys.readouterr().out)
    assert said["models"] == []
    assert "no CUDA device" in said["skipped"]
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", "--device", "cpu"])
    with pytest.raises(SystemExit):
        gpu_step.main()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", gpu_step.VARIANTS)
def test_every_variant_takes_a_step_on_cuda(variant: str) -> None:
    """The same on CUDA, with the fused kernels."""
    found = gpu_step.measure_one(variant, torch.device("cuda"), small=True, turns=1)
    assert found["peak_bytes"] > 0
