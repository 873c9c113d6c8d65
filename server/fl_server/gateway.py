"""The one open port: TLS 1.3, Flower's Fleet paths for enrolled sites, enrolment for holders of a token.

A client certificate is optional in the handshake, because a site that enrols has none yet; `/v1/fleet/*`
and `/v1/hello` demand one that is valid, of role `site` and unrevoked, on every request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import ssl
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from fl_server.db.models import SiteRow
from fl_server.db.store import Store
from fl_server.flower import Flower
from fl_server.home import ServerHome, ServerSettings
from fl_server.pki import Authority, identity
from fl_server.sites.service import Sites
from fl_shared.errors import ConcordatError, EnrolmentError, TransportError
from fl_shared.names import site_id
from fl_shared.signing import SigningKey

log = logging.getLogger("fl_server.gateway")

FLEET_PATH = "/v1/fleet"
FLEET_CALLS = frozenset(
    {
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages",
        "pull-object", "push-object", "confirm-message-received", "get-run", "get-fab",
    }
)  # fmt: skip
MAX_ENROL_BYTES = 64 << 10
MAX_PER_SITE = 16
SEEN_EVERY_S = 10.0
_HOP_HEADERS = frozenset(
    {"host", "connection", "keep-alive", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"}
)


class PeerCertificateProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol that puts the verified client certificate (DER) into the scope's state."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        der = tls.getpeercert(True) if tls is not None else None
        # One copy for each connection: the state that uvicorn hands over is shared by all of them.
        self.app_state = {**self.app_state, "peer_certificate": der}


def _refusal(error: ConcordatError, status: int) -> JSONResponse:
    return JSONResponse({"error": error.message, "code": error.code, "fix": error.fix}, status_code=status)


def _not_found() -> JSONResponse:
    return JSONResponse({"error": "there is nothing here", "code": "not-found", "fix": ""}, status_code=404)


class TooLarge(Exception):
    """The body passed its limit while it was streamed."""


async def _limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    seen = 0
    async for block in request.stream():
        seen += len(block)
        if seen > limit:
            raise TooLarge
        yield block


class Gateway:
    """The routes and what they need."""

    def __init__(self, home: ServerHome, settings: ServerSettings, client: httpx.AsyncClient) -> None:
        self._home = home
        self._settings = settings
        self._client = client
        self._authority = Authority.load(home.ca_key, home.ca)
        self._key = SigningKey.load(home.signing_key).public_hex
        self._sites = Sites(Store(home.database_url()))
        self._flower = Flower(home)
        self._enrolling = asyncio.Lock()
        self._busy: dict[str, int] = {}
        self._seen: dict[str, float] = {}

    def app(self) -> Starlette:
        """The application."""
        return Starlette(
            routes=[
                Route("/healthz", self.healthz, methods=["GET"]),
                Route("/v1/ca", self.ca, methods=["GET"]),
                Route("/v1/enroll", self.enroll, methods=["POST"]),
                Route("/v1/hello", self.hello, methods=["GET"]),
                Route(FLEET_PATH + "/{call}", self.fleet, methods=["POST"]),
            ],
            exception_handlers={404: self._lost, 405: self._lost},
        )

    @staticmethod
    async def _lost(_request: Request, _error: Exception) -> Response:
        return _not_found()

    async def healthz(self, _request: Request) -> Response:
        """The gateway lives."""
        return PlainTextResponse("ok\n")

    async def ca(self, _request: Request) -> Response:
        """The CA certificate; whoever fetches it compares its hash with the token's."""
        return PlainTextResponse(self._authority.pem, media_type="application/x-pem-file")

    async def enroll(self, request: Request) -> Response:
        """Certify a site that proves a token and its keys."""
        try:
            raw = b"".join([block async for block in _limited(request, MAX_ENROL_BYTES)])
            body = json.loads(raw)
            site, token = site_id(body["site"]), str(body["token"])
            csr, signing, node = (
                str(body[name]) for name in ("csr_pem", "signing_public_key", "node_public_key")
            )
        except TooLarge:
            return _refusal(EnrolmentError("the request is too large", code="too-large"), 413)
        except ConcordatError as error:
            return _refusal(error, 400)
        except (ValueError, KeyError, TypeError, RecursionError):
            return _refusal(
                EnrolmentError("the request is not of the agreed form", fix="enrol with `fl-client enroll`"), 400
            )
        try:
            async with self._enrolling:
                enrolled = await asyncio.to_thread(
                    self._sites.enrol, site=site, token=token, csr_pem=csr, signing_key=signing, node_key=node,
                    authority=self._authority, flower=self._flower, days=self._settings.certificate_days,
                )  # fmt: skip
        except EnrolmentError as error:
            log.warning("refused to enrol %s: %s", site, error.code)
            return _refusal(error, 403)
        except TransportError as error:
            log.error("cannot enrol %s: %s", site, error.message)
            return _refusal(
                TransportError("the coordinator cannot enrol just now", fix="try again in a minute"), 503
            )
        log.info("enrolled %s", site)
        return JSONResponse(
            {
                "certificate_pem": enrolled.certificate_pem,
                "ca_pem": self._authority.pem,
                "coordinator_key": self._key,
                "fleet_path": FLEET_PATH,
            }
        )

    async def _site(self, request: Request) -> SiteRow:
        der = getattr(request.state, "peer_certificate", None)
        if not der:
            raise EnrolmentError(
                "a client certificate is needed here", fix="enrol with `fl-client enroll`", code="no-certificate"
            )
        row = await asyncio.to_thread(self._sites.authorise, identity(der))
        now = time.monotonic()
        if now - self._seen.get(row.site, 0.0) > SEEN_EVERY_S:
            self._seen[row.site] = now
            await asyncio.to_thread(self._sites.seen, row.site)
        return row

    async def hello(self, request: Request) -> Response:
        """Who the caller is, for `fl-client check`."""
        try:
            row = await self._site(request)
        except EnrolmentError as error:
            return _refusal(error, 403)
        return JSONResponse({"site": row.site, "coordinator_key": self._key, "time": time.time()})

    async def fleet(self, request: Request) -> Response:
        """Pass one Fleet call of an enrolled site on to the SuperLink."""
        call = str(request.path_params["call"])
        try:
            row = await self._site(request)
        except EnrolmentError as error:
            return _refusal(error, 403)
        if call not in FLEET_CALLS:
            return _not_found()
        if self._busy.get(row.site, 0) >= MAX_PER_SITE:
            return _refusal(TransportError("too many requests at once", fix="wait", code="too-many"), 429)
        self._busy[row.site] = self._busy.get(row.site, 0) + 1
        try:
            return await self._forward(request, call)
        finally:
            self._busy[row.site] -= 1

    async def _forward(self, request: Request, call: str) -> Response:
        limit = self._settings.max_message_bytes
        if int(request.headers.get("content-length", "0")) > limit:
            return _refusal(TransportError("the message is too large", code="too-large"), 413)
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _HOP_HEADERS]
        try:
            outgoing = self._client.build_request(
                "POST",
                f"https://{self._flower.address()}{FLEET_PATH}/{call}",
                headers=headers,
                content=_limited(request, limit),
            )
            answer = await self._client.send(outgoing, stream=True)
        except TooLarge:
            return _refusal(TransportError("the message is too large", code="too-large"), 413)
        except (httpx.HTTPError, TransportError) as error:
            log.warning("the SuperLink cannot be reached: %s", error or type(error).__name__)
            return _refusal(TransportError("the coordinator is not ready", fix="try again"), 503)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_HEADERS}
        return StreamingResponse(_relay(answer), status_code=answer.status_code, headers=kept)


