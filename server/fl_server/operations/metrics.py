"""The coordinator's Prometheus metrics, read from its SQL and from the supervisor at each scrape.

Nothing is measured for them: they show what the coordinator has anyway. How long a single site took is not
among them, since the time of a round at a site may depend on its data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fl_server.db.models import ENDED, RUN_STATES, SITE_STATES, ReplyRow, RoundRow, RunRow, SiteRow
from fl_server.db.store import Store

Values = Iterable[tuple[tuple[str, ...], float]]

_GAUGES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("concordat_component_up", "1 while a component of the coordinator is ready.", ("component",)),
    ("concordat_sites", "Sites by state.", ("state",)),
    ("concordat_site_last_seen_timestamp_seconds", "When a site last spoke to the gateway.", ("site",)),
    ("concordat_site_certificate_expiry_timestamp_seconds", "When a site's certificate ends.", ("site",)),
    ("concordat_runs", "Runs by state.", ("state",)),
    ("concordat_run_rounds", "Rounds of each run that has not ended: committed and planned.", ("run", "part")),
    ("concordat_replies", "What sites answered; a refusal has its code.", ("site", "status", "code")),
    ("concordat_epsilon_spent", "Epsilon spent at a site, as its newest receipt says.", ("site",)),
    ("concordat_epsilon_delta", "The delta of that receipt.", ("site",)),
    ("concordat_last_commit_timestamp_seconds", "When the newest round was committed.", ()),
)
_COUNTERS = (
    ("concordat_rounds_committed", "Rounds committed."),
    ("concordat_received_bytes", "Bytes of updates that arrived in committed rounds."),
    ("concordat_round_seconds", "Seconds from the start of committed rounds to their commit."),
)


def _first_rows(session: Session) -> dict[str, Values]:
    sites = list(session.scalars(select(SiteRow)))
    runs = list(session.scalars(select(RunRow)))
    going = {row.run: row.rounds for row in runs if row.state not in ENDED}
    counted = select(RoundRow.run, func.count()).where(RoundRow.state == "committed").group_by(RoundRow.run)
    committed: dict[str, int] = {row[0]: row[1] for row in session.execute(counted)}
    return {
        "concordat_sites": [((state,), sum(row.state == state for row in sites)) for state in SITE_STATES],
        "concordat_site_last_seen_timestamp_seconds": [
            ((row.site,), row.last_seen_at) for row in sites if row.last_seen_at
        ],
        "concordat_site_certificate_expiry_timestamp_seconds": [
            ((row.site,), max(row.certificate_expires_at, row.next_expires_at))
            for row in sites
            if row.state == "enrolled"
        ],
        "concordat_runs": [((state,), sum(row.state == state for row in runs)) for state in RUN_STATES],
        "concordat_run_rounds": [
            pair
            for run, planned in going.items()
            for pair in (((run, "committed"), committed.get(run, 0)), ((run, "planned"), planned))
        ],
    }


def _replies(session: Session) -> dict[str, Values]:
    counted = session.execute(
        select(ReplyRow.site, ReplyRow.status, ReplyRow.code, func.count()).group_by(
            ReplyRow.site, ReplyRow.status, ReplyRow.code
        )
    )
    newest = (
        select(ReplyRow.site, func.max(ReplyRow.received_at).label("at"))
        .where(ReplyRow.delta > 0)
        .group_by(ReplyRow.site)
        .subquery()
    )
    receipts = list(
        session.scalars(
            select(ReplyRow).join(newest, (ReplyRow.site == newest.c.site) & (ReplyRow.received_at == newest.c.at))
        )
    )
    return {
        "concordat_replies": [((site, status, code), number) for site, status, code, number in counted],
        "concordat_epsilon_spent": [((row.site,), row.epsilon_spent_total) for row in receipts],
        "concordat_epsilon_delta": [((row.site,), row.delta) for row in receipts],
    }


class CoordinatorState(Collector):
    """Everything above. `components` gives the supervisor's state of each component."""

    def __init__(self, store: Store, components: Callable[[], list[dict[str, Any]]]) -> None:
        self._store = store
        self._components = components

    def describe(self) -> list[Metric]:
        """The families without values."""
        gauges = [GaugeMetricFamily(name, text, labels=labels) for name, text, labels in _GAUGES]
        return [*gauges, *(CounterMetricFamily(name, text) for name, text in _COUNTERS)]

    def collect(self) -> Iterator[Metric]:
        """The values of now. Raises DatabaseAway when the database does not answer."""
        with self._store.read() as session:
            values = _first_rows(session) | _replies(session)
            totals = session.execute(
                select(
                    func.count(), func.sum(RoundRow.bytes), func.sum(RoundRow.seconds), func.max(RoundRow.committed_at)
                ).where(RoundRow.state == "committed")
            ).one()
        values["concordat_component_up"] = [
            ((component["name"],), float(component["state"] == "ready")) for component in self._components()
        ]
        if totals[3] is not None:
            values["concordat_last_commit_timestamp_seconds"] = [((), totals[3])]
        for name, text, labels in _GAUGES:
            family = GaugeMetricFamily(name, text, labels=labels)
            for labelled, value in values.get(name, ()):
                family.add_metric(list(labelled), value)
            yield family
        for (name, text), total in zip(_COUNTERS, totals[:3], strict=True):
            yield CounterMetricFamily(name, text, value=float(total or 0))


def coordinator_registry(
    store: Store, components: Callable[[], list[dict[str, Any]]], counters: Path
) -> CollectorRegistry:
    """The registry that the coordinator's port shows, with this process's own use of CPU, memory and files.

    `counters` is the folder in which the gateway counts (`fl_server.gateway.traffic`).
    """
    registry = CollectorRegistry()
    if counters.is_dir():
        MultiProcessCollector(registry, str(counters))  # type: ignore[no-untyped-call]  # left untyped
    registry.register(CoordinatorState(store, components))
    ProcessCollector(registry=registry)
    return registry
