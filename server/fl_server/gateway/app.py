"""The one open port: TLS 1.3, Flower's Fleet paths for enrolled sites, enrolment for holders of a token.

A client certificate is optional in the handshake, because a site that enrols has none yet. All but `/healthz`,
`/v1/ca` and `/v1/enroll` demands one that is valid, of role `site` and unrevoked, on every request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fl_server.db.models import SiteRow
from fl_server.db.store import DatabaseAway, Store
from fl_server.flower.superlink import Flower
from fl_server.gateway import connections as doorman
from fl_server.gateway import fleet
from fl_server.gateway.traffic import Counted
from fl_server.home.layout import ServerHome, ServerSettings
from fl_server.identity.authority import Authority, Identity
from fl_server.identity.rotation import coordinator_key, rotations
from fl_server.identity.sites import Sites
from fl_server.runs.plans import Plans
from fl_shared.canonical import parse_json
from fl_shared.documents.base_model import BaseModel
from fl_shared.errors import ConcordatError, ConfigError, EnrolmentError, SignatureError, TransportError
from fl_shared.identity.enrolment import PROVED
from fl_shared.names import site_id
from fl_shared.runtime.limits import Places, Rates, network
from fl_shared.runtime.logs import set_up

log = logging.getLogger("fl_server.gateway.app")

MAX_ENROL_BYTES = 64 << 10
MAX_ANSWER_BYTES = 64 << 10
MAX_BASE_BYTES = 4 << 10
MAX_PER_SITE = 16  # requests at once
BURST_S = 4.0
ANONYMOUS_PER_S, ANONYMOUS_BURST = 5.0, 40.0
BODY_IDLE_S, SEND_IDLE_S = 20.0, 60.0
LEAST_BYTES_PER_S, PATIENCE_S = 1024.0, 30.0
SEEN_EVERY_S = 10.0
_KEPT_BACK = frozenset({"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "location"})

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Refused(Exception):
    """Ends a request with a typed answer."""

    def __init__(self, error: ConcordatError, status: int) -> None:
        super().__init__(error.message)
        self.error = error
        self.status = status


def _refusal(error: ConcordatError, status: int) -> JSONResponse:
    headers = {"retry-after": "1"} if status in (429, 503) else None
    return JSONResponse(error.to_dict(), status_code=status, headers=headers)


def _not_found() -> JSONResponse:
    return _refusal(ConcordatError("there is nothing here", code="not-found"), 404)


def _too_many() -> TransportError:
    return TransportError("too many requests", fix="wait a second", code="too-many")


async def _limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body as it comes. Refused: more than `limit` bytes, a pause of `BODY_IDLE_S`, or a trickle."""
    too_slow = Refused(TransportError("the request comes too slowly", fix="send it again", code="too-slow"), 408)
    too_large = Refused(
        TransportError(f"the request is larger than {limit} bytes", fix="send less", code="too-large"), 413
    )
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    stream = aiter(request.stream())
    seen, waited = 0, 0.0
    while True:
        began = time.monotonic()
        try:
            async with asyncio.timeout(BODY_IDLE_S):
                block = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise too_slow from None
        # Only what the client makes us wait for counts: the SuperLink may be slow, too.
        waited += time.monotonic() - began
        seen += len(block)
        if seen > limit:
            raise too_large
        if waited > PATIENCE_S and seen < waited * LEAST_BYTES_PER_S:
            raise too_slow
        yield block


async def _whole(request: Request, limit: int) -> bytes:
    return b"".join([block async for block in _limited(request, limit)])


