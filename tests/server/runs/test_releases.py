"""Promotions in SQL, on SQLite and on PostgreSQL: the newest one of a name is in force, and none is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fl_server.artifacts.local import LocalArtifacts
from fl_server.db.models import SiteRow
from fl_server.db.store import Store
from fl_server.registry.promotions import Promotions
from fl_server.runs.commits import Commits
from fl_server.runs.service import Runs
from fl_server.runs.views import CommittedRound, Reply
from fl_shared.adapters.safetensors import digest, pack
from fl_shared.errors import ConfigError, RunError
from helpers.specs import run_spec


@pytest.fixture
def artifacts(tmp_path: Path) -> LocalArtifacts:
    """Where committed rounds lie."""
    return LocalArtifacts(tmp_path / "artifacts")


@pytest.fixture
def commits(store: Store, artifacts: LocalArtifacts, tmp_path: Path) -> Commits:
    """A run of three rounds, two of them committed."""
    with store.write() as session:
        session.add(SiteRow(site="h-1", state="enrolled", invited_at=1.0))
    runs, made = Runs(store), Commits(store, artifacts, tmp_path / "adapters")
    runs.launch(run_spec(sites=["h-1"]))
    runs.begin_attempt("demo", "a1")
    for number in (1, 2):
        adapter = pack({"w": np.full(2, number, np.float32)})
        made.commit(CommittedRound("demo", "a1", number, adapter, [Reply("h-1", "ok")], 10, 1.0))
    return made


@pytest.fixture
def promotions(store: Store, commits: Commits) -> Promotions:
    """The service."""
    return Promotions(store, Runs(store), commits)


def test_the_newest_promotion_of_a_name_counts(promotions: Promotions, commits: Commits) -> None:
    """A repeat adds nothing; going back is one promotion more; the history keeps all."""
    assert promotions.promote("demo", 1, "production", "anna").adapter_digest == digest(commits.adapter("demo", 1))
    first = promotions.promote("demo", 0, "production", "ben")
    assert (first.round, promotions.promote("demo", 2, "production", "ada").number) == (2, first.number)
    promotions.promote("demo", 2, "candidate", "ben")
    promotions.promote("demo", 1, "production", "anna")
    assert {name: row.round for name, row in promotions.current().items()} == {"production": 1, "candidate": 2}
    history = [(row.round, row.promoted_by) for row in promotions.all("production")]
    assert history == [(1, "anna"), (2, "ben"), (1, "anna")]
    assert promotions.find("candidate").round == 2


def test_only_a_committed_adapter_that_is_there_can_be_promoted(
    promotions: Promotions, commits: Commits, artifacts: LocalArtifacts
) -> None:
    """No such run, round or name, and a file that is not the committed one: nothing is released."""
    for run, number, name in (("demo", 3, "p"), ("demo", 1, "Not A Name"), ("demo", 1, "")):
        with pytest.raises(ConfigError):
            promotions.promote(run, number, name, "anna")
    with pytest.raises(RunError, match="nobody"):
        promotions.promote("nobody", 1, "p", "anna")
    path = artifacts.path(digest(commits.adapter("demo", 1)))
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(RunError, match="not the adapter that was committed"):
        promotions.promote("demo", 1, "p", "anna")
    assert promotions.all() == []
    with pytest.raises(ConfigError, match="nothing was released"):
        promotions.find("p")
