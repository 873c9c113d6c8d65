"""The monitoring port: metrics, health, readiness, and nothing else."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fl_shared.errors import ConfigError, LedgerError
from fl_shared.runtime.monitoring import BURST, MAX_FOR_AN_ADDRESS, serve_monitoring
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


@pytest.fixture
def port() -> Iterator[int]:
    """A monitoring port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address: tuple[str, int] = probe.getsockname()
    server = serve_monitoring(("0.0.0.0", address[1]), CollectorRegistry(), list)  # to be asked from many addresses
    yield address[1]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/nothing"])
def test_every_path_is_limited_by_address(port: int, path: str) -> None:
    """A flood is answered with 429, also for what is not there; another address is served."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.4.1"), trust_env=False) as client:
        found = {client.get(f"http://127.0.0.1:{port}{path}").status_code for _ in range(int(BURST) + 40)}
    assert found == {429, 404 if path == "/nothing" else 200}
    assert httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200


def test_silent_connections_use_up_their_own_places(port: int) -> None:
    """Those too many are closed without a thread; another address is served; the places come free with the end."""
    before = threading.active_count()
    held = [
        socket.create_connection(("127.0.0.1", port), timeout=30, source_address=("127.0.4.2", 0)) for _ in range(50)
    ]
    closed = [each for each in held[MAX_FOR_AN_ADDRESS:] if each.recv(1) == b""]
    assert len(closed) == 50 - MAX_FOR_AN_ADDRESS
    assert threading.active_count() <= before + MAX_FOR_AN_ADDRESS
    assert httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200
    for each in held:
        each.close()
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.4.2"), trust_env=False) as client:
        for _ in range(100):  # until the server has noticed
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"http://127.0.0.1:{port}/healthz").status_code == 200:
                    return
            time.sleep(0.1)
    raise AssertionError("the address is not served again")


class Broken(Collector):
    """Figures that cannot be had."""

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        raise LedgerError("gone")