class Requests:
    """Watches over whole requests: what was taken for one is given back at its end, and no answer waits for ever.

    `request.state.at_end` is the stack of what to give back; it ends after the answer's last byte.
    """

    def __init__(self, app: Starlette) -> None:
        self._app = app
        app.router.redirect_slashes = False  # a redirect would name the host that the client made up

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass every part of an answer on within `SEND_IDLE_S`; no request that two readers could read in two ways."""
        scope["path"] = scope["raw_path"].decode("latin-1")  # as it came: `/v1%2Fca` is not `/v1/ca`
        names = [name for name, _ in scope["headers"]]
        if len(set(names)) != len(names) or {b"content-length", b"transfer-encoding"} <= set(names):
            twice = TransportError("a header stands there twice, or the length in two ways", code="bad-request")
            refusal = _refusal(twice, 400)
            refusal.headers["connection"] = "close"
            await refusal(scope, receive, send)
            return

        async def timely(message: Message) -> None:
            try:
                async with asyncio.timeout(SEND_IDLE_S):
                    await send(message)
            except TimeoutError:
                log.warning("a client did not take its answer")
                scope["state"]["abort"]()
                raise ClientDisconnect from None

        with contextlib.suppress(ClientDisconnect):
            async with contextlib.AsyncExitStack() as at_end:
                scope["state"]["at_end"] = at_end
                await self._app(scope, receive, timely)


class Gateway:
    """The routes and what they need."""

    def __init__(self, home: ServerHome, settings: ServerSettings, client: httpx.AsyncClient) -> None:
        self._home = home
        self._settings = settings
        self._client = client
        self._authority = Authority.load(home.ca_key, home.ca)
        store = Store(home.database_url())
        self._sites = Sites(store)
        self._plans = Plans(store)
        self._flower = Flower(home)
        self._enrolling = asyncio.Lock()
        per_second = float(settings.site_requests_per_s)
        self._rates = Rates(per_second, per_second * BURST_S)
        self._strangers = Rates(ANONYMOUS_PER_S, ANONYMOUS_BURST)
        self._under_way = Places(MAX_PER_SITE)
        self._seen: dict[str, float] = {}
        self._accepted: dict[str, float] = {}
        self._doubted = -SEEN_EVERY_S

    def app(self) -> Requests:
        """The application."""
        return Requests(
            Starlette(
                routes=[
                    Route("/healthz", self.healthz, methods=["GET"]),
                    Route("/v1/ca", self.ca, methods=["GET"]),
                    Route("/v1/enroll", self.enroll, methods=["POST"]),
                    Route("/v1/hello", self.hello, methods=["GET"]),
                    Route("/v1/renew", self.renew, methods=["POST"]),
                    Route("/v1/base", self.base, methods=["POST"]),
                    Route("/v1/questions", self.questions, methods=["GET"]),
                    Route("/v1/answers", self.answers, methods=["POST"]),
                    Route(fleet.PATH + "/{call}", self.fleet, methods=["POST"]),
                ],
                exception_handlers={
                    404: self._lost,
                    405: self._lost,
                    Refused: self._refused,
                    DatabaseAway: self._away,
                },
            )
        )

    async def _lost(self, request: Request, _error: Exception) -> Response:
        who: Identity | None = request.state.who
        try:
            if who is None:
                self._stranger(request)
            elif not self._rates.take(f"{who.role} {who.name}"):
                raise Refused(_too_many(), 503)
        except Refused as refused:  # raised in a handler of exceptions, it would find none
            return _refusal(refused.error, refused.status)
        return _not_found()

    @staticmethod
    async def _refused(_request: Request, error: Exception) -> Response:
        if not isinstance(error, Refused):
            raise error
        return _refusal(error.error, error.status)

    def _stranger(self, request: Request) -> None:
        """One more request of an address without a (valid) certificate; Refused when there are too many."""
        if not self._strangers.take(network(request.client.host if request.client else "")):
            raise Refused(_too_many(), 429)

    @staticmethod
    async def _away(_request: Request, error: Exception) -> Response:
        """The database is being restarted: a 503, after which sites and their SuperNodes come again."""
        log.warning("%s", error)
        away = TransportError("the coordinator is not ready", fix="try again", code="no-database")
        return _refusal(away, 503)

    async def healthz(self, request: Request) -> Response:
        """The gateway lives."""
        self._stranger(request)
        return PlainTextResponse("ok\n")

    async def ca(self, request: Request) -> Response:
        """The CA certificate; whoever fetches it compares its hash with the token's."""
        self._stranger(request)
        return PlainTextResponse(self._authority.pem, media_type="application/x-pem-file")

    async def enroll(self, request: Request) -> Response:
        """Certify a site that proves a token and its keys."""
        self._stranger(request)
        raw = await _whole(request, MAX_ENROL_BYTES)
        try:
            body = json.loads(raw)
            site, token = site_id(body["site"]), str(body["token"])
            csr, signing, node = (str(body[name]) for name in ("csr_pem", "signing_public_key", "node_public_key"))
            proofs = {name: str(body["proofs"][name]) for name in PROVED}
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
                    proofs=proofs, authority=self._authority, flower=self._flower, days=self._settings.certificate_days,
                )  # fmt: skip
        except EnrolmentError as error:
            log.warning("refused to enrol %s: %s", site, error.code)
            return _refusal(error, 403)
        except TransportError as error:
            log.error("cannot enrol %s: %s", site, error.message)
            return _refusal(TransportError("the coordinator cannot enrol just now", fix="try again in a minute"), 503)
        log.info("enrolled %s", site)
        return JSONResponse(
            {
                "certificate_pem": enrolled.certificate_pem,
                "ca_pem": self._authority.pem,
                "coordinator_key": coordinator_key(self._home),
                "fleet_path": fleet.PATH,
            }
        )

    async def _site(self, request: Request) -> tuple[Identity, SiteRow]:
        """Who speaks, read from the database for every request; Refused when the certificate does not count."""
        who: Identity | None = request.state.who
        try:
            if who is None:
                raise EnrolmentError(
                    "a client certificate is needed here", fix="enrol with `fl-client enroll`", code="no-certificate"
                )
            row = await asyncio.to_thread(self._sites.authorise, who)
        except EnrolmentError as error:
            self._stranger(request)
            raise Refused(error, 403) from error
        if not self._rates.take(row.site):
            # Not 429: Flower's SuperNode comes again after a 503 and gives up after anything else.
            raise Refused(_too_many(), 503)
        now = time.monotonic()
        if now - self._seen.get(row.site, 0.0) > SEEN_EVERY_S:
            self._seen[row.site] = now
            await asyncio.to_thread(self._sites.seen, row.site)
        return who, row

    def _take_place(self, request: Request, site: str) -> None:
        """Count one of the requests that a site may have under way, to its end; Refused when there are too many."""
        if not self._under_way.take(site):
            raise Refused(_too_many(), 503)
        request.state.at_end.callback(self._under_way.give_back, site)

    async def hello(self, request: Request) -> Response:
        """Who the caller is, and the coordinator's key with every change of it."""
        _, row = await self._site(request)
        current, changes = await asyncio.to_thread(rotations, self._home)
        return JSONResponse({"site": row.site, "coordinator_key": current, "time": time.time(), "rotations": changes})

    async def renew(self, request: Request) -> Response:
        """Certify a new key of the site that speaks; its present certificate counts until the new one is used."""
        who, row = await self._site(request)
        self._take_place(request, row.site)
        raw = await _whole(request, MAX_ENROL_BYTES)
        try:
            csr = str(json.loads(raw)["csr_pem"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return _refusal(
                EnrolmentError("the request is not of the agreed form", fix="the site's agent renews by itself"), 400
            )
        try:
            made = await asyncio.to_thread(
                self._sites.renew, who, csr, self._authority, self._settings.certificate_days
            )
        except EnrolmentError as error:
            return _refusal(error, 403)
        log.info("renewed the certificate of %s", row.site)
        return JSONResponse({"certificate_pem": made})

    async def base(self, request: Request) -> Response:
        """Keep which base model the site that speaks says it has."""
        _, row = await self._site(request)
        self._take_place(request, row.site)
        raw = await _whole(request, MAX_BASE_BYTES)
        try:
            base = BaseModel.from_dict(parse_json(raw, "the announcement"))
        except ConfigError as error:
            return _refusal(error, 400)
        await asyncio.to_thread(self._sites.announce, row.site, base)
        return JSONResponse({"taken": True})

    async def questions(self, request: Request) -> Response:
        """What plans ask the site that speaks."""
        _, row = await self._site(request)
        return JSONResponse({"questions": await asyncio.to_thread(self._plans.pending, row.site)})

    async def answers(self, request: Request) -> Response:
        """Take the site's signed answer to one of them."""
        _, row = await self._site(request)
        self._take_place(request, row.site)
        raw = await _whole(request, MAX_ANSWER_BYTES)
        try:
            await asyncio.to_thread(self._plans.take, row.site, json.loads(raw)["answer"])
        except (SignatureError, ConfigError) as error:
            log.warning("%s: an answer was not taken: %s", row.site, error.message)
            return _refusal(error, 400)
        except (ValueError, KeyError, TypeError, RecursionError):
            return _refusal(ConfigError("the answer is not of the agreed form", fix="the site's agent answers"), 400)
        return JSONResponse({"taken": True})

    async def fleet(self, request: Request) -> Response:
        """Pass one Fleet call of an enrolled site's own node on to the SuperLink."""
        _, row = await self._site(request)
        call = str(request.path_params["call"])
        if call not in fleet.CALLS:
            return _not_found()
        try:
            fleet.require_own_node(request.headers, row)
            self._take_place(request, row.site)
            return await self._forward(request, row, call)
        except EnrolmentError as error:
            log.warning("%s: %s", row.site, error.message)
            return _refusal(error, 403)
        except TransportError as error:
            return _refusal(error, 400)

    async def _note(self, site: str, call: str, status: int) -> None:
        """Remember whether the SuperLink accepts the site's node; if not, the launcher looks into it.

        What cannot be written is left to the next call. An answer has come meanwhile, and is passed on in any case.
        """
        if call not in fleet.SIGNS_OF_LIFE:
            return
        now, accepted = time.monotonic(), status < 400
        if accepted and now - self._accepted.get(site, -SEEN_EVERY_S) < SEEN_EVERY_S:
            return
        if not accepted and site not in self._accepted and now - self._doubted < SEEN_EVERY_S:
            return  # known already
        try:
            if not accepted:
                await asyncio.to_thread(self._flower.doubt, True)
            await asyncio.to_thread(self._sites.node_seen, site, accepted=accepted)
        except (DatabaseAway, OSError) as error:
            log.warning("cannot note that the SuperLink answered %s: %s", site, error)
            return
        if accepted:
            self._accepted[site] = now
        else:
            self._accepted.pop(site, None)
            self._doubted = now

    async def _forward(self, request: Request, row: SiteRow, call: str) -> Response:
        content: bytes | AsyncIterator[bytes]
        if call == fleet.PUSH_MESSAGES:
            content = await _whole(request, min(fleet.MAX_PUSH_MESSAGES_BYTES, self._settings.max_message_bytes))
            fleet.require_own_messages(content, row)
        else:
            content = _limited(request, self._settings.max_message_bytes)
        try:
            outgoing = self._client.build_request(
                "POST",
                f"https://{self._flower.address()}{fleet.PATH}/{call}",
                headers=fleet.passed_headers(request.headers),
                content=content,
            )
            answer = await self._client.send(outgoing, stream=True)
            request.state.at_end.push_async_callback(answer.aclose)
        except (httpx.HTTPError, TransportError) as error:
            log.warning("the SuperLink cannot be reached: %s", error or type(error).__name__)
            return _refusal(TransportError("the coordinator is not ready", fix="try again"), 503)
        await self._note(row.site, call, answer.status_code)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in _KEPT_BACK}
        return StreamingResponse(answer.aiter_raw(), status_code=answer.status_code, headers=kept)


def tls_context(home: ServerHome) -> ssl.SSLContext:
    """TLS 1.3 alone, with a client certificate of our CA or none; nothing is resumed without a full handshake."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.num_tickets = 0
    made.load_cert_chain(home.server_certificate, home.server_key)
    made.load_verify_locations(home.ca)
    made.verify_mode = ssl.CERT_OPTIONAL
    return made


async def serve(home: ServerHome) -> None:
    """Serve until SIGTERM."""
    settings = home.settings()
    inner = ssl.create_default_context(cafile=str(home.ca))
    limits = httpx.Limits(max_connections=doorman.MAX_CONNECTIONS, max_keepalive_connections=64)
    async with httpx.AsyncClient(
        verify=inner, timeout=httpx.Timeout(300.0, connect=5.0), limits=limits, trust_env=False
    ) as client:
        config = uvicorn.Config(
            Counted(Gateway(home, settings, client).app()),
            http="h11",
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=5,
        )
        config.load()
        await doorman.serve(
            uvicorn.Server(config), tls_context(home), doorman.listener(settings.listen, settings.gateway_port)
        )


def main() -> int:
    """`python -m fl_server.gateway.app --home H`, as the supervisor starts it."""
    parser = argparse.ArgumentParser(prog="fl_server.gateway.app")
    parser.add_argument("--home", required=True, type=Path)
    arguments = parser.parse_args()
    set_up("gateway")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # before uvicorn takes it over, and when it gives it back
    doorman.raise_file_limit()
    asyncio.run(serve(ServerHome.open(arguments.home)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
