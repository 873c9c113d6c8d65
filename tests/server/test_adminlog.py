"""The admin log, on SQLite and on PostgreSQL: written first, never changed, and no forgery stays unnamed."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from fl_server.access.log import CHAIN, AdminLog, check
from fl_server.db.store import Store
from fl_server.identity.authority import Identity
from fl_shared.errors import ConfigError, RunError, SignatureError
from fl_shared.identity.signing import SigningKey, sign_document
from fl_shared.ledger import chain

ANNA = Identity("admin", "anna", "ab" * 32, 2e9)
COLUMNS = ("seq", "kind", "body", "prev_hash", "hash", "signature", "created_at")


@pytest.fixture
def key() -> SigningKey:
    """The coordinator's signing key."""
    return SigningKey.generate()


@pytest.fixture
def log(store: Store, key: SigningKey) -> AdminLog:
    """A log with three actions: done, refused, and one that was broken off."""
    made = AdminLog(store, lambda: (key, []))
    with made.recorded(ANNA, "sites invite", {"site": "h-1"}):
        pass
    with pytest.raises(RunError), made.recorded(ANNA, "runs launch", {"run": "demo", "spec_sha256": "0" * 64}):
        raise RunError("there is a run 'demo' already", code="name-taken")
    made.begin(ANNA, "runs stop", {"run": "demo"})
    return made


@pytest.fixture
def honest(tmp_path: Path, key: SigningKey) -> Iterator[list[SimpleNamespace]]:
    """The rows of an honest log."""
    made = Store(f"sqlite:///{tmp_path / 'honest.sqlite'}")
    made.migrate()
    log = AdminLog(made, lambda: (key, []))
    for name in ("sites invite", "runs launch"):
        with log.recorded(ANNA, name, {"site": "h-1"}):
            pass
    log.begin(ANNA, "runs stop", {})
    yield _rows(log)
    made.close()


def _rows(log: AdminLog) -> list[SimpleNamespace]:
    return [SimpleNamespace(**{name: getattr(row, name) for name in COLUMNS}) for row in log.entries()]


def _as_superuser(store: Store, *statements: str) -> None:
    """What somebody who owns the database can do: take the triggers away and change what he likes."""
    with store._engine.connect() as connection:
        if store._engine.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
            names = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'trigger'").scalars()
            statements = (*(f"DROP TRIGGER {name}" for name in names), *statements)
        else:
            statements = ("ALTER TABLE admin_log DISABLE TRIGGER USER", *statements)
        for statement in statements:
            connection.exec_driver_sql(statement)
        connection.commit()


def test_an_action_stands_in_the_log_before_it_is_done_and_its_outcome_after(store: Store, key: SigningKey) -> None:
    """Who, what and with which arguments first; then done, refused with the reason, or failed by type alone."""
    log = AdminLog(store, lambda: (key, []))
    with log.recorded(ANNA, "sites revoke", {"site": "h-1", "reason": "key lost"}):
        during = _rows(log)
    assert [row.kind for row in during] == ["genesis", "action"]
    assert json.loads(during[1].body) == {
        "action": "sites revoke",
        "arguments": {"site": "h-1", "reason": "key lost"},
        "role": "admin",
        "name": "anna",
        "fingerprint": "ab" * 32,
    }
    with pytest.raises(ZeroDivisionError), log.recorded(ANNA, "runs stop", {}):
        raise ZeroDivisionError("a text that may quote anything")
    outcomes = [json.loads(row.body) for row in _rows(log) if row.kind == "outcome"]
    assert outcomes == [
        {"of": 2, "result": "done", "code": "", "message": ""},
        {"of": 4, "result": "failed", "code": "defect", "message": "ZeroDivisionError"},
    ]


def test_what_cannot_be_logged_is_not_done(store: Store) -> None:
    """A log that cannot be signed stops the action before it begins."""

    def no_key() -> Any:
        raise SignatureError("the key is gone")

    done = []
    with pytest.raises(SignatureError), AdminLog(store, no_key).recorded(ANNA, "runs stop", {}):
        done.append(1)
    assert done == []


def test_an_honest_log_passes_and_open_actions_are_told(log: AdminLog, key: SigningKey) -> None:
    """Nothing is wrong; the action without an outcome is listed."""
    report = check(_rows(log), public_key=key.public_hex)
    assert report.problems == []
    assert (report.entries, report.open, report.keys) == (6, [6], [key.public_hex])


