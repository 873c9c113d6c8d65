"""Runs in SQL: one contract, on SQLite and on PostgreSQL."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fl_server.artifacts.local import LocalArtifacts
from fl_server.control.messages import run_message
from fl_server.db.models import RUN_STATES, RunRow, SiteRow
from fl_server.db.store import Store
from fl_server.runs.commits import Commits
from fl_server.runs.events import Events
from fl_server.runs.service import Runs
from fl_server.runs.views import CommittedRound, Reply
from fl_shared.adapters.safetensors import digest, pack
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConcordatError, ConfigError, RunError
from helpers.postgres import fresh_schema
from helpers.specs import run_spec


def _spec(name: str = "demo", *, rounds: int = 3, sites: tuple[str, ...] = ("h-1", "h-2"), quorum: int = 1) -> RunSpec:
    return run_spec(name=name, sites=sites, rounds=rounds, quorum=quorum)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A migrated, empty database of each kind, with two enrolled sites, one invited, one revoked."""
    if request.param == "sqlite":
        made = Store(f"sqlite:///{tmp_path / 'c.sqlite'}")
    else:
        made = Store(fresh_schema(request.getfixturevalue("postgresql")))
    made.migrate()
    made.migrate()
    with made.write() as session:
        for site, state in (("h-1", "enrolled"), ("h-2", "enrolled"), ("h-3", "invited"), ("h-4", "revoked")):
            session.add(SiteRow(site=site, state=state, invited_at=1.0))
    yield made
    made.close()


@pytest.fixture
def runs(store: Store) -> Runs:
    """The service on that database."""
    return Runs(store)


@pytest.fixture
def artifacts(tmp_path: Path) -> LocalArtifacts:
    """Where committed rounds lie."""
    return LocalArtifacts(tmp_path / "artifacts")


@pytest.fixture
def commits(store: Store, artifacts: LocalArtifacts, tmp_path: Path) -> Commits:
    """Its committed rounds."""
    return Commits(store, artifacts, tmp_path / "adapters")


@pytest.fixture
def events(store: Store) -> Events:
    """Its events."""
    return Events(store)


def _done(round: int, value: float = 1.0, attempt: str = "a1") -> CommittedRound:
    return CommittedRound(
        run="demo",
        attempt=attempt,
        round=round,
        adapter=pack({"w": np.full(2, value, np.float32)}),
        replies=[
            Reply("h-1", "ok", epsilon_spent_total=0.5 * round, delta=1e-5, document_json='{"n": 1}'),
            Reply("h-2", "refused", code="budget-exhausted", message="nothing left"),
        ],
        received_bytes=100,
        seconds=1.5,
    )


def test_a_launched_run_is_pending_and_reads_back_equal(runs: Runs) -> None:
    """The stored spec is the launched spec, digest and all."""
    spec = _spec()
    view = runs.launch(spec)
    assert (view.row.state, view.committed, view.spec) == ("pending", 0, spec)
    assert view.row.spec_digest == spec.digest
    assert [row.run for row in runs.active()] == ["demo"]


def test_a_name_is_taken_once(runs: Runs) -> None:
    """A second run of the same name is refused, also after the first has ended."""
    runs.launch(_spec())
    runs.stop("demo")
    with pytest.raises(RunError, match="already") as caught:
        runs.launch(_spec())
    assert caught.value.code == "name-taken"


@pytest.mark.parametrize(("site", "word"), [("h-4", "revoked"), ("h-9", "unknown")])
def test_revoked_and_unknown_sites_take_no_part(runs: Runs, site: str, word: str) -> None:
    """The site that cannot take part is named, with its state; nothing is stored."""
    with pytest.raises(RunError, match=word) as caught:
        runs.launch(_spec(sites=("h-1", site)))
    assert site in caught.value.message
    assert runs.all() == []


def test_an_invited_site_may_be_named_if_the_others_reach_the_quorum(runs: Runs) -> None:
    """It joins when it has enrolled; a run that could not commit its first round is refused."""
    sites = ("h-1", "h-2", "h-3")
    with pytest.raises(RunError, match="the quorum is 3") as caught:
        runs.launch(_spec(sites=sites, quorum=3))
    assert "2 of 3 sites" in caught.value.message
    assert runs.all() == []
    assert runs.launch(_spec(sites=sites, quorum=2)).row.state == "pending"


def test_a_late_reply_is_kept_with_its_receipt_once(runs: Runs, commits: Commits, events: Events) -> None:
    """It replaces "missing" and nothing else; the receipt is among the receipts, the round stays as it was."""
    runs.launch(_spec(sites=("h-1", "h-2")))
    runs.begin_attempt("demo", "a1")
    done = _done(1)
    commits.commit(dataclasses.replace(done, replies=[done.replies[0], Reply("h-2", "missing", "no-answer", "slow")]))
    late = Reply("h-2", "late", "late", "after its round", epsilon_spent_total=0.5, delta=1e-5, document_json="{}")
    assert commits.record_late("demo", 1, late)
    assert not commits.record_late("demo", 1, late)
    assert not commits.record_late("demo", 1, dataclasses.replace(late, site="h-1"))
    assert not commits.record_late("demo", 2, late)
    assert [(each.site, each.status) for each in runs.show("demo").replies] == [("h-1", "ok"), ("h-2", "late")]
    assert [each.site for each in commits.receipts("", "demo")] == ["h-1", "h-2"]
    assert [each.kind for each in events.after("demo", 0)].count("reply-late") == 1


