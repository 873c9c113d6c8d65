"""The site's tunnel: ends the SuperNode's TLS on loopback and goes on with mutual TLS 1.3.

Flower's SuperNode can present no client certificate, and the key of the site's certificate must not
be in its reach. So it talks to this process, which belongs to the trusted half, forwards nothing but
the Fleet calls named in `FLEET_CALLS`, and holds the shipped app against the site's allow-list when
it passes by (`get-fab`). What was hashed is what is delivered: answers come without any content coding,
a new message is made around the hashed bytes, and neither redirects nor foreign headers reach the
SuperNode, which would follow them. Outbound connections honour `HTTPS_PROXY`, but not to this machine itself.

Run as `python -m fl_client.node.tunnel` with one JSON line on standard input (`tunnel_settings`) and the
listening socket inherited as a file descriptor; it ends when standard input does.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fl_client.identity.gateway import verified_context
from fl_client.node.admission import admit
from fl_client.node.fleet import FLEET_CALLS, PendingReplies, activated_node, deactivation, sole_app
from fl_client.node.sandbox import forbid_inspection
from fl_client.node.tunnel_settings import NODE_LEFT, READY, TunnelSettings
from fl_client.site.config import ANY_APP
from fl_shared.files import write_durably
from fl_shared.runtime.processes import die_with_parent
from fl_shared.wire.hosts import by_proxy

log = logging.getLogger("fl_client.node.tunnel")

MAX_APP_BYTES = 16 << 20
MAX_CONNECTIONS = 64
HANDSHAKE_S = 10.0
OFF_LINE_S = 6.0
TIMEOUT_S = 300.0
_REPLY_CALLS = ("confirm-message-received", "push-messages")
_HANDLED = ("get-fab", "activate-node", *_REPLY_CALLS)
_MAX_SMALL_BYTES = 1 << 20

_HOP_HEADERS = frozenset(
    {
        "host",
        "connection",
        "keep-alive",
        "proxy-authorization",
        "proxy-connection",
        "accept-encoding",
        "content-encoding",
        "expect",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_KEPT_HEADERS = ("content-type", "content-length", "retry-after")


class Credentials:
    """The site's certificate and key as they lie on disk; a renewal replaces them while the tunnel runs."""

    def __init__(self, ca: Path, certificate: Path, key: Path) -> None:
        """Take the three files; they are read by `context`."""
        self._ca = ca
        self._pair = (certificate, key)

    def stamp(self) -> tuple[int, ...]:
        """Another value after each replacement; OSError in the moment of an exchange."""
        return tuple(number for path in self._pair for number in (path.stat().st_ino, path.stat().st_mtime_ns))

    def context(self) -> ssl.SSLContext:
        """A TLS context with what lies there now; OSError when certificate and key do not fit just now."""
        return verified_context(self._ca.read_text("ascii"), *self._pair)