REFUSED = {
    "change": "UPDATE admin_log SET body = '{}' WHERE seq = 2",
    "delete": "DELETE FROM admin_log WHERE seq = 6",
    "empty": "DELETE FROM admin_log",
    "gap": "INSERT INTO admin_log SELECT 9, kind, body, hash, 'f' || substr(hash, 2), signature, created_at "
    "FROM admin_log WHERE seq = 6",
    "fork": "INSERT INTO admin_log SELECT 7, kind, body, prev_hash, 'f' || substr(hash, 2), signature, created_at "
    "FROM admin_log WHERE seq = 6",
    "sqlite": "REPLACE INTO admin_log SELECT seq, kind, '{}', prev_hash, hash, signature, created_at "
    "FROM admin_log WHERE seq = 6",
    "postgresql": "TRUNCATE admin_log",
}


def test_the_database_refuses_every_change(log: AdminLog, store: Store) -> None:
    """UPDATE, DELETE, REPLACE, TRUNCATE, and a row that does not follow the last one."""
    before = _rows(log)
    for name, statement in REFUSED.items():
        if name in {"sqlite", "postgresql"} - {store._engine.dialect.name}:
            continue
        with pytest.raises(sa.exc.DBAPIError, match=r"refused|must follow"), store.write() as session:
            session.execute(sa.text(statement))
    assert _rows(log) == before


def test_every_changed_column_of_every_row_is_found_and_named(honest: list[SimpleNamespace]) -> None:
    """Whatever is changed behind the triggers' back, its entry is named, down to a signature in capitals."""
    for row in honest:
        for column, changed in {
            "seq": row.seq + 20,
            "kind": "outcome" if row.kind == "action" else "action",
            "body": row.body.replace(":", ": ", 1),
            "prev_hash": "f" * 64,
            "hash": "e" * 64,
            "signature": row.signature.upper(),
            "created_at": "2020-01-01T00:00:00.000000Z",
        }.items():
            assert changed != getattr(row, column)
            forged = copy.deepcopy(honest)
            setattr(forged[row.seq - 1], column, changed)
            problems = check(forged).problems
            assert any(problem.seq == row.seq for problem in problems), (row.seq, column, problems)


def test_a_change_behind_the_triggers_back_is_found(log: AdminLog, store: Store) -> None:
    """The same through the database itself, by somebody who owns it."""
    _as_superuser(store, "UPDATE admin_log SET body = replace(body, 'anna', 'ada') WHERE seq = 4")
    assert "entry 4: its content was changed" in check(_rows(log)).problems[0].message


Forge = Callable[[list[SimpleNamespace], SigningKey], list[SimpleNamespace]]


def _drop_middle(rows: list[SimpleNamespace], _key: SigningKey) -> list[SimpleNamespace]:
    return rows[:2] + rows[3:]


def _drop_first(rows: list[SimpleNamespace], _key: SigningKey) -> list[SimpleNamespace]:
    return rows[1:]


def _swap(rows: list[SimpleNamespace], _key: SigningKey) -> list[SimpleNamespace]:
    rows[2], rows[3] = rows[3], rows[2]
    return rows


def _swap_and_renumber(rows: list[SimpleNamespace], _key: SigningKey) -> list[SimpleNamespace]:
    rows = _swap(rows, _key)
    rows[2].seq, rows[3].seq = rows[3].seq, rows[2].seq
    return rows


def _twice(rows: list[SimpleNamespace], _key: SigningKey) -> list[SimpleNamespace]:
    return rows[:3] + rows[2:]


def _forge_end(rows: list[SimpleNamespace], key: SigningKey) -> list[SimpleNamespace]:
    """Add an entry that fits the chain but is signed by another key."""
    body = json.dumps({"of": 6, "result": "refused", "code": "", "message": ""}, sort_keys=True, separators=(",", ":"))
    message = chain.message_bytes(
        seq=7, kind="outcome", body=body, prev_hash=rows[-1].hash, created_at=rows[-1].created_at, site=CHAIN
    )
    entry = {"seq": 7, "kind": "outcome", "body": body, "prev_hash": rows[-1].hash, "created_at": rows[-1].created_at}
    return [*rows, SimpleNamespace(**entry, hash=hashlib.sha256(message).hexdigest(), signature=key.sign(message))]


@pytest.mark.parametrize(
    ("forge", "named"),
    [
        (_drop_middle, "entries: 3 missing"),
        (_drop_first, "the first entry, which names the key, is missing"),
        (_swap, "entries: 3 missing"),
        (_swap_and_renumber, "entry 3: its content was changed"),
        (_twice, "entries: 3 stands there twice"),
        (_forge_end, "entry 7: its signature does not fit"),
    ],
)
def test_rows_that_are_dropped_swapped_or_added_are_named(
    honest: list[SimpleNamespace], forge: Forge, named: str
) -> None:
    """Whoever rewrites the rows without the key is found out."""
    problems = [problem.message for problem in check(forge(honest, SigningKey.generate())).problems]
    assert any(message.startswith(named) for message in problems), problems