def test_rounds_are_committed_with_their_replies_and_complete_the_run(
    runs: Runs, commits: Commits, events: Events
) -> None:
    """After the last round the run is completed; the history holds every reply."""
    runs.launch(_spec(rounds=2))
    runs.begin_attempt("demo", "a1")
    commits.commit(_done(1, 1.0))
    assert commits.last_adapter("demo")[0] == 1
    commits.commit(_done(2, 2.0))
    view = runs.show("demo")
    assert (view.row.state, view.committed) == ("completed", 2)
    assert [(r.round, r.site, r.status) for r in view.replies] == [
        (1, "h-1", "ok"), (1, "h-2", "refused"), (2, "h-1", "ok"), (2, "h-2", "refused"),
    ]  # fmt: skip
    number, adapter = commits.last_adapter("demo")
    assert (number, digest(adapter)) == (2, view.rounds[1].adapter_digest)
    kinds = [event.kind for event in events.after("demo", 0)]
    assert kinds == ["launched", "started", "round-committed", "round-committed", "completed"]
    assert [receipt.round for receipt in commits.receipts("h-1", "demo")] == [1, 2]
    assert commits.receipts("h-2", "") == []


def test_a_committed_round_is_never_replaced(runs: Runs, commits: Commits) -> None:
    """A round that is done twice neither changes the row nor the file."""
    runs.launch(_spec())
    runs.begin_attempt("demo", "a1")
    commits.commit(_done(1, 1.0))
    before = commits.adapter("demo", 1)
    with pytest.raises(RunError, match="committed already"):
        commits.commit(_done(1, 9.0))
    assert commits.adapter("demo", 1) == before


def test_of_two_commits_at_once_one_wins(runs: Runs, commits: Commits) -> None:
    """Two processes that commit the same round at the same moment leave one round, whose file fits its row."""
    runs.launch(_spec())
    runs.begin_attempt("demo", "a1")
    start, errors = threading.Barrier(4), list[str]()

    def attempt(value: float) -> None:
        start.wait()
        try:
            commits.commit(_done(1, value))
        except RunError as error:
            errors.append(error.message)

    threads = [threading.Thread(target=attempt, args=(float(i),)) for i in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(errors) == 3
    assert commits.last_adapter("demo")[0] == 1


def _move_to_where_earlier_versions_had_it(artifacts: LocalArtifacts, digest: str, earlier: Path) -> Path:
    """Let a home look as one of a version before `artifacts/`; the file's path there."""
    earlier.parent.mkdir(parents=True, exist_ok=True)
    return artifacts.path(digest).rename(earlier)


@pytest.mark.parametrize("earlier", [False, True])
def test_an_adapter_that_was_changed_on_disk_is_not_used(
    runs: Runs, commits: Commits, artifacts: LocalArtifacts, tmp_path: Path, earlier: bool
) -> None:
    """A damaged or missing file is an error that names it, never a silent start from something else."""
    runs.launch(_spec())
    runs.begin_attempt("demo", "a1")
    commits.commit(_done(1))
    path = artifacts.path(digest(_done(1).adapter))
    if earlier:
        path = _move_to_where_earlier_versions_had_it(
            artifacts, digest(_done(1).adapter), tmp_path / "adapters" / "demo" / "1.safetensors"
        )
    assert commits.last_adapter("demo") == (1, _done(1).adapter)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RunError, match="not the adapter that was committed") as caught:
        commits.last_adapter("demo")
    assert path.name in caught.value.message
    path.unlink()
    with pytest.raises(RunError, match=digest(_done(1).adapter).removeprefix("sha256:")):
        commits.adapter("demo", 1)
    with pytest.raises(ConfigError, match="no committed round 2"):
        commits.adapter("demo", 2)


def test_a_run_of_an_earlier_version_goes_on_where_its_files_are(
    runs: Runs, commits: Commits, artifacts: LocalArtifacts, tmp_path: Path
) -> None:
    """Its committed round is read from `adapters/`, the next one is kept in `artifacts/`, and both are found."""
    runs.launch(_spec())
    runs.begin_attempt("demo", "a1")
    commits.commit(_done(1))
    old = tmp_path / "adapters" / "demo" / "1.safetensors"
    _move_to_where_earlier_versions_had_it(artifacts, digest(_done(1).adapter), old)
    commits.commit(_done(2, 2.0))
    assert commits.adapter("demo", 1) == _done(1).adapter
    assert commits.last_adapter("demo") == (2, _done(2, 2.0).adapter)
    assert list((tmp_path / "adapters").rglob("*.safetensors")) == [old]


_MOVES = {
    "stop": ({"pending", "running", "paused"}, "stopped"),
    "pause": ({"pending", "running"}, "paused"),
    "resume": ({"paused", "stopped", "failed"}, "pending"),
}


