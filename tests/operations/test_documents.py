"""docs/operations.md names every metric that exists and no other."""

from __future__ import annotations

import re
from pathlib import Path

from fl_client.metrics.site import Metrics
from fl_server.db.store import Store
from fl_server.gateway import traffic
from fl_server.operations.metrics import coordinator_registry

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text("utf-8")


def documented(title: str) -> set[str]:
    """The names in the first column of the table below `title`."""
    table = TEXT.split(f"\n{title}:\n\n")[1].split("\n\n")[0]
    return {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}


def exported(families: object) -> set[str]:
    """The names of ours as Prometheus shows them; counters end in _total."""
    return {
        family.name + ("_total" if family.type == "counter" else "")
        for family in families  # type: ignore[attr-defined]  # an iterable of families
        if not family.name.startswith("process_")
    }


def test_every_metric_of_the_coordinator_is_documented_and_no_other(tmp_path: Path) -> None:
    """The table equals the registry of a fresh coordinator."""
    store = Store(f"sqlite:///{tmp_path / 'c.sqlite'}")
    store.migrate()
    found = exported(coordinator_registry(store, list, tmp_path / "none").collect())
    found |= exported([*traffic.REQUESTS.describe(), *traffic.BYTES.describe()])  # counted by the gateway
    store.close()
    assert len(found) > 10
    assert found == documented("Coordinator")


def test_every_metric_of_a_site_is_documented_and_no_other() -> None:
    """The table equals the registry of a fresh agent."""
    found = exported(Metrics().registry.collect())
    assert len(found) > 10
    assert found == documented("Site")
