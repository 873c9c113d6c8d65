"""Change anything in a ledger behind its back: verification finds it and names it."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fl_shared.errors import ConcordatError, LedgerError
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import stretch
from fl_shared.ledger.models import metadata
from fl_shared.ledger.verify import Checkpoint, Report, verify_ledger
from helpers.ledgers import ROUND, SITE, opened, story

COLUMNS = [(table.name, column.name) for table in metadata.sorted_tables for column in table.columns]
KEY = SigningKey.generate()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with a bit of everything."""
    path = tmp_path_factory.mktemp("original") / "ledger.sqlite"
    with opened(f"sqlite:///{path}", KEY) as ledger:
        story(ledger)
        ledger.rotate_key(SigningKey.generate(), "DPO", "rotation")
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Iterator[tuple[Path, sqlite3.Connection]]:
    """A copy to tamper with, by somebody who owns the file: triggers and checks are out of the way."""
    path = tmp_path / "ledger.sqlite"
    shutil.copy(original, path)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    connection.execute("PRAGMA foreign_keys = OFF")
    yield path, connection
    connection.close()


def without_triggers(connection: sqlite3.Connection, act: Callable[[], object]) -> None:
    """Drop the triggers, act, put them back: the schema looks untouched."""
    triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _sql in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    act()
    for _name, sql in triggers:
        connection.execute(sql)


def found(path: Path, *checkpoints: Checkpoint) -> list[str]:
    report = verify_ledger(f"sqlite:///{path}", SITE, public_key=KEY.public_hex, checkpoints=checkpoints, processes=1)
    return [problem.message for problem in report.problems]


def pinned(path: Path) -> Checkpoint:
    with opened(f"sqlite:///{path}", None) as reader:
        known = reader.checkpoint()
    return Checkpoint(known["entries"], known["head"], known["merkle_root"])


def test_the_original_is_intact(original: Path) -> None:
    """The control: what the tests below tamper with verifies, against its own checkpoint too."""
    assert found(original, pinned(original)) == []


@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_a_changed_value_is_found_in_every_column(
    copy: tuple[Path, sqlite3.Connection], table: str, column: str
) -> None:
    """In each table one value of each column is changed; the report names the table or the entry."""
    path, connection = copy
    rows = connection.execute(f"SELECT rowid, {column} FROM {table} ORDER BY rowid").fetchall()
    rowid, value = rows[len(rows) // 2]
    changed: object
    if isinstance(value, str) and value:
        changed = value[:-1] + ("0" if value[-1] != "0" else "1")
    elif isinstance(value, int | float):
        changed = value + 10_000
    else:
        changed = "2030-01-01T00:00:00.000000Z" if column.startswith("valid") else "x"

    def act() -> None:
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (changed, rowid))

    without_triggers(connection, act)
    problems = found(path)
    assert problems
    named = {"entries": "entr"}.get(table, table)
    assert any(named in problem for problem in problems), problems


