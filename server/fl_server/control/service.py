"""The control API: gRPC with mutual TLS. Admins may do everything here, auditors may read.

Whatever an admin does, other than look, stands in the admin log before it takes effect (`fl_server.access.log`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from fl_server import __version__
from fl_server.access.log import AdminLog
from fl_server.control.messages import plan_message, site_message
from fl_server.db.models import ENDED, EventRow, PromotionRow, RoundRow
from fl_server.db.store import Store
from fl_server.flower.superlink import Flower
from fl_server.home.layout import ServerHome
from fl_server.identity.authority import Authority, Identity, identity
from fl_server.identity.operators import AuditorPlaces, Operators
from fl_server.identity.rotation import coordinator_key
from fl_server.identity.sites import Sites
from fl_server.operations.supervisor import read_state
from fl_server.registry.promotions import Releases
from fl_server.runs.plans import Plans
from fl_server.runs.service import Runs, RunView
from fl_shared.canonical import sha256_hex
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConcordatError, ConfigError
from fl_shared.identity.signing import SigningKey
from fl_shared.runtime.logs import set_up
from fl_shared.runtime.stopping import StopRequest
from fl_shared.runtime.threads import running_pool
from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.chunks import split
from fl_shared.wire.control_pb2_grpc import ControlServicer, add_ControlServicer_to_server
from fl_shared.wire.hosts import host_and_port

log = logging.getLogger("fl_server.control.service")

# gRPC has no switch for TLS 1.3 alone. This list counts for TLS 1.2 alone, and nothing in it fits our EC certificate.
TLS_1_2_CIPHERS = "ECDHE-RSA-AES256-GCM-SHA384"
MAX_REQUEST_BYTES = 4 << 20
WORKERS = 32
MAX_WATCHERS = 16
MAX_PLANNERS = 8
MAX_MESSAGE_BYTES = 2000  # of message and fix each: gRPC takes 16 KiB of details, and JSON writes 4 bytes as 12
MAX_ARGUMENT = 1000
WATCH_POLL_S = 0.5
PLAN_POLL_S = 0.25
_NOT_ALLOWED = ("wrong-role", "not-authorised", "expired")
F = TypeVar("F", bound=Callable[..., Any])


def _abort(context: grpc.ServicerContext, error: ConcordatError) -> NoReturn:
    """End the call with the error as JSON in the details; `fl_server.cli.connection` reads it back."""
    detail = error.to_dict() | {"message": _cut(error.message), "fix": _cut(error.fix)}
    del detail["error"]  # this API calls it `message`, and both would be more than gRPC takes
    code = grpc.StatusCode.PERMISSION_DENIED if error.code in _NOT_ALLOWED else grpc.StatusCode.FAILED_PRECONDITION
    context.abort(code, json.dumps(detail))
    raise error  # abort raises; this line is for the type checker


def _cut(text: str) -> str:
    data = text.encode("utf-8", "replace")
    return text if len(data) <= MAX_MESSAGE_BYTES else data[:MAX_MESSAGE_BYTES].decode("utf-8", "ignore") + "…"


def caller(context: grpc.ServicerContext) -> Identity:
    """Whose certificate the caller has shown; TLS has verified it."""
    pem = bytes(next(iter(context.auth_context().get("x509_pem_cert", [])), b""))
    der = x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    return identity(der)


def allow(*roles: str, action: str = "") -> Callable[[F], F]:
    """Answer only callers of these roles; turn our errors into typed answers; log an `action` before it is done."""

    def wrap(call: F) -> F:
        @contextlib.contextmanager
        def allowed(control: Control, request: Message, context: grpc.ServicerContext) -> Iterator[None]:
            try:
                who = caller(context)
                log.info("%s by %s %s", call.__name__, who.role, who.name)
                if who.role not in roles:
                    raise ConcordatError(
                        f"the role {who.role} may not do this",
                        fix=f"use a certificate of role {roles[0]}",
                        code="wrong-role",
                    )
                control.operators.authorise(who)
                with control.places.taken(who):
                    if action:
                        with control.log.recorded(who, action, _arguments(request)):
                            yield
                    else:
                        yield
            except ConcordatError as error:
                _abort(context, error)

        @functools.wraps(call)
        def plain(self: Control, request: Message, context: grpc.ServicerContext) -> Any:
            with allowed(self, request, context):
                return call(self, request, context)

        @functools.wraps(call)
        def streamed(self: Control, request: Message, context: grpc.ServicerContext) -> Iterator[Any]:
            with allowed(self, request, context):
                yield from call(self, request, context)

        return streamed if call.__name__ in _STREAMS else plain  # type: ignore[return-value]  # same signature

    return wrap


def _arguments(request: Message) -> dict[str, Any]:
    """What was asked, for the admin log: the fields as they came, a spec by its name and hash, long texts cut."""
    table: dict[str, Any] = MessageToDict(request, preserving_proto_field_name=True)
    text = table.pop("spec_toml", None)
    if text is not None:
        table["spec_sha256"] = sha256_hex(text.encode("utf-8"))
        with contextlib.suppress(ConcordatError):  # a spec that cannot be read is refused below, with its reason
            table["run"] = RunSpec.from_text(text, where="the run spec").run.name
    for name, value in table.items():
        if isinstance(value, str) and len(value) > MAX_ARGUMENT:
            table[name] = f"{value[:MAX_ARGUMENT]}… ({len(value)} characters)"
    return table


_STREAMS = frozenset({"WatchRun", "ListReceipts", "GetAdapter", "PlanRun", "ListAdminLog"})


def _round_message(view: RunView, number: int, row: RoundRow | None) -> pb.Round:
    replies = [
        pb.SiteReply(
            site=reply.site,
            status=reply.status,
            code=reply.code,
            message=reply.message,
            epsilon_spent_total=reply.epsilon_spent_total,
            delta=reply.delta,
        )
        for reply in view.replies
        if reply.round == number
    ]
    return pb.Round(
        round=number,
        state=row.state if row else "failed",
        adapter_digest=row.adapter_digest if row else "",
        committed_at=row.committed_at if row else 0.0,
        seconds=row.seconds if row else 0.0,
        bytes=row.bytes if row else 0,
        replies=replies,
    )


def run_message(view: RunView, *, history: bool = True) -> pb.Run:
    """A run as admins see it; a round with replies but without a commit shows as failed."""
    rows = {each.round: each for each in view.rounds}
    numbers = sorted(set(rows) | {reply.round for reply in view.replies}) if history else []
    return pb.Run(
        run=view.row.run,
        state=view.row.state,
        reason=view.row.reason,
        rounds=view.row.rounds,
        rounds_committed=view.committed,
        spec_digest=view.row.spec_digest,
        spec_json=view.row.spec_json,
        created_at=view.row.created_at,
        updated_at=view.row.updated_at,
        sites=view.spec.run.sites,
        warnings=view.warnings,
        history=[_round_message(view, number, rows.get(number)) for number in numbers],
    )


def _spec(text: str) -> RunSpec:
    return RunSpec.from_text(text, where="the run spec")


def _event_message(row: EventRow) -> pb.Event:
    return pb.Event(
        number=row.number,
        run=row.run,
        at=row.at,
        kind=row.kind,
        round=row.round,
        site=row.site,
        message=row.message,
        data_json=row.data_json,
    )


def _adapter_message(view: RunView, row: RoundRow, released_as: Iterable[str] = ()) -> pb.Adapter:
    return pb.Adapter(
        run=view.row.run,
        round=row.round,
        digest=row.adapter_digest,
        bytes=row.adapter_bytes,
        committed_at=row.committed_at,
        released_as=sorted(released_as),
    )


class Control(ControlServicer):  # type: ignore[misc,unused-ignore]  # generated without types
    """The calls of `control.proto`."""

    def __init__(self, home: ServerHome) -> None:
        store = Store(home.database_url())
        self._home = home
        self.operators = Operators.of(home, store)
        self.log = AdminLog.of(home, store)
        self.places = AuditorPlaces()
        self._plans = Plans(store)
        self._sites = Sites(store)
        self._runs = Runs(store, home.adapters)
        self._releases = Releases(store, self._runs)
        self._ca_sha256 = Authority.load(home.ca_key, home.ca).sha256
        self._started_at = time.time()
        self._watchers = threading.BoundedSemaphore(MAX_WATCHERS)
        self._planners = threading.BoundedSemaphore(MAX_PLANNERS)

    @allow("admin", "auditor")
    def Status(self, _request: pb.StatusRequest, _context: grpc.ServicerContext) -> pb.StatusReply:  # noqa: N802
        state = read_state(self._home)
        return pb.StatusReply(
            version=__version__,
            coordinator_key=coordinator_key(self._home),
            started_at=self._started_at,
            components=[
                pb.ComponentState(name=each["name"], state=each["state"], address=each["address"])
                for each in state["components"]
            ],
            sites=sum(1 for row in self._sites.all() if row.state == "enrolled"),
            running_runs=len(self._runs.active()),
        )

    @allow("admin", action="sites invite")
    def InviteSite(self, request: pb.InviteSiteRequest, _context: grpc.ServicerContext) -> pb.InviteSiteReply:  # noqa: N802
        made = self._sites.invite(request.site, ca_sha256=self._ca_sha256, ttl_s=request.ttl_s)
        return pb.InviteSiteReply(site=made.site, token=made.token, expires_at=made.expires_at)

    @allow("admin", "auditor")
    def ListSites(self, _request: pb.ListSitesRequest, _context: grpc.ServicerContext) -> pb.ListSitesReply:  # noqa: N802
        return pb.ListSitesReply(sites=[site_message(row) for row in self._sites.all()])

    @allow("admin", "auditor")
    def ShowSite(self, request: pb.SiteRequest, _context: grpc.ServicerContext) -> pb.Site:  # noqa: N802
        found = site_message(self._sites.get(request.site))
        going = [view for view in self._runs.all() if view.row.state not in ENDED]
        found.runs.extend(view.row.run for view in going if request.site in view.spec.run.sites)
        newest = self._runs.newest_receipt(request.site)
        if newest is not None:
            found.epsilon_spent_total, found.delta = newest.epsilon_spent_total, newest.delta
        return found

    @allow("admin", action="sites revoke")
    def RevokeSite(self, request: pb.SiteRequest, _context: grpc.ServicerContext) -> pb.Site:  # noqa: N802
        return site_message(self._sites.revoke(request.site, Flower(self._home)))

    @allow("admin", action="runs plan")
    def PlanRun(self, request: pb.PlanRunRequest, context: grpc.ServicerContext) -> Iterator[pb.SitePlan]:  # noqa: N802
        spec = _spec(request.spec_toml)
        if not self._planners.acquire(blocking=False):
            raise ConcordatError("too many plans at once", fix="wait for another `fl-admin runs plan`", code="too-many")
        try:
            yield from self._plan(spec, request.wait_s, context)
        finally:
            self._planners.release()

    def _plan(self, spec: RunSpec, wait_s: float, context: grpc.ServicerContext) -> Iterator[pb.SitePlan]:
        plan = self._plans.ask(spec, SigningKey.load(self._home.signing_key), wait_s)
        for view in plan.not_asked:
            yield plan_message(view, spec)
        told: set[str] = set()
        while context.is_active():
            over = time.time() > plan.expires_at
            for site, view in self._plans.answers(plan).items():
                if site not in told:
                    told.add(site)
                    yield plan_message(view, spec)
            if over or len(told) == len(plan.asked):
                break
            time.sleep(PLAN_POLL_S)
        for site in plan.asked:
            if site not in told:
                yield plan_message(self._plans.silent(site), spec)

    @allow("admin", action="runs launch")
    def LaunchRun(self, request: pb.LaunchRunRequest, _context: grpc.ServicerContext) -> pb.Run:  # noqa: N802
        return run_message(self._runs.launch(_spec(request.spec_toml), force=request.force))

    @allow("admin", "auditor")
    def ListRuns(self, _request: pb.ListRunsRequest, _context: grpc.ServicerContext) -> pb.ListRunsReply:  # noqa: N802
        return pb.ListRunsReply(runs=[run_message(view, history=False) for view in self._runs.all()])

    @allow("admin", "auditor")
    def ShowRun(self, request: pb.RunRequest, _context: grpc.ServicerContext) -> pb.Run:  # noqa: N802
        return run_message(self._runs.show(request.run))

    @allow("admin", "auditor")
    def WatchRun(self, request: pb.WatchRunRequest, context: grpc.ServicerContext) -> Iterator[pb.Event]:  # noqa: N802
        if not self._watchers.acquire(blocking=False):
            raise ConcordatError("too many watchers", fix="end another `fl-admin runs watch`", code="too-many")
        try:
            after = request.after
            while context.is_active():
                ended = self._runs.show(request.run).row.state in ENDED or request.until_now
                events = self._runs.events(request.run, after)
                for event in events:
                    after = event.number
                    if request.site in ("", event.site):
                        yield _event_message(event)
                if ended and not events:
                    return
                time.sleep(WATCH_POLL_S)
        finally:
            self._watchers.release()

    @allow("admin", action="runs stop")
    def StopRun(self, request: pb.RunRequest, _context: grpc.ServicerContext) -> pb.Run:  # noqa: N802
        return run_message(self._runs.stop(request.run))

    @allow("admin", action="runs pause")
    def PauseRun(self, request: pb.RunRequest, _context: grpc.ServicerContext) -> pb.Run:  # noqa: N802
        return run_message(self._runs.pause(request.run))

    @allow("admin", action="runs resume")
    def ResumeRun(self, request: pb.RunRequest, _context: grpc.ServicerContext) -> pb.Run:  # noqa: N802
        return run_message(self._runs.resume(request.run))

    @allow("admin", "auditor")
    def ListReceipts(  # noqa: N802
        self, request: pb.ListReceiptsRequest, _context: grpc.ServicerContext
    ) -> Iterator[pb.ReceiptRecord]:
        for row in self._runs.receipts(request.site, request.run):
            yield pb.ReceiptRecord(document_json=row.document_json, received_at=row.received_at)

    @allow("admin", "auditor")
    def ListAdapters(self, request: pb.ListAdaptersRequest, _context: grpc.ServicerContext) -> pb.ListAdaptersReply:  # noqa: N802
        view = self._runs.show(request.run)
        names = self._released_as(request.run)
        return pb.ListAdaptersReply(
            adapters=[
                _adapter_message(view, row, names.get(row.round, ())) for row in view.rounds if row.state == "committed"
            ]
        )

    def _released_as(self, run: str) -> dict[int, list[str]]:
        """The names under which rounds of a run are current, by round."""
        found: dict[int, list[str]] = {}
        for name, row in self._releases.current().items():
            if row.run == run:
                found.setdefault(row.round, []).append(name)
        return found

    @allow("admin", action="adapters export")
    def GetAdapter(self, request: pb.GetAdapterRequest, _context: grpc.ServicerContext) -> Iterator[pb.AdapterChunk]:  # noqa: N802
        run, number = request.run, request.round
        if request.released_as:
            released = self._releases.find(request.released_as)
            run, number = released.run, released.round
        view = self._runs.show(run)
        number = number or max((row.round for row in view.rounds if row.state == "committed"), default=0)
        if number == 0:
            raise ConfigError(f"run {run} has no committed round yet", fix="wait for its first round")
        data = self._runs.adapter(run, number)
        row = next(each for each in view.rounds if each.round == number)
        yield pb.AdapterChunk(adapter=_adapter_message(view, row, self._released_as(run).get(number, ())))
        for piece in split(data):
            yield pb.AdapterChunk(data=piece)

    @allow("admin", action="adapters promote")
    def PromoteAdapter(self, request: pb.PromoteAdapterRequest, context: grpc.ServicerContext) -> pb.Release:  # noqa: N802
        row = self._releases.promote(request.run, request.round, request.name, caller(context).name)
        return self._release_message(row, current=True)

    @allow("admin", "auditor")
    def ListReleases(  # noqa: N802
        self, request: pb.ListReleasesRequest, _context: grpc.ServicerContext
    ) -> pb.ListReleasesReply:
        seen: set[str] = set()
        reply = pb.ListReleasesReply()
        for row in self._releases.all(request.name):
            if row.name not in seen or request.history:
                reply.releases.append(self._release_message(row, current=row.name not in seen))
            seen.add(row.name)
        return reply

    def _release_message(self, row: PromotionRow, *, current: bool) -> pb.Release:
        view = self._runs.show(row.run)
        committed = next(each for each in view.rounds if each.round == row.round)
        return pb.Release(
            name=row.name,
            adapter=_adapter_message(view, committed, self._released_as(row.run).get(row.round, ())),
            promoted_by=row.promoted_by,
            promoted_at=row.promoted_at,
            current=current,
        )

    @allow("admin", "auditor")
    def ListAdminLog(  # noqa: N802
        self, request: pb.ListAdminLogRequest, _context: grpc.ServicerContext
    ) -> Iterator[pb.AdminLogEntry]:
        for row in self.log.entries(request.after):
            yield pb.AdminLogEntry(
                seq=row.seq,
                kind=row.kind,
                body=row.body,
                prev_hash=row.prev_hash,
                hash=row.hash,
                signature=row.signature,
                created_at=row.created_at,
            )


def serve(home: ServerHome) -> grpc.Server:
    """Start the server; the caller stops it.

    Raises:
        ConfigError: the port cannot be used.
    """
    settings = home.settings()
    server = grpc.server(
        running_pool(WORKERS, "control"),
        options=[("grpc.max_receive_message_length", MAX_REQUEST_BYTES), ("grpc.so_reuseport", 0)],
        maximum_concurrent_rpcs=4 * WORKERS,
    )
    add_ControlServicer_to_server(Control(home), server)
    credentials = grpc.ssl_server_credentials(
        [(home.server_key.read_bytes(), home.server_certificate.read_bytes())],
        root_certificates=home.ca.read_bytes(),
        require_client_auth=True,
    )
    address = host_and_port(settings.control_host, settings.control_port)
    try:
        server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"[server] control_port: {address} cannot be used", fix="free the port or choose another"
        ) from error
    server.start()
    return server


def main() -> int:
    """`python -m fl_server.control.service --home H`, as the supervisor starts it."""
    parser = argparse.ArgumentParser(prog="fl_server.control.service")
    parser.add_argument("--home", required=True, type=Path)
    if os.environ.get("GRPC_SSL_CIPHER_SUITES") != TLS_1_2_CIPHERS:
        os.environ["GRPC_SSL_CIPHER_SUITES"] = TLS_1_2_CIPHERS  # read when gRPC is imported, so begin again
        os.execv(sys.executable, [sys.executable, "-m", "fl_server.control.service", *sys.argv[1:]])  # noqa: S606
    home = ServerHome.open(parser.parse_args().home)
    set_up("control")
    over = StopRequest()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    server = serve(home)
    over.wait()
    server.stop(3.0).wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
