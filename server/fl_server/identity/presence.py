"""Whether a site is online: one answer for admins, consoles and plans of a run, from what the gateway has seen.

A round asks the SuperLink itself, which hands the orders out: a site is there while its node's calls are accepted. The
gateway passes each of these calls on and notes what the SuperLink answered, so `is_online` is the same truth, seen
from one step away: at most a few seconds late, and known to every process of the coordinator.
"""

from __future__ import annotations

import time

from fl_server.db.models import SiteRow

ONLINE_S = 90.0


def is_online(row: SiteRow, now: float | None = None) -> bool:
    """Whether a round would reach the site: it is enrolled, and the SuperLink accepted a call of its node lately."""
    now = time.time() if now is None else now
    return row.state == "enrolled" and now - row.node_seen_at < ONLINE_S


def is_heard(row: SiteRow, now: float | None = None) -> bool:
    """Whether anything of the site, its agent or its node, spoke to the gateway lately; whoever is online is heard."""
    now = time.time() if now is None else now
    return is_online(row, now) or now - row.last_seen_at < ONLINE_S