class Tunnel:
    """Forwards Fleet calls to `fleet_url` with `credentials`.

    `apps` is the allow-list of app digests, or `["any"]`. `node_file` remembers the node's id, so that a
    SuperNode that was killed can come back at once: the SuperLink holds a silent node on line for a minute
    and would refuse it until then.

    A renewed certificate is used from the next call on; calls under way end on the connections that they have.
    """

    def __init__(self, fleet_url: str, credentials: Credentials, apps: list[str], node_file: Path) -> None:
        """Prepare the outgoing connections; nothing is opened yet. OSError when the credentials cannot be used."""
        self._url = fleet_url
        self._credentials = credentials
        self._stamp = credentials.stamp()
        self._apps = apps
        self._node_file = node_file
        self._complained = 0.0
        self._pending = PendingReplies()
        self._client = self._outgoing(credentials.context())

    def _outgoing(self, context: ssl.SSLContext) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            verify=context,
            trust_env=by_proxy(self._url),
            timeout=httpx.Timeout(TIMEOUT_S, connect=15.0),
            limits=httpx.Limits(max_connections=32, max_keepalive_connections=8),
            follow_redirects=False,
        )

    def _now(self) -> httpx.AsyncClient:
        """The outgoing connections with the certificate of the moment."""
        try:
            stamp = self._credentials.stamp()
            if stamp == self._stamp:
                return self._client
            context = self._credentials.context()
        except OSError:
            return self._client  # the two files are being exchanged; the next call looks again
        former, self._client, self._stamp = self._client, self._outgoing(context), stamp
        log.info("activated the renewed certificate")
        loop = asyncio.get_running_loop()
        loop.call_later(TIMEOUT_S + 30.0, lambda: loop.create_task(former.aclose()))
        return self._client

    def app(self) -> Starlette:
        """Return the ASGI application."""
        app = Starlette(routes=[Route("/v1/fleet/{call}", self.forward, methods=["POST"])])
        app.router.redirect_slashes = False
        return app

    async def forward(self, request: Request) -> Response:
        """Pass one Fleet call on; anything else is a 404 that never leaves the site."""
        call = request.path_params["call"]
        if call not in FLEET_CALLS:
            log.warning("refused to forward %r: not a Fleet call of a site", call[:80])
            return PlainTextResponse("not forwarded: this is not a Fleet call of a site", status_code=404)
        if call == "deactivate-node" or (call == "pull-messages" and self._pending.called_in()):
            print(NODE_LEFT, flush=True)  # to the keeper, see `fl_client.node.helpers`
        dropped = {*_HOP_HEADERS, *(word.strip() for word in request.headers.get("connection", "").lower().split(","))}
        if "transfer-encoding" in request.headers:
            dropped.add("content-length")  # the body's length is what was received, not what was announced beside it
        headers = [(k, v) for k, v in request.headers.items() if k not in dropped]
        headers.append(("accept-encoding", "identity"))
        try:
            if call in _HANDLED:
                return await self._handled(call, [(k, v) for k, v in headers if k != "content-length"], request)
            answer = await self._send(call, headers, request.stream())
        except httpx.HTTPError as error:
            self._complain(f"the coordinator cannot be reached: {error or type(error).__name__}")
            return PlainTextResponse("the coordinator cannot be reached", status_code=503)
        refused = await self._refused(call, answer)
        if refused is not None:
            return refused
        return StreamingResponse(_relay(answer), status_code=answer.status_code, headers=_kept(answer))

    async def _send(
        self, call: str, headers: list[tuple[str, str]], content: bytes | AsyncIterator[bytes]
    ) -> httpx.Response:
        client = self._now()
        request = client.build_request("POST", f"{self._url}/{call}", headers=headers, content=content)
        return await client.send(request, stream=True)

    async def _refused(self, call: str, answer: httpx.Response) -> Response | None:
        """The answer to give instead of one that means something else to its reader than to this process.

        Flower's SuperNode follows redirects, takes any status of 2xx for success and undoes content codings.
        """
        coded = {word.strip() for word in answer.headers.get("content-encoding", "").lower().split(",")} - {"identity"}
        if answer.status_code in (401, 403):
            self._complain(f"the coordinator refuses this site's calls (status {answer.status_code})")
        if (answer.status_code == 200 or answer.status_code >= 400) and coded <= {""}:
            return None
        await answer.aclose()
        why = f"status {answer.status_code}" if answer.status_code != 200 else "a content coding"
        log.warning("refused an answer of the coordinator to %s: it has %s", call, why)
        return PlainTextResponse(f"refused by the site: the answer has {why}", status_code=502)

    async def _handled(self, call: str, headers: list[tuple[str, str]], request: Request) -> Response:
        """Calls whose answer the tunnel reads: the shipped app, and the node's id."""
        body = bytearray()
        async for block in request.stream():
            body += block
            if len(body) > _MAX_SMALL_BYTES:
                return PlainTextResponse("the request is too large", status_code=413)
        if call == "activate-node":
            await self._deactivate_left_over(headers)
        answer = await self._send(call, headers, bytes(body))
        if call in _REPLY_CALLS:
            self._pending.note(call, bytes(body), answer.status_code)
        refused = await self._refused(call, answer)
        if refused is not None:
            return refused
        content = await _whole(answer, MAX_APP_BYTES)
        if content is None:
            log.warning("refused an answer of the coordinator to %s: larger than %d bytes", call, MAX_APP_BYTES)
            return PlainTextResponse("refused by the site: too large", status_code=403)
        kind = {k: v for k, v in _kept(answer).items() if k != "content-length"}
        if answer.status_code == 200:
            try:
                content = self._inspected(call, content)
            except ValueError as error:
                log.warning("refused by the site: %s", error)
                return PlainTextResponse(f"refused by the site: {error}", status_code=403)
        return Response(content, status_code=answer.status_code, headers=kind)

    def _inspected(self, call: str, answer: bytes) -> bytes:
        """Return what is passed on in place of an answer; ValueError says why nothing is."""
        if call in _REPLY_CALLS:
            return answer
        if call == "activate-node":
            write_durably(self._node_file, str(activated_node(answer)).encode("ascii"))
            self._pending.called_in()
            return answer
        digest, delivered = sole_app(answer)
        if self._apps != [ANY_APP] and digest not in self._apps:
            raise ValueError(f"app {digest} is not in [policy] apps")
        log.info("passed the coordinator's app %s", digest)
        return delivered

    async def _deactivate_left_over(self, headers: list[tuple[str, str]]) -> None:
        """Take the node of a killed SuperNode off line, with the signature that its successor just made."""
        try:
            node = int(self._node_file.read_text("ascii"))
        except (OSError, ValueError):
            return
        answer = await self._send("deactivate-node", headers, deactivation(node))
        await _whole(answer, _MAX_SMALL_BYTES)
        if answer.status_code == 200:
            # The order that died with the old SuperNode is sent again only if the coordinator, which looks
            # every second or so, sees the node gone.
            log.info("deactivated the former SuperNode; its successor follows in %.0f s", OFF_LINE_S)
            await asyncio.sleep(OFF_LINE_S)

    def _complain(self, message: str) -> None:
        """Log a condition that lasts at most once a minute."""
        if time.monotonic() - self._complained > 60.0 or self._complained == 0.0:
            self._complained = time.monotonic()
            log.warning("%s", message)


