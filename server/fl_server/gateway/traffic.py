"""Counts what passes the gateway: requests by call and status, bytes by direction.

The gateway writes the counts where the monitor reads them (prometheus_client's multi-process files in
`PROMETHEUS_MULTIPROC_DIR`, which the supervisor sets when metrics are served); a gateway that is started again goes
on counting beside the files of its predecessor.
"""

from __future__ import annotations

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fl_server.gateway import fleet

REQUESTS = Counter("concordat_gateway_requests", "Requests to the gateway, by call and status.", ["call", "status"])
BYTES = Counter("concordat_gateway_bytes", "Bytes of bodies through the gateway.", ["direction"])
_CALLS = frozenset({"healthz", "ca", "enroll", "hello", "renew", "base", "questions", "answers"}) | fleet.CALLS


class Counted:
    """Passes everything on and counts it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. Only calls that exist become labels, so that nobody fills the memory with others."""
        last = str(scope.get("path", "")).rpartition("/")[2]
        call = last if last in _CALLS else "other"
        incoming, outgoing = BYTES.labels("in"), BYTES.labels("out")

        async def received() -> Message:
            message = await receive()
            incoming.inc(len(message.get("body", b"")))
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                REQUESTS.labels(call, str(message["status"])).inc()
            outgoing.inc(len(message.get("body", b"")))
            await send(message)

        await self._app(scope, received, sent)