@pytest.mark.parametrize("table", [table.name for table in metadata.sorted_tables])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_dropped_row_is_found(copy: tuple[Path, sqlite3.Connection], table: str, place: str) -> None:
    """A row taken out at the beginning, in the middle or at the end of any table is found."""
    path, connection = copy
    known = pinned(path)
    rows = [row for (row,) in connection.execute(f"SELECT rowid FROM {table} ORDER BY rowid")]
    gone = {"first": rows[0], "middle": rows[len(rows) // 2], "last": rows[-1]}[place]
    without_triggers(connection, lambda: connection.execute(f"DELETE FROM {table} WHERE rowid = ?", (gone,)))
    problems = found(path, known)
    assert any({"entries": "entr"}.get(table, table) in problem for problem in problems), problems


def test_swapped_entries_are_found(copy: tuple[Path, sqlite3.Connection]) -> None:
    """Two neighbouring entries in each other's place are found, typed rows and all."""
    path, connection = copy

    def act() -> None:
        for seq, other in ((8, -8), (10, 8), (-8, 10)):
            for table in ("entries", "reservations", "settlements", "tallies"):
                connection.execute(f"UPDATE {table} SET seq = ? WHERE seq = ?", (other, seq))

    without_triggers(connection, act)
    assert any("entry 8" in problem for problem in found(path))


def test_a_duplicated_entry_is_found(copy: tuple[Path, sqlite3.Connection]) -> None:
    """An entry appended once more under the next number is found."""
    path, connection = copy

    def act() -> None:
        last, digest = connection.execute("SELECT seq, hash FROM entries ORDER BY seq DESC").fetchone()
        connection.execute(
            "INSERT INTO entries SELECT ?, kind, body, ?, substr(hash, 2) || 'f', signature, created_at "
            "FROM entries WHERE seq = 9",
            (last + 1, digest),
        )

    without_triggers(connection, act)
    assert any("signature does not fit" in problem for problem in found(path))


def test_a_truncated_ledger_is_found_by_a_checkpoint(copy: tuple[Path, sqlite3.Connection]) -> None:
    """With the last entries gone from all tables the rest is intact; a checkpoint or receipt shows the cut."""
    path, connection = copy
    known = pinned(path)

    def act() -> None:
        for table in ("tallies", "settlements", "reservations", "keys", "budgets", "datasets", "entries"):
            connection.execute(f"DELETE FROM {table} WHERE seq > 16")
        connection.execute("DELETE FROM tally_keys WHERE id NOT IN (SELECT key FROM tallies)")
        connection.execute("DELETE FROM merkle_nodes WHERE (position + 1) << level > 16")

    without_triggers(connection, act)
    assert found(path) == []
    assert any("cut off" in problem for problem in found(path, known))


def test_a_restored_backup_is_found_by_a_checkpoint(tmp_path: Path) -> None:
    """An old copy, continued with other entries under the real key, does not fit what was pinned before."""
    path, backup = tmp_path / "ledger.sqlite", tmp_path / "backup.sqlite"
    url = f"sqlite:///{path}"
    with opened(url, KEY) as ledger:
        story(ledger)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(path, backup)
    with opened(url, KEY) as ledger:
        held = ledger.reserve("icd", ROUND, run="hidden", round=1)
        ledger.settle(held, ROUND, "sha256:hidden")
    known = pinned(path)
    for file in tmp_path.glob("ledger.sqlite*"):
        file.unlink()
    shutil.copy(backup, path)
    with opened(url, KEY) as ledger:
        for number in (1, 2):
            ledger.void(ledger.reserve("icd", ROUND, run="other", round=number), "never read")
    assert found(path) == []
    assert any("rewritten" in problem for problem in found(path, known))


def test_a_ledger_rewritten_with_another_key_is_found(tmp_path: Path) -> None:
    """A whole new ledger under a new key is intact in itself; the auditor's own copy of the key shows it."""
    path = tmp_path / "ledger.sqlite"
    with opened(f"sqlite:///{path}", SigningKey.generate()) as ledger:
        story(ledger)
    assert verify_ledger(f"sqlite:///{path}", SITE, processes=1).intact
    assert any("the auditor knows" in problem for problem in found(path))


def test_dropped_guards_are_found(copy: tuple[Path, sqlite3.Connection]) -> None:
    """A removed trigger, a weakened one and a foreign table in the database are named."""
    path, connection = copy
    connection.execute("DROP TRIGGER settlements_fit")
    connection.execute("DROP TRIGGER entries_refuse_update")
    connection.execute("CREATE TRIGGER entries_refuse_update BEFORE UPDATE ON entries BEGIN SELECT 1; END")
    connection.execute("CREATE TABLE notes (text)")
    assert found(path) == [
        "schema: trigger entries_refuse_update was changed",
        "schema: trigger settlements_fit was removed",
        "schema: table notes does not belong there",
    ]


def test_a_grant_beyond_the_ceiling_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger program that grants everything signs a perfect chain; the replay of the gate finds it."""
    path = tmp_path / "ledger.sqlite"
    with opened(f"sqlite:///{path}", KEY) as ledger:
        story(ledger)
        monkeypatch.setattr(type(ledger), "_admit", lambda *_: None)
        for number in range(20):
            ledger.reserve("icd", ROUND, run="greedy", round=number)
        bare = ledger.register_dataset("bare", "sha256:b", "record", 9, 1)
        with pytest.raises(LedgerError, match="needs its data set and budgets"):
            ledger.reserve(bare, ROUND, run="x", round=1)
        with sqlite3.connect(path) as connection:
            connection.execute("DROP TRIGGER reservations_fit")
        ledger.reserve(bare, ROUND, run="x", round=1)
    problems = found(path)
    assert any("granted beyond the ceiling of 'icd'" in problem for problem in problems)
    assert any("granted without a budget for 'bare'" in problem for problem in problems)


@pytest.mark.usefixtures("processes")
def test_many_stretches_and_processes_agree_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into small stretches over two processes, the verdict and the root are those of one pass."""
    path = tmp_path / "ledger.sqlite"
    with opened(f"sqlite:///{path}", KEY) as ledger:
        story(ledger)
        for number in range(30):
            ledger.void(ledger.reserve("notes", ROUND, run="many", round=number), "never read")
    url = f"sqlite:///{path}"
    whole = verify_ledger(url, SITE, processes=1)
    monkeypatch.setattr(stretch, "LEVEL", 3)
    monkeypatch.setattr(stretch, "SIZE", 8)
    pieces = verify_ledger(url, SITE, processes=2)
    assert pieces == whole
    assert pieces.problems == []


def test_a_ruined_file_is_an_error_in_plain_words(original: Path, tmp_path: Path) -> None:
    """A file that is no database, or one with a page of noise, ends in a LedgerError or a named problem."""
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(LedgerError, match="not a database"):
        verify_ledger(f"sqlite:///{path}", SITE)
    data = bytearray(original.read_bytes())
    reports: list[Report | ConcordatError] = []
    for page in range(2, len(data) // 4096, 7):
        noisy = data.copy()
        noisy[page * 4096 : page * 4096 + 600] = b"\x55" * 600
        path.write_bytes(noisy)
        try:
            reports.append(verify_ledger(f"sqlite:///{path}", SITE, processes=1))
        except ConcordatError as error:
            reports.append(error)
    assert reports
    assert not any(isinstance(report, Report) and report.intact for report in reports)
