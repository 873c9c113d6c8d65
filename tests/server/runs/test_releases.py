"""Releases in SQL, on SQLite and on PostgreSQL: the newest promotion of a name counts, and none is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fl_server.db.models import SiteRow
from fl_server.db.store import Store
from fl_server.registry.promotions import Releases
from fl_server.runs.service import CommittedRound, Reply, Runs
from fl_shared.adapters.safetensors import digest, pack
from fl_shared.errors import ConfigError, RunError
from helpers.specs import run_spec


@pytest.fixture
def runs(store: Store, tmp_path: Path) -> Runs:
    """A run of three rounds, two of them committed."""
    with store.write() as session:
        session.add(SiteRow(site="h-1", state="enrolled", invited_at=1.0))
    made = Runs(store, tmp_path / "adapters")
    made.launch(run_spec(sites=["h-1"]))
    made.begin_attempt("demo", "a1")
    for number in (1, 2):
        adapter = pack({"w": np.full(2, number, np.float32)})
        made.commit(CommittedRound("demo", "a1", number, adapter, [Reply("h-1", "ok")], 10, 1.0))
    return made


@pytest.fixture
def releases(store: Store, runs: Runs) -> Releases:
    """The service."""
    return Releases(store, runs)


def test_the_newest_promotion_of_a_name_counts(releases: Releases, runs: Runs) -> None:
    """A repeat adds nothing; going back is one promotion more; the history keeps all."""
    assert releases.promote("demo", 1, "production", "anna").adapter_digest == digest(runs.adapter("demo", 1))
    first = releases.promote("demo", 0, "production", "ben")
    assert (first.round, releases.promote("demo", 2, "production", "ada").number) == (2, first.number)
    releases.promote("demo", 2, "candidate", "ben")
    releases.promote("demo", 1, "production", "anna")
    assert {name: row.round for name, row in releases.current().items()} == {"production": 1, "candidate": 2}
    history = [(row.round, row.promoted_by) for row in releases.all("production")]
    assert history == [(1, "anna"), (2, "ben"), (1, "anna")]
    assert releases.find("candidate").round == 2


def test_only_a_committed_adapter_that_is_there_can_be_promoted(releases: Releases, runs: Runs) -> None:
    """No such run, round or name, and a file that is not the committed one: nothing is released."""
    for run, number, name in (("demo", 3, "p"), ("demo", 1, "Not A Name"), ("demo", 1, "")):
        with pytest.raises(ConfigError):
            releases.promote(run, number, name, "anna")
    with pytest.raises(RunError, match="nobody"):
        releases.promote("nobody", 1, "p", "anna")
    path = runs.adapter_path("demo", 1)
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(RunError, match="not the adapter that was committed"):
        releases.promote("demo", 1, "p", "anna")
    assert releases.all() == []
    with pytest.raises(ConfigError, match="nothing was released"):
        releases.find("p")
