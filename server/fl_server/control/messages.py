"""Messages of the control API, made from what is stored."""

from __future__ import annotations

from collections.abc import Iterable

from fl_server.db.models import AdminLogRow, EventRow, PromotionRow, RoundRow, SiteRow
from fl_server.identity.presence import is_online
from fl_server.runs.bases import announced
from fl_server.runs.plans import SiteView
from fl_server.runs.views import RunView
from fl_shared.documents.spec import RunSpec
from fl_shared.wire import control_pb2 as pb


def site_message(row: SiteRow) -> pb.Site:
    """A site as admins see it."""
    base = announced(row)
    return pb.Site(
        site=row.site,
        state=row.state,
        signing_key=row.signing_key,
        certificate_fingerprint=row.certificate_fingerprint,
        node_key_fingerprint=row.node_key_fingerprint,
        node_id=row.node_id,
        invited_at=row.invited_at,
        enrolled_at=row.enrolled_at,
        certificate_expires_at=row.certificate_expires_at,
        last_seen_at=row.last_seen_at,
        revoked_at=row.revoked_at,
        online=is_online(row),
        base_model=base.digest if base else "",
        base_targets=base.targets if base else (),
        base_announced_at=row.base_announced_at,
    )


def plan_message(view: SiteView, spec: RunSpec) -> pb.SitePlan:
    """One site's answer to a plan, or why there is none."""
    answer = view.answer
    return pb.SitePlan(
        site=view.site,
        status=view.status,
        rounds_asked=spec.run.rounds,
        rounds_affordable=answer.rounds_affordable if answer else 0,
        noise_that_fits=answer.noise_that_fits if answer else 0.0,
        objections=[str(objection) for objection in view.objections],
        last_seen_at=view.last_seen_at,
        document_json=view.answer_json,
    )


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
    rows = {row.round: row for row in view.rounds}
    numbers = sorted(set(rows) | {reply.round for reply in view.replies}) if history else []
    return pb.Run(
        run=view.row.run,
        state=view.row.state,
        reason=view.row.reason,
        reason_code=view.row.reason_code,
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


def event_message(row: EventRow) -> pb.Event:
    """An event of a run."""
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


def adapter_message(view: RunView, row: RoundRow, released_as: Iterable[str] = ()) -> pb.Adapter:
    """The adapter of a committed round, and the names to which it is promoted now."""
    return pb.Adapter(
        run=view.row.run,
        round=row.round,
        digest=row.adapter_digest,
        bytes=row.adapter_bytes,
        committed_at=row.committed_at,
        released_as=sorted(released_as),
    )


def promotion_message(row: PromotionRow, adapter: pb.Adapter, *, current: bool) -> pb.Release:
    """A promotion; `current` unless another one has taken its name since."""
    return pb.Release(
        name=row.name,
        adapter=adapter,
        promoted_by=row.promoted_by,
        promoted_at=row.promoted_at,
        current=current,
    )


def entry_message(row: AdminLogRow) -> pb.AdminLogEntry:
    """An entry of the admin log as it is stored."""
    return pb.AdminLogEntry(
        seq=row.seq,
        kind=row.kind,
        body=row.body,
        prev_hash=row.prev_hash,
        hash=row.hash,
        signature=row.signature,
        created_at=row.created_at,
    )
