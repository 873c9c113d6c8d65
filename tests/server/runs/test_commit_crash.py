"""kill -9 before every line of a commit: afterwards the round is committed as a whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import func, select

from fl_server.artifacts.local import LocalArtifacts
from fl_server.db.models import EventRow, ReplyRow, RoundRow, SiteRow
from fl_server.db.store import Store
from fl_server.runs.commits import Commits
from fl_server.runs.service import Runs
from fl_server.runs.views import CommittedRound, Reply
from fl_shared.adapters.safetensors import SERVER_STATE, digest, pack
from fl_shared.errors import RunError
from helpers.kills import killed_at_every_line
from helpers.specs import run_spec

STATE = pack({"w": np.full((1, 2), 7, np.float32)})
ADAPTER = pack({"w": np.full(2, 3, np.float32)}, {SERVER_STATE: digest(STATE)})
DONE = CommittedRound("demo", "a1", 1, ADAPTER, [Reply("h-1", "ok", document_json='{"n": 1}')], 10, 1.0, STATE)


def _open(home: Path) -> tuple[Store, Runs, Commits]:
    store = Store(f"sqlite:///{home / 'c.sqlite'}")
    return store, Runs(store), Commits(store, LocalArtifacts(home / "artifacts"), home / "adapters")


def _prepare(home: Path) -> None:
    """A run of one round whose attempt is at work."""
    home.mkdir()
    store, runs, _ = _open(home)
    store.migrate()
    with store.write() as session:
        session.add(SiteRow(site="h-1", state="enrolled", invited_at=1.0))
    runs.launch(run_spec(sites=["h-1"], rounds=1))
    runs.begin_attempt("demo", "a1")
    store.close()


def _commit(home: Path) -> None:
    store, _, commits = _open(home)
    commits.commit(DONE)
    store.close()


@pytest.mark.timeout(300)
def test_a_commit_that_is_killed_at_any_line_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """The next attempt finds the round whole, or does it again; then there is one of everything."""
    committed = broken_off = 0
    _prepare(tmp_path / "prepared")
    for number in killed_at_every_line(
        lambda number: _commit(tmp_path / str(number)),
        ("fl_server/runs/commits.py", "fl_server/artifacts/", "fl_shared/files.py", "fl_server/db/store.py"),
        prepare=lambda number: shutil.copytree(tmp_path / "prepared", tmp_path / str(number)),
    ):
        home = tmp_path / str(number)
        store, runs, commits = _open(home)
        row = runs.show("demo")
        if row.committed:
            committed += 1
            with pytest.raises(RunError, match=r"committed already|no longer valid"):
                commits.commit(DONE)
        else:
            broken_off += 1
            assert commits.last_adapter("demo") == (0, b"")
            assert (row.row.state, row.replies) == ("running", [])
            commits.commit(DONE)
        assert commits.last_adapter("demo") == (1, ADAPTER)
        assert commits.server_state("demo", 1, ADAPTER) == STATE
        assert runs.show("demo").row.state == "completed"
        with store.read() as session:
            counts = [session.scalar(select(func.count()).select_from(table)) for table in (RoundRow, ReplyRow)]
            events = session.scalars(select(EventRow.kind).where(EventRow.kind == "round-committed")).all()
        assert (counts, list(events)) == ([1, 1], ["round-committed"])
        kept = {path.name for path in (home / "artifacts").rglob("*") if path.is_file() and path.name[0] != "."}
        assert kept == {digest(each).removeprefix("sha256:") for each in (ADAPTER, STATE)}
        store.close()
    assert committed > 0
    assert broken_off > 20
