"""The calls of the control API. Admins may do everything here, auditors may read.

Nothing here asks who calls: every call goes through `fl_server.control.calls`, which checks the role and records what
an admin does, other than look, before it takes effect.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc

from fl_server.access.log import AdminLog
from fl_server.control.calls import caller
from fl_server.control.messages import (
    adapter_message,
    entry_message,
    event_message,
    plan_message,
    promotion_message,
    run_message,
    site_message,
)
from fl_server.db.models import ENDED, PromotionRow
from fl_server.db.store import Store
from fl_server.flower.superlink import Flower
from fl_server.home.layout import ServerHome
from fl_server.identity.authority import Authority
from fl_server.identity.rotation import coordinator_key
from fl_server.identity.sites import Sites
from fl_server.operations.supervisor import read_state
from fl_server.registry.promotions import Promotions
from fl_server.runs.commits import Commits
from fl_server.runs.events import Events
from fl_server.runs.plans import Plans
from fl_server.runs.service import Runs
from fl_shared import __version__
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConcordatError, ConfigError
from fl_shared.identity.signing import SigningKey
from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.chunks import split
from fl_shared.wire.control_pb2_grpc import ControlServicer

MAX_WATCHERS = 16
MAX_PLANNERS = 8
WATCH_POLL_S = 0.5
PLAN_POLL_S = 0.25


def _spec(text: str) -> RunSpec:
    return RunSpec.from_text(text, where="the run spec")


class Control(ControlServicer):  # type: ignore[misc,unused-ignore]  # generated without types
    """The calls of `control.proto`."""

    def __init__(self, home: ServerHome, store: Store) -> None:
        self._home = home
        self._log = AdminLog.of(home, store)
        self._plans = Plans(store)
        self._sites = Sites(store)
        self._runs = Runs(store)
        self._events = Events(store)
        self._commits = Commits.of(home, store)
        self._promotions = Promotions(store, self._runs, self._commits)
        self._ca_sha256 = Authority.load(home.ca_key, home.ca).sha256
        self._started_at = time.time()
        self._watchers = threading.BoundedSemaphore(MAX_WATCHERS)
        self._planners = threading.BoundedSemaphore(MAX_PLANNERS)

    def Status(self, _request: pb.StatusRequest, _context: grpc.ServicerContext) -> pb.StatusReply:  # noqa: N802
        state = read_state(self._home)
        return pb.StatusReply(
            version=__version__,
            coordinator_key=coordinator_key(self._home),
            started_at=self._started_at,
            components=[
                pb.ComponentState(name=component["name"], state=component["state"], address=component["address"])
                for component in state["components"]
            ],
            sites=sum(1 for row in self._sites.all() if row.state == "enrolled"),
            running_runs=len(self._runs.active()),
        )

    def InviteSite(self, request: pb.InviteSiteRequest, _context: grpc.ServicerContext) -> pb.InviteSiteReply:  # noqa: N802
        invitation = self._sites.invite(request.site, ca_sha256=self._ca_sha256, ttl_s=request.ttl_s)
        return pb.InviteSiteReply(site=invitation.site, token=invitation.token, expires_at=invitation.expires_at)

    def ListSites(self, _request: pb.ListSitesRequest, _context: grpc.ServicerContext) -> pb.ListSitesReply:  # noqa: N802
        return pb.ListSitesReply(sites=[site_message(row) for row in self._sites.all()])

    def ShowSite(self, request: pb.SiteRequest, _context: grpc.ServicerContext) -> pb.Site:  # noqa: N802
        site = site_message(self._sites.get(request.site))
        going = [view for view in self._runs.all() if view.row.state not in ENDED]
        site.runs.extend(view.row.run for view in going if request.site in view.spec.run.sites)
        newest = self._commits.newest_receipt(request.site)
        if newest is not None:
            site.epsilon_spent_total, site.delta = newest.epsilon_spent_total, newest.delta
        return site

    def RevokeSite(self, request: pb.SiteRequest, _context: grpc.ServicerContext) -> pb.Site:  # noqa: N802
        return site_message(self._sites.revoke(request.site, Flower(self._home)))

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
        reported: set[str] = set()
        while context.is_active():
            over = time.time() > plan.expires_at
            for site, view in self._plans.answers(plan).items():
                if site not in reported:
                    reported.add(site)
                    yield plan_message(view, spec)
            if over or len(reported) == len(plan.asked):
                break
            time.sleep(PLAN_POLL_S)
        for site in plan.asked:
            if site not in reported:
                yield plan_message(self._plans.silent(site), spec)

    def LaunchRun(self, request: pb.LaunchRunRequest, _context: grpc.ServicerContext) -> pb.Run:  # noqa: N802
        return run_message(self._runs.launch(_spec(request.spec_toml), force=request.force))

    def ListRuns(self, _request: pb.ListRunsRequest, _context: grpc.ServicerContext) -> pb.ListRunsReply:  # noqa: N802
        return pb.ListRunsReply(runs=[run_message(view, history=False) for view in self._runs.all()])

    def ShowRun(self, request: pb.RunRequest, _context: grpc.ServicerContext) -> pb.Run:  # noqa: N802
        return run_message(self._runs.show(request.run))

    def WatchRun(self, request: pb.WatchRunRequest, context: grpc.ServicerContext) -> Iterator[pb.Event]:  # noqa: N802
        if not self._watchers.acquire(blocking=False):
            raise ConcordatError("too many watchers", fix="end another `fl-admin runs watch`", code="too-many")
        try:
            after = request.after
            while context.is_active():
                ended = self._runs.show(request.run).row.state in ENDED or request.until_now
                events = self._events.after(request.run, after)
                for event in events:
                    after = event.number
                    if request.site in ("", event.site):
                        yield event_message(event)
                if ended and not events:
                    return
                time.sleep(WATCH_POLL_S)
        finally:
            self._watchers.release()

    def StopRun(self, request: pb.RunRequest, _context: grpc.ServicerContext) -> pb.Run:  # noqa: N802
        return run_message(self._runs.stop(request.run))

    def PauseRun(self, request: pb.RunRequest, _context: grpc.ServicerContext) -> pb.Run:  # noqa: N802
        return run_message(self._runs.pause(request.run))

    def ResumeRun(self, request: pb.RunRequest, _context: grpc.ServicerContext) -> pb.Run:  # noqa: N802
        return run_message(self._runs.resume(request.run))

    def ListReceipts(  # noqa: N802
        self, request: pb.ListReceiptsRequest, _context: grpc.ServicerContext
    ) -> Iterator[pb.ReceiptRecord]:
        for row in self._commits.receipts(request.site, request.run):
            yield pb.ReceiptRecord(document_json=row.document_json, received_at=row.received_at)

    def ListAdapters(self, request: pb.ListAdaptersRequest, _context: grpc.ServicerContext) -> pb.ListAdaptersReply:  # noqa: N802
        view = self._runs.show(request.run)
        names = self._released_as(request.run)
        return pb.ListAdaptersReply(
            adapters=[
                adapter_message(view, row, names.get(row.round, ())) for row in view.rounds if row.state == "committed"
            ]
        )

    def _released_as(self, run: str) -> dict[int, list[str]]:
        """The names under which rounds of a run are current, by round."""
        names: dict[int, list[str]] = {}
        for name, row in self._promotions.current().items():
            if row.run == run:
                names.setdefault(row.round, []).append(name)
        return names

    def GetAdapter(self, request: pb.GetAdapterRequest, _context: grpc.ServicerContext) -> Iterator[pb.AdapterChunk]:  # noqa: N802
        run, number = request.run, request.round
        if request.released_as:
            promotion = self._promotions.find(request.released_as)
            run, number = promotion.run, promotion.round
        view = self._runs.show(run)
        number = number or max((row.round for row in view.rounds if row.state == "committed"), default=0)
        if number == 0:
            raise ConfigError(f"run {run} has no committed round yet", fix="wait for its first round")
        data = self._commits.adapter(run, number)
        row = next(row for row in view.rounds if row.round == number)
        yield pb.AdapterChunk(adapter=adapter_message(view, row, self._released_as(run).get(number, ())))
        for piece in split(data):
            yield pb.AdapterChunk(data=piece)

    def PromoteAdapter(self, request: pb.PromoteAdapterRequest, context: grpc.ServicerContext) -> pb.Release:  # noqa: N802
        row = self._promotions.promote(request.run, request.round, request.name, caller(context).name)
        return self._promotion(row, current=True)

    def ListReleases(  # noqa: N802
        self, request: pb.ListReleasesRequest, _context: grpc.ServicerContext
    ) -> pb.ListReleasesReply:
        named: set[str] = set()
        reply = pb.ListReleasesReply()
        for row in self._promotions.all(request.name):
            if row.name not in named or request.history:
                reply.releases.append(self._promotion(row, current=row.name not in named))
            named.add(row.name)
        return reply

    def _promotion(self, row: PromotionRow, *, current: bool) -> pb.Release:
        view = self._runs.show(row.run)
        committed = next(committed_row for committed_row in view.rounds if committed_row.round == row.round)
        adapter = adapter_message(view, committed, self._released_as(row.run).get(row.round, ()))
        return promotion_message(row, adapter, current=current)

    def ListAdminLog(  # noqa: N802
        self, request: pb.ListAdminLogRequest, _context: grpc.ServicerContext
    ) -> Iterator[pb.AdminLogEntry]:
        for row in self._log.entries(request.after):
            yield entry_message(row)