async def _relay(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for block in answer.aiter_raw():
            yield block
    finally:
        await answer.aclose()


async def serve(home: ServerHome) -> None:
    """Serve until SIGTERM."""
    settings = home.settings()
    inner = ssl.create_default_context(cafile=str(home.ca))
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=64)
    async with httpx.AsyncClient(
        verify=inner, timeout=httpx.Timeout(300.0, connect=5.0), limits=limits, trust_env=False
    ) as client:
        options: dict[str, Any] = {
            "host": settings.host,
            "port": settings.gateway_port,
            "http": PeerCertificateProtocol,
            "ws": "none",
            "ssl_certfile": str(home.server_certificate),
            "ssl_keyfile": str(home.server_key),
            "ssl_ca_certs": str(home.ca),
            "ssl_cert_reqs": ssl.CERT_OPTIONAL,
            "log_level": "warning",
            "access_log": False,
            "server_header": False,
            "lifespan": "off",
            "timeout_keep_alive": 75,
            "timeout_graceful_shutdown": 5,
            "limit_concurrency": 2048,
        }
        config = uvicorn.Config(Gateway(home, settings, client).app(), **options)
        config.load()
        if config.ssl is None:
            raise TransportError("the gateway has no TLS", fix="restore tls/ from the backup")
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
        await uvicorn.Server(config).serve()


def main() -> int:
    """`python -m fl_server.gateway --home H`, as the supervisor starts it."""
    parser = argparse.ArgumentParser(prog="fl_server.gateway")
    parser.add_argument("--home", required=True, type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asyncio.run(serve(ServerHome.open(arguments.home)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
