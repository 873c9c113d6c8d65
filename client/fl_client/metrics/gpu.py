"""GPU use as NVML reports it, where there is a GPU and the extra `gpu` (nvidia-ml-py); nothing otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


def nvml() -> Any:
    """The library, initialised; None without the package, the driver or a GPU."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


class Gpus(Collector):
    """One set of values for each GPU of this machine, by its index."""

    def __init__(self) -> None:
        """Look for NVML once."""
        self._nvml = nvml()

    def describe(self) -> list[GaugeMetricFamily]:
        """The families without values, in the order of `collect`."""
        return [
            GaugeMetricFamily("concordat_gpu_busy_ratio", "Share of time in which it computed.", labels=["gpu"]),
            GaugeMetricFamily("concordat_gpu_memory_used_bytes", "Memory in use, by all processes.", labels=["gpu"]),
            GaugeMetricFamily("concordat_gpu_memory_bytes", "Memory that it has.", labels=["gpu"]),
        ]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The values of now; a GPU that does not answer has none."""
        busy, used, size = self.describe()
        if self._nvml is not None:
            for index in range(self._nvml.nvmlDeviceGetCount()):
                try:
                    device = self._nvml.nvmlDeviceGetHandleByIndex(index)
                    memory = self._nvml.nvmlDeviceGetMemoryInfo(device)
                    busy.add_metric([str(index)], self._nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100)
                except self._nvml.NVMLError:  # fallen off the bus, or a MIG slice that has no such figure
                    continue
                used.add_metric([str(index)], memory.used)
                size.add_metric([str(index)], memory.total)
        yield from (busy, used, size)
