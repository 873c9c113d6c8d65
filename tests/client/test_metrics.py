"""Prometheus metrics of the agent: the names, the numbers, and what a GPU adds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import generate_latest

from fl_client.metrics import gpu
from fl_client.metrics.site import Metrics
from fl_shared.ledger.records import Position


def shown(metrics: Metrics) -> str:
    """What a scrape of the registry gives."""
    return generate_latest(metrics.registry).decode()


def test_answered_rounds_are_counted_by_outcome_with_their_bytes_and_seconds() -> None:
    """Counters add up; a refusal stands under its code; the histogram holds every round."""
    metrics = Metrics()
    metrics.round("ok", 1.5, 10, 20)
    metrics.round("ok", 0.5, 1, 2)
    metrics.round("policy", 0.0, 0, 0)
    text = shown(metrics)
    assert 'concordat_rounds_total{outcome="ok"} 2.0' in text
    assert 'concordat_rounds_total{outcome="policy"} 1.0' in text
    assert 'concordat_bytes_total{direction="out"} 22.0' in text
    assert "concordat_round_seconds_count 3.0" in text
    assert 'concordat_round_seconds_bucket{le="1.0"} 2.0' in text
    assert "_created" not in text


def test_the_budget_is_asked_for_when_somebody_looks() -> None:
    """Spent, reserved, left and ceiling come from the ledger at each scrape."""
    metrics = Metrics()
    assert "concordat_epsilon{" not in shown(metrics)
    spent = [1.0]
    metrics.state.position = ("d", lambda: Position(spent[0], 0.5, 2.5, 4.0, 1e-5, 0.1, 7, "rdp"))
    metrics.state.helpers = lambda: {"tunnel": True, "supernode": False}
    metrics.state.training = lambda: True
    assert 'concordat_epsilon{dataset="d",part="spent"} 1.0' in shown(metrics)
    spent[0] = 2.0
    text = shown(metrics)
    assert 'concordat_epsilon{dataset="d",part="spent"} 2.0' in text
    assert 'concordat_epsilon{dataset="d",part="left"} 2.5' in text
    assert 'concordat_epsilon{dataset="d",part="ceiling"} 4.0' in text
    assert 'concordat_delta{dataset="d"} 1e-05' in text
    assert 'concordat_helper_up{helper="supernode"} 0.0' in text
    assert "concordat_training 1.0" in text


def test_every_step_is_timed_and_the_callback_still_decides() -> None:
    """Three calls are three observations; what the callback raises goes through."""
    metrics = Metrics()
    seen: list[int] = []
    progress = metrics.timed(lambda step: seen.append(step) if step < 3 else pytest.fail("stop"))
    progress(step=1)
    progress(step=2)
    with pytest.raises(pytest.fail.Exception):
        progress(step=3)
    assert seen == [1, 2]
    assert "concordat_step_seconds_count 3.0" in shown(metrics)


class Nvml:
    """Two GPUs as NVML describes them, the second fallen off the bus."""

    class NVMLError(Exception):
        """As the library's."""

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == 1:
            raise self.NVMLError
        return index

    def nvmlDeviceGetMemoryInfo(self, _device: int) -> Any:
        return SimpleNamespace(used=3 << 30, total=80 << 30)

    def nvmlDeviceGetUtilizationRates(self, _device: int) -> Any:
        return SimpleNamespace(gpu=75)


def test_each_gpu_that_answers_has_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and busy share by index; a GPU that does not answer is left out, the others stay."""
    monkeypatch.setattr(gpu, "nvml", Nvml)
    text = shown(Metrics())
    assert 'concordat_gpu_busy_ratio{gpu="0"} 0.75' in text
    assert 'concordat_gpu_memory_used_bytes{gpu="0"} 3.221225472e+09' in text
    assert 'gpu="1"' not in text


@pytest.mark.gpu
@pytest.mark.skipif(gpu.nvml() is None, reason="no NVML: no NVIDIA driver on this machine")
def test_the_real_nvml_shows_this_machines_gpus() -> None:
    """With a driver, the first GPU has memory."""
    assert 'concordat_gpu_memory_bytes{gpu="0"}' in shown(Metrics())
