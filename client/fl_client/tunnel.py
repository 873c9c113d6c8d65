"""The site's tunnel: ends the SuperNode's TLS on loopback and goes on with mutual TLS 1.3.

Flower's SuperNode can present no client certificate, and the key of the site's certificate must not
be in its reach. So it talks to this process, which belongs to the trusted half, forwards nothing but
the Fleet calls named in `FLEET_CALLS`, and holds the shipped app against the site's allow-list when
it passes by (`get-fab`). Outbound connections honour `HTTPS_PROXY`.

Run as `python -m fl_client.tunnel` with one JSON line on standard input (`TunnelSettings`) and the
listening socket inherited as a file descriptor; it ends when standard input does.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import ipaddress
import json
import logging
import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fl_client.config import ANY_APP
from fl_client.enrolment import verified_context
from fl_client.files import write_durably
from fl_client.sandbox import die_with_parent, forbid_inspection

log = logging.getLogger("fl_client.tunnel")

FLEET_CALLS = frozenset(
    {
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "pull-object",
        "push-object",
        "confirm-message-received",
        "get-run",
        "get-fab",
    }
)
MAX_APP_BYTES = 16 << 20
READY = "tunnel ready"

_HOP_HEADERS = frozenset(
    {
        "host",
        "connection",
        "keep-alive",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


@dataclass(frozen=True)
class TunnelSettings:
    """What the tunnel process needs; sent to it on standard input, never in arguments."""

    listen_fd: int
    fleet_url: str
    ca: str
    certificate: str
    key: str
    local_certificate: str
    local_key: str
    apps: list[str]

    def to_line(self) -> bytes:
        """Return the JSON line that `python -m fl_client.tunnel` reads."""
        return json.dumps(asdict(self)).encode("utf-8") + b"\n"


def make_local_certificate(certificate: Path, key: Path) -> None:
    """Write a fresh self-signed certificate for 127.0.0.1, valid a year, and its key (0600)."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "concordat site tunnel")])
    now = dt.datetime.now(dt.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=365))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(private, hashes.SHA256())
    )
    write_durably(
        key,
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )
    write_durably(certificate, built.public_bytes(serialization.Encoding.PEM), mode=0o644)


def app_digest(answer: bytes) -> str:
    """Return `sha256:<hex>` of the app inside a serialised `GetFabResponse`.

    Raises ValueError when the bytes are no such message. The digest is computed here; the hash that
    the coordinator states in the message is not believed.
    """
    from flwr.proto.fab_pb2 import GetFabResponse
    from google.protobuf.message import DecodeError

    try:
        content = GetFabResponse.FromString(answer).fab.content
    except DecodeError as error:
        raise ValueError("the app that the coordinator sent cannot be read") from error
    return "sha256:" + hashlib.sha256(content).hexdigest()


def build_app(fleet_url: str, context: ssl.SSLContext, apps: list[str]) -> Starlette:
    """Return the ASGI app that forwards Fleet calls to `fleet_url` over `context`.

    `apps` is the allow-list of app digests, or `["any"]`.
    """
    client = httpx.AsyncClient(
        verify=context,
        timeout=httpx.Timeout(300.0, connect=15.0),
        limits=httpx.Limits(max_connections=32, max_keepalive_connections=8),
        follow_redirects=False,
    )

    async def forward(request: Request) -> Response:
        call = request.path_params["call"]
        if call not in FLEET_CALLS:
            log.warning("refused to forward %r: not a Fleet call of a site", call[:80])
            return PlainTextResponse("not forwarded: this is not a Fleet call of a site", status_code=404)
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _HOP_HEADERS]
        if call == "get-fab":
            headers = [(k, v) for k, v in headers if k.lower() != "accept-encoding"]
            headers.append(("accept-encoding", "identity"))
        outgoing = client.build_request("POST", f"{fleet_url}/{call}", headers=headers, content=request.stream())
        try:
            answer = await client.send(outgoing, stream=True)
        except httpx.HTTPError as error:
            log.warning("the coordinator cannot be reached: %s", error or type(error).__name__)
            return PlainTextResponse("the coordinator cannot be reached", status_code=503)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_HEADERS}
        if call == "get-fab" and answer.status_code == 200:
            return await _checked_app(answer, kept, apps)
        return StreamingResponse(_relay(answer), status_code=answer.status_code, headers=kept)

    return Starlette(routes=[Route("/v1/fleet/{call}", forward, methods=["POST"])])


async def _relay(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for block in answer.aiter_raw():
            yield block
    finally:
        await answer.aclose()


async def _checked_app(answer: httpx.Response, headers: dict[str, str], apps: list[str]) -> Response:
    """Pass the shipped app on only when the site's policy allows its digest."""
    body = bytearray()
    try:
        async for block in answer.aiter_raw():
            body += block
            if len(body) > MAX_APP_BYTES:
                log.warning("refused the coordinator's app: larger than %d bytes", MAX_APP_BYTES)
                return PlainTextResponse("app refused by the site: too large", status_code=403)
    except httpx.HTTPError as error:
        log.warning("the app did not arrive whole: %s", error or type(error).__name__)
        return PlainTextResponse("the coordinator cannot be reached", status_code=503)
    finally:
        await answer.aclose()
    try:
        digest = app_digest(bytes(body))
    except ValueError as error:
        log.warning("refused the coordinator's app: %s", error)
        return PlainTextResponse("app refused by the site: unreadable", status_code=403)
    if apps != [ANY_APP] and digest not in apps:
        log.warning("refused the coordinator's app %s: not in the site's [policy] apps", digest)
        return PlainTextResponse(f"app {digest} refused by the site's policy", status_code=403)
    log.info("passed the coordinator's app %s", digest)
    return Response(bytes(body), status_code=200, headers=headers)


async def _serve(settings: TunnelSettings) -> None:
    context = verified_context(Path(settings.ca).read_text("ascii"), Path(settings.certificate), Path(settings.key))
    config = uvicorn.Config(
        build_app(settings.fleet_url, context, settings.apps),
        ssl_certfile=settings.local_certificate,
        ssl_keyfile=settings.local_key,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=3,
        limit_concurrency=64,
    )
    server = uvicorn.Server(config)
    loop = asyncio.get_running_loop()

    def keeper_gone() -> None:
        if not os.read(0, 1):
            loop.remove_reader(0)
            server.should_exit = True

    loop.add_reader(0, keeper_gone)
    listener = socket.socket(fileno=settings.listen_fd)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.02)
    print(READY, flush=True)
    await serving


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