def _kept(answer: httpx.Response) -> dict[str, str]:
    return {k: answer.headers[k] for k in _KEPT_HEADERS if k in answer.headers}


async def _relay(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for block in answer.aiter_raw():
            yield block
    finally:
        await answer.aclose()


async def _whole(answer: httpx.Response, limit: int) -> bytes | None:
    """Return the body of an answer, None when it is larger than `limit`."""
    body = bytearray()
    async for block in _relay(answer):
        body += block
        if len(body) > limit:
            return None
    return bytes(body)


class _Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol, which takes 64 KiB of a request's head and no more, and says when it is over."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config, state, {})
        self.over = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.over.set()


async def _serve(settings: TunnelSettings) -> None:
    credentials = Credentials(Path(settings.ca), Path(settings.certificate), Path(settings.key))
    config = uvicorn.Config(
        Tunnel(settings.fleet_url, credentials, settings.apps, Path(settings.node_file)).app(),
        ssl_certfile=settings.local_certificate,
        ssl_keyfile=settings.local_key,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=3,
        http="h11",
    )
    server = uvicorn.Server(config)
    loop = asyncio.get_running_loop()

    def keeper_gone() -> None:
        if not os.read(0, 1):
            loop.remove_reader(0)
            server.should_exit = True

    loop.add_reader(0, keeper_gone)
    listener = socket.socket(fileno=settings.listen_fd)
    serving = asyncio.create_task(server.serve(sockets=[]))  # the connections are made here, so many and no more
    while not (server.started or serving.done()):
        await asyncio.sleep(0.02)

    async def connect(arrived: socket.socket) -> None:
        protocol = functools.partial(_Connection, config, server.server_state)
        _, connection = await loop.connect_accepted_socket(
            protocol, arrived, ssl=config.ssl, ssl_handshake_timeout=HANDSHAKE_S, ssl_shutdown_timeout=HANDSHAKE_S
        )
        await connection.over.wait()

    admitting = asyncio.create_task(admit(listener, MAX_CONNECTIONS, connect))
    admitting.add_done_callback(lambda _: setattr(server, "should_exit", True))  # a shut door is no tunnel
    print(READY, flush=True)
    try:
        await serving
    finally:
        admitting.cancel()


def main() -> int:
    """Run the tunnel until standard input ends."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    die_with_parent()
    forbid_inspection()
    line = bytearray()
    while not line.endswith(b"\n"):
        block = os.read(0, 1)
        if not block:
            return 1
        line += block
    asyncio.run(_serve(TunnelSettings(**json.loads(line))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
