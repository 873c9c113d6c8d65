"""The monitoring port: metrics, health, readiness, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fl_shared.errors import ConfigError, LedgerError
from fl_shared.monitoring import serve_monitoring
from helpers.ports import free_port


def test_it_answers_metrics_health_and_readiness_and_nothing_else() -> None:
    """Readiness names what is missing; a ledger that cannot be read is a 503; a taken port names the field."""
    address = ("127.0.0.1", free_port())
    registry, lacking = CollectorRegistry(), ["the model loads"]
    Gauge("some_figure", "A figure.", registry=registry).set(7)
    server = serve_monitoring(address, registry, lambda: lacking)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{address[1]}", trust_env=False) as client:
            assert client.get("/healthz").text == "ok\n"
            early = client.get("/readyz")
            assert (early.status_code, early.text) == (503, "not ready: the model loads\n")
            lacking.clear()
            assert client.get("/readyz").status_code == 200
            metrics = client.get("/metrics")
            assert metrics.headers["content-type"].startswith("text/plain; version=")
            assert "some_figure 7.0" in metrics.text
            assert client.get("/other").status_code == 404
            registry.register(Broken())
            assert client.get("/metrics").status_code == 503
            assert client.get("/healthz").status_code == 200
        with pytest.raises(ConfigError, match="listen"):
            serve_monitoring(address, registry, list)
    finally:
        server.shutdown()
        server.server_close()


class Broken(Collector):
    """Figures that cannot be had."""

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        raise LedgerError("gone")
