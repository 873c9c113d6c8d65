"""Messages of the control API, made from what is stored."""

from __future__ import annotations

import time

from fl_server.db.models import SiteRow
from fl_server.identity.sites import ONLINE_S
from fl_server.runs.bases import announced
from fl_server.runs.plans import SiteView
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
        online=row.state == "enrolled" and time.time() - row.node_seen_at < ONLINE_S,
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
        objections=[str(each) for each in view.objections],
        last_seen_at=view.last_seen_at,
        document_json=view.answer_json,
    )
