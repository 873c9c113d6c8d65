"""Prometheus metrics of the agent: the format, the numbers, and who may listen."""

from __future__ import annotations

import re

import httpx
import pytest

from fl_client.metrics import Metrics, serve_metrics
from fl_client.supernode import free_port
from fl_shared.errors import ConfigError, LedgerError

LINE = re.compile(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? -?[0-9.e+-]+')


def test_rounds_and_gauges_are_rendered_in_prometheus_text() -> None:
    """Each name has one HELP and TYPE line; counters add up; gauges are read when asked."""
    metrics = Metrics()
    metrics.round("ok", 1.5, 10, 20)
    metrics.round("ok", 0.5, 1, 2)
    metrics.round("policy", 0.0, 0, 0)
    metrics.gauges = lambda: {("concordat_epsilon", 'dataset="d",part="left"'): 0.1}
    text = metrics.render()
    for line in text.splitlines():
        assert line.startswith("# ") or LINE.fullmatch(line), line
    assert 'concordat_rounds_total{outcome="ok"} 2' in text
    assert 'concordat_rounds_total{outcome="policy"} 1' in text
    assert 'concordat_bytes_total{direction="out"} 22' in text
    assert 'concordat_epsilon{dataset="d",part="left"} 0.1' in text.replace("0.10000000000000001", "0.1")
    assert text.count("# TYPE concordat_rounds_total counter") == 1


def test_the_server_answers_metrics_and_health_and_nothing_else() -> None:
    """A ledger that cannot be read is a 503, not a crash; a taken port names the field."""
    metrics = Metrics()
    address = ("127.0.0.1", free_port())
    server = serve_metrics(metrics, address)
    url = f"http://127.0.0.1:{address[1]}"
    assert httpx.get(f"{url}/healthz").text == "ok\n"
    assert httpx.get(f"{url}/metrics").status_code == 200
    assert httpx.get(f"{url}/other").status_code == 404

    def broken() -> dict[tuple[str, str], float]:
        raise LedgerError("gone")

    metrics.gauges = broken
    assert httpx.get(f"{url}/metrics").status_code == 503
    with pytest.raises(ConfigError, match="listen"):
        serve_metrics(metrics, address)
    server.shutdown()
    server.server_close()