@pytest.mark.parametrize("verb", list(_MOVES))
def test_each_verb_works_from_its_states_only(runs: Runs, store: Store, verb: str) -> None:
    """stop, pause and resume move exactly the states of the drawing; from others they say what they need."""
    runs.launch(_spec())
    allowed, becomes = _MOVES[verb]
    for state in RUN_STATES:
        with store.write() as session:
            session.get_one(RunRow, "demo").state = state
        if state in allowed:
            assert getattr(runs, verb)("demo").row.state == becomes
        else:
            with pytest.raises(ConcordatError, match=state):
                getattr(runs, verb)("demo")
            assert runs.show("demo").row.state == state
    with pytest.raises(RunError, match="no run 'nothing'"):
        getattr(runs, verb)("nothing")


def test_a_failure_after_the_end_changes_nothing(runs: Runs, commits: Commits) -> None:
    """A launcher that notices late that Flower's run has died does not undo a completion, nor carries it on."""
    runs.launch(_spec(rounds=1))
    runs.begin_attempt("demo", "a1")
    commits.commit(_done(1))
    runs.fail("demo", "too late", "quorum-missed")
    with pytest.raises(RunError, match="completed"):
        runs.begin_attempt("demo", "a2")
    row = runs.show("demo").row
    assert (row.state, row.reason, row.attempt) == ("completed", "", "a1")


def test_only_the_latest_attempt_counts(runs: Runs, commits: Commits, artifacts: LocalArtifacts) -> None:
    """A ServerApp that lives on after it was replaced has no say: no sign of life, no commit, no file."""
    runs.launch(_spec())
    assert runs.begin_attempt("demo", "a0") == 0
    assert runs.begin_attempt("demo", "a1") == 0  # Flower never took a0
    runs.carried_by("demo", "a1", "7")
    assert runs.beat("demo", "a1")
    assert runs.begin_attempt("demo", "a2") == 1
    assert not runs.beat("demo", "a1")
    assert not runs.wanted("demo", "a1")
    with pytest.raises(RunError) as caught:
        commits.commit(_done(1))
    assert caught.value.code == "superseded"
    assert not artifacts.has(digest(_done(1).adapter))
    runs.carried_by("demo", "a1", "8")
    assert runs.show("demo").row.flower_run == ""
    runs.carried_by("demo", "a2", "8")
    commits.commit(_done(1, attempt="a2"))
    assert runs.begin_attempt("demo", "a3") == 1  # a committed round starts the count anew


@pytest.mark.parametrize("verb", ["pause", "stop"])
def test_a_round_that_ends_after_a_pause_is_done_again_after_the_resume(
    runs: Runs, verb: str, commits: Commits
) -> None:
    """The last round that ends while the run is held is not committed; the resumed run completes it."""
    runs.launch(_spec(rounds=1))
    runs.begin_attempt("demo", "a1")
    getattr(runs, verb)("demo")
    assert not runs.wanted("demo", "a1")
    with pytest.raises(RunError):
        commits.commit(_done(1))
    runs.resume("demo")
    with pytest.raises(RunError):
        commits.commit(_done(1))
    assert runs.begin_attempt("demo", "a2") == 0
    commits.commit(_done(1, attempt="a2"))
    assert runs.show("demo").row.state == "completed"


def test_events_are_read_in_order_and_from_where_one_left_off(runs: Runs, events: Events) -> None:
    """A watcher that reads in small pieces misses nothing and sees nothing twice."""
    runs.launch(_spec())
    runs.launch(_spec("other"))
    for number in range(7):
        events.note("demo", "mark", str(number))
        events.note("other", "mark", "x")
    seen, after = list[str](), 0
    while page := events.after("demo", after, limit=3):
        seen += [event.message for event in page if event.kind == "mark"]
        after = page[-1].number
    assert seen == [str(number) for number in range(7)]


def test_a_reason_has_a_code_beside_its_words(runs: Runs, commits: Commits, events: Events) -> None:
    """Whoever reads a run need not parse English: in its row, its event and on the wire; a completed one has none."""
    runs.launch(_spec(rounds=1))
    assert (runs.show("demo").row.reason_code, run_message(runs.show("demo")).reason_code) == ("", "")
    runs.fail("demo", "round 1 has 0 of the 1 replies it needs (h-1: policy: no)", "quorum-missed")
    assert run_message(runs.show("demo")).reason_code == "quorum-missed"
    told = {event.kind: json.loads(event.data_json) for event in events.after("demo", 0)}
    assert told == {"launched": {}, "failed": {"code": "quorum-missed"}}
    for verb in ("resume", "pause", "resume", "stop", "resume"):
        assert getattr(runs, verb)("demo").row.reason_code == "by-admin"
    runs.begin_attempt("demo", "a1")
    runs.fail("demo", "x" * 5000, "y" * 500)
    assert runs.show("demo").row.reason_code == "y" * 64
    runs.resume("demo")
    runs.begin_attempt("demo", "a1")
    commits.commit(_done(1))
    row = runs.show("demo").row
    assert (row.state, row.reason, row.reason_code) == ("completed", "", "")
