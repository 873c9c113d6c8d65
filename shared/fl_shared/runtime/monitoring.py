"""`/metrics`, `/healthz` and `/readyz` of one process, for Prometheus, load balancers and service managers.

Plain HTTP without a login, so it belongs on loopback. An address may ask five times a second, and have 16 requests
open. Needs prometheus_client (extras `server` and `client`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, disable_created_metrics, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from fl_shared.errors import ConcordatError, ConfigError
from fl_shared.runtime.limits import ConcurrencyLimit, TokenBucket, network
from fl_shared.runtime.threads import Loop

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

disable_created_metrics()  # type: ignore[no-untyped-call]  # the library leaves it untyped


PER_S, BURST = 5.0, 40.0
MAX_OPEN, MAX_FOR_AN_ADDRESS = 64, 16


class _Silent(WSGIRequestHandler):
    timeout = 10.0  # of a read: who says nothing is not waited for

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""


class MonitoringServer(ThreadingWSGIServer):
    """A thread for each request; closes what is too much before, and answers by itself where there are no threads."""

    loop: Loop

    def __init__(self, *arguments: Any) -> None:
        self._lock = threading.Lock()
        self._rates = TokenBucket(PER_S, BURST)
        self._open = ConcurrencyLimit(MAX_OPEN)
        self._addresses = ConcurrencyLimit(MAX_FOR_AN_ADDRESS)
        super().__init__(*arguments)

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002  # the base class's signature
        """Count one request in; False when it is one too many."""
        address = network(str(client_address[0]))
        with self._lock:
            if not self._open.acquire(""):
                return False
            if not self._addresses.acquire(address):
                self._open.release("")
                return False
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, or here: that there are no more threads is a thing to be told."""
        try:
            super().process_request(request, client_address)
        except RuntimeError:
            self.process_request_thread(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer it, and count it out."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open.release("")
                self._addresses.release(network(str(client_address[0])))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or sent nonsense, is nothing to report."""

    def may_ask(self, address: str) -> bool:
        """Whether one more request of this address may pass now."""
        with self._lock:
            return self._rates.take(network(address))


def serve_monitoring(
    address: tuple[str, int], registry: CollectorRegistry, missing: Callable[[], list[str]]
) -> MonitoringServer:
    """Serve on `address` in a thread and return the server.

    `missing` names what is not ready yet; `/readyz` answers 503 with these lines until it names nothing.

    Raises:
        ConfigError: the address cannot be used.
    """
    metrics = make_wsgi_app(registry)

    def answer(start: StartResponse, status: str, text: str) -> Iterable[bytes]:
        body = text.encode("utf-8")
        start(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
        return [body]

    def app(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if not server.may_ask(environ.get("REMOTE_ADDR", "")):
            return answer(start, "429 Too Many Requests", "too many requests\n")
        if path == "/healthz":
            return answer(start, "200 OK", "ok\n")
        try:
            if path == "/metrics":
                pages: Iterable[bytes] = metrics(environ, start)
                return pages
            if path == "/readyz":
                lacking = missing()
                if not lacking:
                    return answer(start, "200 OK", "ready\n")
                return answer(start, "503 Service Unavailable", "".join(f"not ready: {line}\n" for line in lacking))
        except ConcordatError as error:
            return answer(start, "503 Service Unavailable", f"{error.code}\n")
        return answer(start, "404 Not Found", "there is nothing here\n")

    host, port = address
    try:
        server = make_server(host, port, app, MonitoringServer, _Silent)
    except OSError as error:
        raise ConfigError(
            f"[metrics] listen: {host}:{port} cannot be used ({error.strerror})",
            fix="choose another port, or leave [metrics] out",
        ) from None
    server.loop = Loop("monitoring", server.serve_forever)
    server.loop.start()
    return server
