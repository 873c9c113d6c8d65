"""Prometheus metrics of a site's agent, on a loopback port that `[metrics] listen` names.

Text format 0.0.4 (prometheus.io/docs/instrumenting/exposition_formats). For the site's own operators: the
duration of a round may depend on the data, so nothing here is offered to the coordinator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fl_shared.errors import ConcordatError, ConfigError

_HELP = {
    "concordat_rounds_total": "Rounds answered, by outcome (ok, failed, or a refusal's code).",
    "concordat_round_seconds_total": "Seconds spent on answered rounds.",
    "concordat_bytes_total": "Adapter bytes received and released.",
    "concordat_training": "1 while a round is being trained.",
    "concordat_epsilon": "The data set's budget: spent, reserved, left, ceiling.",
    "concordat_delta": "The delta at which epsilon is stated.",
}


class Metrics:
    """Counters of the agent; gauges are asked for when somebody looks."""

    def __init__(self) -> None:
        """Start with nothing counted."""
        self._lock = threading.Lock()
        self._counters: dict[tuple[str, str], float] = {}
        self.gauges: Callable[[], dict[tuple[str, str], float]] = dict

    def count(self, name: str, labels: str = "", amount: float = 1.0) -> None:
        """Add to a counter; `labels` is written as `key="value"`."""
        with self._lock:
            self._counters[name, labels] = self._counters.get((name, labels), 0.0) + amount

    def round(self, outcome: str, seconds: float, received: int, released: int) -> None:
        """Count one answered round."""
        self.count("concordat_rounds_total", f'outcome="{outcome}"')
        self.count("concordat_round_seconds_total", amount=seconds)
        self.count("concordat_bytes_total", 'direction="in"', received)
        self.count("concordat_bytes_total", 'direction="out"', released)

    def render(self) -> str:
        """Return everything in Prometheus' text format."""
        with self._lock:
            found = dict(self._counters)
        found.update(self.gauges())
        lines: list[str] = []
        last = ""
        for (name, labels), value in sorted(found.items()):
            if name != last:
                kind = "counter" if name.endswith("_total") else "gauge"
                lines += [f"# HELP {name} {_HELP.get(name, name)}", f"# TYPE {name} {kind}"]
                last = name
            lines.append(f"{name}{{{labels}}} {value:.17g}" if labels else f"{name} {value:.17g}")
        return "\n".join(lines) + "\n"


def serve_metrics(metrics: Metrics, address: tuple[str, int]) -> ThreadingHTTPServer:
    """Serve `/metrics` and `/healthz` on `address` and return the server; ConfigError when it is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = 200, "ok\n"
            if self.path == "/metrics":
                try:
                    body = metrics.render()
                except ConcordatError:
                    status, body = 503, "the ledger cannot be read\n"
            elif self.path != "/healthz":
                status, body = 404, "there is nothing here\n"
            data = body.encode("utf-8")
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Requests are not logged."""

    try:
        server = ThreadingHTTPServer(address, Handler)
    except OSError as error:
        raise ConfigError(
            f"[metrics] listen: {address[0]}:{address[1]} cannot be used ({error.strerror})",
            fix="choose another port, or leave [metrics] out",
        ) from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