def test_an_end_that_was_cut_off_shows_against_a_noted_head(log: AdminLog, store: Store) -> None:
    """Intact in itself, but not what was noted; nor is a log that was written anew."""
    noted = {6: _rows(log)[5].hash}
    assert check(_rows(log), checkpoints=noted).problems == []
    _as_superuser(store, "DELETE FROM admin_log WHERE seq = 6")
    assert check(_rows(log)).problems == []
    assert "6 was noted before" in check(_rows(log), checkpoints=noted).problems[0].message
    log.begin(ANNA, "runs stop", {"run": "another"})
    assert "the past was rewritten" in check(_rows(log), checkpoints=noted).problems[0].message


def test_a_log_that_somebody_else_signed_from_the_start_shows_against_the_known_key(store: Store) -> None:
    """A forger with the database can only write a whole log of his own; the pinned key finds it."""
    forger, ours = SigningKey.generate(), SigningKey.generate()
    log = AdminLog(store, lambda: (forger, []))
    log.begin(ANNA, "sites invite", {})
    assert check(_rows(log)).problems == []
    assert "the one that you know" in check(_rows(log), public_key=ours.public_hex).problems[0].message


def _change(old: SigningKey, new: SigningKey) -> dict[str, Any]:
    now = time.time()
    body = {"kind": "coordinator-key", "new_key": new.public_hex, "created_at": now, "old_until": now + 60}
    return sign_document(old, body)


def test_the_log_follows_changes_of_the_coordinators_key(store: Store) -> None:
    """Two changes between two entries: vouched for, and good for whoever knows any of the signing keys."""
    first, second, third = (SigningKey.generate() for _ in range(3))
    AdminLog(store, lambda: (first, [])).begin(ANNA, "runs stop", {})
    changes = [_change(first, second), _change(second, third)]
    log = AdminLog(store, lambda: (third, changes))
    log.begin(ANNA, "runs resume", {})
    log.begin(ANNA, "runs pause", {})
    assert [row.kind for row in _rows(log)] == ["genesis", "action", "key", "action", "action"]
    for known in (None, first, third):
        report = check(_rows(log), public_key=known.public_hex if known else None)
        assert report.problems == []
    assert report.keys == [first.public_hex, third.public_hex]


@pytest.mark.parametrize("changes", ["none", "forged", "elsewhere"])
def test_a_key_that_nobody_vouches_for_is_named(store: Store, changes: str) -> None:
    """A key put in place without the old one's word: actions are still logged, and the mark stays for ever."""
    first, second = SigningKey.generate(), SigningKey.generate()
    AdminLog(store, lambda: (first, [])).begin(ANNA, "runs stop", {})
    offered = {
        "none": [],
        "forged": [_change(second, second) | {"key": first.public_hex}],
        "elsewhere": [_change(first, SigningKey.generate())],
    }[changes]
    log = AdminLog(store, lambda: (second, offered))
    log.begin(ANNA, "runs resume", {})
    problems = check(_rows(log)).problems
    assert [problem.seq for problem in problems] == [3]
    assert "without the former key's word" in problems[0].message


def test_entries_written_at_once_make_one_chain(store: Store, key: SigningKey) -> None:
    """Eight threads, five actions each: all are there, one after another, none without its outcome."""
    errors: list[BaseException] = []
    numbers = itertools.count()

    def work() -> None:
        log = AdminLog(store, lambda: (key, []))
        try:
            for _ in range(5):
                with log.recorded(ANNA, "runs pause", {"run": f"r-{next(numbers)}"}):
                    pass
        except BaseException as error:  # noqa: BLE001  # handed to the test
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    report = check(_rows(AdminLog(store, lambda: (key, []))))
    assert (report.entries, report.open, report.problems) == (1 + 8 * 5 * 2, [], [])


def test_a_clock_that_went_back_stops_actions(log: AdminLog, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries must not go back in time; what cannot be logged is refused with the reason."""
    import datetime as dt

    class Yesterday(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:  # type: ignore[override]
            return dt.datetime.now(tz) - dt.timedelta(days=1)

    monkeypatch.setattr("fl_server.access.log.datetime", Yesterday)
    with pytest.raises(Exception, match="the clock says"), log.recorded(ANNA, "runs stop", {}):
        raise ConfigError("it was done")
