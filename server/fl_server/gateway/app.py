"""The one open port: TLS 1.3, Flower's Fleet paths for enrolled sites, enrolment for holders of a token.

A client certificate is optional in the handshake, because a site that enrols has none yet. All but `/healthz`,
`/v1/ca` and `/v1/enroll` demands one that is valid, of role `site` and unrevoked, on every request.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fl_server.db.models import SiteRow
from fl_server.db.store import DatabaseAway, Store
from fl_server.flower.superlink import Flower
from fl_server.gateway import connections, fleet
from fl_server.gateway.limits import Refused, Requests, body_blocks, read_body, read_json, refusal
from fl_server.gateway.traffic import Counted
from fl_server.home.layout import ServerHome, ServerSettings
from fl_server.identity.authority import Authority, Identity
from fl_server.identity.rotation import coordinator_key, rotations
from fl_server.identity.sites import Sites
from fl_server.runs.plans import Plans
from fl_shared.documents.base_model import BaseModel
from fl_shared.documents.order import ORDERS_HEADER
from fl_shared.errors import ConcordatError, ConfigError, EnrolmentError, SignatureError, TransportError
from fl_shared.identity.enrolment import PROVED
from fl_shared.names import site_id
from fl_shared.runtime.limits import ConcurrencyLimit, TokenBucket, network
from fl_shared.runtime.logs import set_up
from fl_shared.runtime.processes import raise_file_limit

log = logging.getLogger("fl_server.gateway.app")

MAX_ENROL_BYTES = 64 << 10
MAX_ANSWER_BYTES = 64 << 10
MAX_BASE_BYTES = 4 << 10
MAX_PER_SITE = 16  # requests at once
BURST_S = 4.0
ANONYMOUS_PER_S, ANONYMOUS_BURST = 5.0, 40.0
SEEN_EVERY_S = 10.0
_KEPT_BACK = frozenset({"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "location"})


def _not_found() -> JSONResponse:
    return refusal(ConcordatError("there is nothing here", code="not-found"), 404)


def _too_many() -> TransportError:
    return TransportError("too many requests", fix="wait a second", code="too-many")


@dataclass(frozen=True)
class Enrolment:
    """What a site sends to be enrolled."""

    site: str
    token: str
    csr_pem: str
    signing_key: str
    node_key: str
    proofs: dict[str, str]

    @classmethod
    def read(cls, body: Any) -> Enrolment:
        """From the JSON body. Raises ConfigError for another name of a site, and whatever a wrong form raises."""
        return cls(
            site=site_id(body["site"]),
            token=str(body["token"]),
            csr_pem=str(body["csr_pem"]),
            signing_key=str(body["signing_public_key"]),
            node_key=str(body["node_public_key"]),
            proofs={name: str(body["proofs"][name]) for name in PROVED},
        )


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
        self._rates = TokenBucket(per_second, per_second * BURST_S)
        self._anonymous = TokenBucket(ANONYMOUS_PER_S, ANONYMOUS_BURST)
        self._under_way = ConcurrencyLimit(MAX_PER_SITE)
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
                    404: self._no_such_path,
                    405: self._no_such_path,
                    Refused: self._refused,
                    DatabaseAway: self._database_away,
                },
            )
        )

    async def _no_such_path(self, request: Request, _error: Exception) -> Response:
        who: Identity | None = request.state.who
        try:
            if who is None:
                self._take_anonymous(request)
            elif not self._rates.take(f"{who.role} {who.name}"):
                raise Refused(_too_many(), 503)
        except Refused as refused:  # raised in a handler of exceptions, it would find none
            return refusal(refused.error, refused.status)
        return _not_found()

    @staticmethod
    async def _refused(_request: Request, error: Exception) -> Response:
        if not isinstance(error, Refused):
            raise error
        return refusal(error.error, error.status)

    def _take_anonymous(self, request: Request) -> None:
        """One more request of an address without a (valid) certificate; Refused when there are too many."""
        if not self._anonymous.take(network(request.client.host if request.client else "")):
            raise Refused(_too_many(), 429)

    @staticmethod
    async def _database_away(_request: Request, error: Exception) -> Response:
        """The database is being restarted: a 503, after which sites and their SuperNodes come again."""
        log.warning("%s", error)
        away = TransportError("the coordinator is not ready", fix="try again", code="no-database")
        return refusal(away, 503)

    async def healthz(self, request: Request) -> Response:
        """The gateway lives."""
        self._take_anonymous(request)
        return PlainTextResponse("ok\n")

    async def ca(self, request: Request) -> Response:
        """The CA certificate; whoever fetches it compares its hash with the token's."""
        self._take_anonymous(request)
        return PlainTextResponse(self._authority.pem, media_type="application/x-pem-file")

    async def enroll(self, request: Request) -> Response:
        """Certify a site that proves a token and its keys."""
        self._take_anonymous(request)
        otherwise = EnrolmentError("the request is not of the agreed form", fix="enrol with `fl-client enroll`")
        enrolment = await read_json(request, MAX_ENROL_BYTES, Enrolment.read, otherwise)
        try:
            async with self._enrolling:
                enrolled = await asyncio.to_thread(
                    self._sites.enrol,
                    **vars(enrolment),
                    authority=self._authority,
                    flower=self._flower,
                    days=self._settings.certificate_days,
                )
        except EnrolmentError as error:
            log.warning("refused to enrol %s: %s", enrolment.site, error.code)
            return refusal(error, 403)
        except TransportError as error:
            log.error("cannot enrol %s: %s", enrolment.site, error.message)
            return refusal(TransportError("the coordinator cannot enrol just now", fix="try again in a minute"), 503)
        log.info("enrolled %s", enrolment.site)
        return JSONResponse(
            {
                "certificate_pem": enrolled.certificate_pem,
                "ca_pem": self._authority.pem,
                "coordinator_key": coordinator_key(self._home),
                "fleet_path": fleet.PATH,
            }
        )

    async def _site(self, request: Request) -> tuple[Identity, SiteRow]:
        """Who speaks, read from the database for every request; Refused when the certificate is not valid."""
        who: Identity | None = request.state.who
        try:
            if who is None:
                raise EnrolmentError(
                    "a client certificate is needed here", fix="enrol with `fl-client enroll`", code="no-certificate"
                )
            row = await asyncio.to_thread(self._sites.authorise, who)
        except EnrolmentError as error:
            self._take_anonymous(request)
            raise Refused(error, 403) from error
        if not self._rates.take(row.site):
            # Not 429: Flower's SuperNode comes again after a 503 and gives up after anything else.
            raise Refused(_too_many(), 503)
        now = time.monotonic()
        if now - self._seen.get(row.site, 0.0) > SEEN_EVERY_S:
            self._seen[row.site] = now
            await asyncio.to_thread(self._sites.seen, row.site)
        return who, row

    def _count_in(self, request: Request, site: str) -> None:
        """Count one of the requests that a site may have under way, to its end; Refused when there are too many."""
        if not self._under_way.acquire(site):
            raise Refused(_too_many(), 503)
        request.state.at_end.callback(self._under_way.release, site)

    async def hello(self, request: Request) -> Response:
        """Who the caller is, and the coordinator's key with every change of it."""
        _, row = await self._site(request)
        current, changes = await asyncio.to_thread(rotations, self._home)
        return JSONResponse({"site": row.site, "coordinator_key": current, "time": time.time(), "rotations": changes})

    async def renew(self, request: Request) -> Response:
        """Certify a new key of the site that speaks; its present certificate is valid until the new one is used."""
        who, row = await self._site(request)
        self._count_in(request, row.site)
        otherwise = EnrolmentError("the request is not of the agreed form", fix="the site's agent renews by itself")
        csr = await read_json(request, MAX_ENROL_BYTES, lambda body: str(body["csr_pem"]), otherwise)
        try:
            renewed = await asyncio.to_thread(
                self._sites.renew, who, csr, self._authority, self._settings.certificate_days
            )
        except EnrolmentError as error:
            return refusal(error, 403)
        log.info("renewed the certificate of %s", row.site)
        return JSONResponse({"certificate_pem": renewed})

    async def base(self, request: Request) -> Response:
        """Keep which base model the site that speaks says it has, and which orders it reads."""
        _, row = await self._site(request)
        self._count_in(request, row.site)
        otherwise = ConfigError("the announcement is not of the agreed form", fix="the site's agent announces its base")
        base = await read_json(request, MAX_BASE_BYTES, BaseModel.from_dict, otherwise)
        header = request.headers.get(ORDERS_HEADER, "")  # a site of a version before it says nothing
        orders = int(header) if re.fullmatch("[0-9]{1,4}", header) else 0
        await asyncio.to_thread(self._sites.announce, row.site, base, orders)
        return JSONResponse({"taken": True})

    async def questions(self, request: Request) -> Response:
        """What plans ask the site that speaks."""
        _, row = await self._site(request)
        return JSONResponse({"questions": await asyncio.to_thread(self._plans.pending, row.site)})

    async def answers(self, request: Request) -> Response:
        """Take the site's signed answer to one of them."""
        _, row = await self._site(request)
        self._count_in(request, row.site)
        otherwise = ConfigError("the answer is not of the agreed form", fix="the site's agent answers")
        answer = await read_json(request, MAX_ANSWER_BYTES, lambda body: body["answer"], otherwise)
        try:
            await asyncio.to_thread(self._plans.take, row.site, answer)
        except (SignatureError, ConfigError) as error:
            log.warning("%s: an answer was not taken: %s", row.site, error.message)
            return refusal(error, 400)
        return JSONResponse({"taken": True})

    async def fleet(self, request: Request) -> Response:
        """Pass one Fleet call of an enrolled site's own node on to the SuperLink."""
        _, row = await self._site(request)
        call = str(request.path_params["call"])
        if call not in fleet.CALLS:
            return _not_found()
        try:
            fleet.require_own_node(request.headers, row)
            self._count_in(request, row.site)
            return await self._forward(request, row, call)
        except EnrolmentError as error:
            log.warning("%s: %s", row.site, error.message)
            return refusal(error, 403)
        except TransportError as error:
            return refusal(error, 400)

    async def _note(self, site: str, call: str, status: int) -> None:
        """Remember whether the SuperLink accepts the site's node; if not, the launcher looks into it.

        What cannot be written is left to the next call. An answer has come meanwhile, and is passed on in any case.
        """
        deactivated = call == fleet.DEACTIVATE and status < 400
        if call not in fleet.SIGNS_OF_LIFE and not deactivated:
            return
        now, accepted = time.monotonic(), status < 400
        if accepted and not deactivated and now - self._accepted.get(site, -SEEN_EVERY_S) < SEEN_EVERY_S:
            return
        if not accepted and site not in self._accepted and now - self._doubted < SEEN_EVERY_S:
            return  # known already
        try:
            if not accepted:
                await asyncio.to_thread(self._flower.doubt, True)
            await asyncio.to_thread(self._sites.node_seen, site, online=accepted and not deactivated)
        except (DatabaseAway, OSError) as error:
            log.warning("cannot note that the SuperLink answered %s: %s", site, error)
            return
        if accepted and not deactivated:
            self._accepted[site] = now
            return
        self._accepted.pop(site, None)
        if not accepted:
            self._doubted = now

    async def _forward(self, request: Request, row: SiteRow, call: str) -> Response:
        content: bytes | AsyncIterator[bytes]
        if call == fleet.PUSH_MESSAGES:
            content = await read_body(request, min(fleet.MAX_PUSH_MESSAGES_BYTES, self._settings.max_message_bytes))
            fleet.require_own_messages(content, row)
        else:
            content = body_blocks(request, self._settings.max_message_bytes)
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
            return refusal(TransportError("the coordinator is not ready", fix="try again"), 503)
        await self._note(row.site, call, answer.status_code)
        headers = {k: v for k, v in answer.headers.items() if k.lower() not in _KEPT_BACK}
        return StreamingResponse(answer.aiter_raw(), status_code=answer.status_code, headers=headers)


def tls_context(home: ServerHome) -> ssl.SSLContext:
    """TLS 1.3 alone, with a client certificate of our CA or none; nothing is resumed without a full handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.load_cert_chain(home.server_certificate, home.server_key)
    context.load_verify_locations(home.ca)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


async def serve(home: ServerHome) -> None:
    """Serve until SIGTERM."""
    settings = home.settings()
    inner = ssl.create_default_context(cafile=str(home.ca))
    limits = httpx.Limits(max_connections=connections.MAX_CONNECTIONS, max_keepalive_connections=64)
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
        await connections.serve(
            uvicorn.Server(config), tls_context(home), connections.listener(settings.listen, settings.gateway_port)
        )


def main() -> int:
    """`python -m fl_server.gateway.app --home H`, as the supervisor starts it."""
    parser = argparse.ArgumentParser(prog="fl_server.gateway.app")
    parser.add_argument("--home", required=True, type=Path)
    arguments = parser.parse_args()
    set_up("gateway")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # before uvicorn takes it over, and when it gives it back
    raise_file_limit(connections.FILES)
    asyncio.run(serve(ServerHome.open(arguments.home)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
