"""A damaged record, in any column, byte or file: every verb ends in the finding that names it, never in a defect."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fl_shared.audit.cli import main
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import bundle
from fl_shared.ledger.models import metadata
from fl_shared.ledger.receipts import StoredReceipt
from helpers.ledgers import ROUND, SITE, opened, receipt, story

KEY = SigningKey.generate()
COLUMNS = [(table, column) for table in metadata.sorted_tables for column in table.columns]
DAMAGED = 13
SAMPLES = settings(
    max_examples=int(os.environ.get("AUDIT_DAMAGE_EXAMPLES", "25")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Record(NamedTuple):
    """What the tests damage: a site's home, and a bundle and receipts made from it."""

    home: Path
    bundle: Path
    receipts: Path

    @property
    def ledger(self) -> Path:
        """The ledger's file."""
        return self.home / "ledger.sqlite"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """A ledger with a bit of everything, all of it in one file; a bundle of it and the coordinator's receipts."""
    top = tmp_path_factory.mktemp("original")
    made = Record(top / "home", top / "bundle.zip", top / "receipts.json")
    KEY.save(made.home / "keys" / "signing.pem")
    with opened(f"sqlite:///{made.ledger}", KEY) as ledger:
        story(ledger)
        held = ledger.reserve("notes", ROUND, run="third", round=1)
        entry = ledger.settle(held, ROUND, f"sha256:{'7' * 64}")
        kept: list[StoredReceipt] = [receipt(ledger, KEY, entry.seq)]
        fresh = SigningKey.generate()
        ledger.rotate_key(fresh, "DPO", "rotation")
        bundle.write(ledger, made.bundle, kept)
    (made.home / "keys" / "signing.pem").unlink()
    fresh.save(made.home / "keys" / "signing.pem")
    made.receipts.write_text(json.dumps({"receipts": [one.to_dict() for one in kept]}))
    assert {path.name for path in made.home.iterdir()} == {"keys", "ledger.sqlite"}
    return made


@pytest.fixture
def record(original: Record, tmp_path: Path) -> Record:
    """A copy to damage."""
    shutil.copytree(original.home, tmp_path / "home")
    shutil.copy(original.bundle, tmp_path / "bundle.zip")
    shutil.copy(original.receipts, tmp_path / "receipts.json")
    return Record(tmp_path / "home", tmp_path / "bundle.zip", tmp_path / "receipts.json")


def verbs(record: Record, ledger: Path | None = None, name: str = "icd") -> dict[str, list[str]]:
    """The command line of every verb that reads a ledger: the home's, or a bundle."""
    at = ["--site", SITE, "--home", str(record.home), *(["--ledger", str(ledger)] if ledger else [])]
    out = record.home.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    ahead = ["--dataset", name, "--noise", "1", "--sampling", "0.1", "--steps", "8", "--rounds", "1"]
    return {
        "verify": ["verify", *at, "--public-key", KEY.public_hex],
        "budgets": ["budgets", *at],
        "spends": ["spends", *at],
        "runs": ["runs", *at, "--json"],
        "forecast": ["forecast", *at, *ahead],
        "plan": ["plan", *at, *ahead],
        "reconcile": ["reconcile", *at, "--receipts", str(record.receipts)],
        "export": ["export", *at, "--out", str(out / "b.zip")],
        "statement": ["statement", *at, "--out", str(out)],
    }


def ran(capsys: pytest.CaptureFixture[str], line: list[str]) -> tuple[int, str]:
    """Exit code and all that was printed; what was written to files does not matter here."""
    capsys.readouterr()
    code = main(line)
    said = capsys.readouterr()
    return code, said.out + said.err


def force(path: Path, table: str, column: str, row: str, value: Any) -> None:
    """Put a value into one cell, past every guard; the schema looks untouched afterwards."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA foreign_keys = OFF")
    schema = connection.execute("SELECT name, sql FROM sqlite_master WHERE type IN ('trigger', 'table')").fetchall()
    connection.execute("PRAGMA writable_schema = ON")
    for name, sql in schema:
        if sql.startswith("CREATE TRIGGER"):
            connection.execute(f"DROP TRIGGER {name}")
        else:
            bare = re.sub("(?<! IS) NOT NULL", "", sql)
            connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (bare, name))
    connection.close()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("PRAGMA ignore_check_constraints = ON")
    connection.execute(f'UPDATE "{table}" SET "{column}" = {value} WHERE rowid = {row}')
    connection.execute("PRAGMA writable_schema = ON")
    for name, sql in schema:
        if sql.startswith("CREATE TRIGGER"):
            connection.execute(sql)
        else:
            connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (sql, name))
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def damages(column: Any) -> dict[str, str]:
    """SQL for what a cell may come to hold."""
    name = f'"{column.name}"'
    found = {
        "bytes": "x'00ff10'",
        "nothing": "NULL",
        "no text": f"CAST(x'61ff' || CAST({name} AS BLOB) AS TEXT)",
        "huge": "9223372036854775807",
        "negative": "-9223372036854775808",
        "fraction": "0.5",
        "infinite": "9e999",
    }
    if column.type.python_type is str:
        found["flipped"] = f"CASE WHEN {name} IS NULL THEN 'x' ELSE char(unicode({name}) + 1) || substr({name}, 2) END"
        found["longer"] = f"coalesce({name}, '') || char(0) || 'x'"
    if column.nullable:
        del found["nothing"]
    return found


@pytest.mark.parametrize(("table", "column"), COLUMNS, ids=[f"{t.name}.{c.name}" for t, c in COLUMNS])
def test_each_column_whatever_comes_to_stand_in_it(
    record: Record, capsys: pytest.CaptureFixture[str], table: Any, column: Any
) -> None:
    """A flipped character, bytes, NULL, invalid UTF-8, another type, a number out of range: row and column are named.

    Of `entries` the hash covers body and time together, so a change that leaves both readable names the pair.
    """
    whole = record.ledger.read_bytes()
    connection = sqlite3.connect(record.ledger)
    rows = [str(row) for (row,) in connection.execute(f'SELECT rowid FROM "{table.name}" ORDER BY rowid')]
    connection.close()
    row = rows[len(rows) // 2]
    others = itertools.cycle([name for name in verbs(record) if name != "verify"])
    for what, value in damages(column).items():
        if column.primary_key and table.name == "tally_keys" and what not in {"huge", "negative"}:
            continue  # an INTEGER PRIMARY KEY is SQLite's own row number
        record.ledger.write_bytes(whole)
        force(record.ledger, table.name, column.name, row, value)
        if record.ledger.read_bytes() == whole or same(record.ledger, whole, table.name):
            continue  # the column's affinity made the old value of it
        lines = verbs(record)
        code, said = ran(capsys, lines["verify"])
        assert (code, "NOT INTACT" in said) == (DAMAGED, True), (what, said)
        assert any(word in said for word in names(table.name, column.name)), (what, said)
        code, said = ran(capsys, lines[next(others)])
        assert (code, "the record is damaged: " in said) == (DAMAGED, True), (what, said)


def same(path: Path, whole: bytes, table: str) -> bool:
    """Whether the table reads as it did."""
    other = path.with_name("whole.sqlite")
    other.write_bytes(whole)
    rows = []
    for one in (path, other):
        connection = sqlite3.connect(one)
        connection.text_factory = bytes
        rows.append(connection.execute(f'SELECT * FROM "{table}"').fetchall())
        connection.close()
    other.unlink()
    return rows[0] == rows[1]


def names(table: str, column: str) -> tuple[str, ...]:
    """How a finding may call a column."""
    if table == "entries":
        pair = ("column body or created_at",) if column in {"body", "created_at"} else ()
        chained = {"seq": "entries: ", "signature": "its signature", "prev_hash": "prev_hash"}.get(column, "entries.")
        return (f"entries.{column}", f"column {column}", chained, *pair)
    if column in {"seq", "id", "level", "position"}:
        return (table,)
    return (f"{table}.{column}", f"{table}: {column}", f"{table}: row", f"{table}: {column} of node")


@SAMPLES
@given(data=st.data())
def test_any_byte_of_the_file(original: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Any) -> None:
    """Bytes flipped anywhere in the file, or its end cut off: what is said is the finding, or what it was before."""
    whole = original.ledger.read_bytes()
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.integers(0, 9)) == 0:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
    shutil.copytree(original.home, tmp_path / "home")
    record = Record(tmp_path / "home", original.bundle, original.receipts)
    verb = data.draw(st.sampled_from(sorted(verbs(record))))
    expected = ran(capsys, verbs(record)[verb])
    record.ledger.write_bytes(raw)
    check(expected, ran(capsys, verbs(record)[verb]), verb)


def test_each_index_and_each_name_in_the_schema(record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    """An index that points elsewhere, through which rows would go missing, and a schema that is no text: found."""
    whole = record.ledger.read_bytes()
    size = 4096
    leaves = [at for at in range(size, len(whole), size) if whole[at] == 0x0A and whole[at + 3 : at + 5] != b"\0\0"]
    assert len(leaves) > 10
    names_ = [each.start() + 16 for each in re.finditer(b"CREATE TRIGGER|CREATE TABLE", whole)]
    for number, (place, flip) in enumerate([*((at + size - 4, 1) for at in leaves), *((at, 0x80) for at in names_)]):
        raw = bytearray(whole)
        raw[place] ^= flip
        record.ledger.write_bytes(raw)
        lines = verbs(record)
        name = sorted(lines)[number % len(lines)]
        code, said = ran(capsys, lines[name])
        assert (code, "record is damaged" in said or "NOT INTACT" in said) == (DAMAGED, True), (place, name, said)


def check(before: tuple[int, str], after: tuple[int, str], verb: str) -> None:
    code, said = after
    assert "Traceback" not in said
    if after == before:
        return
    if code == DAMAGED:
        assert "the record is damaged" in said or "NOT INTACT" in said or "ledger has schema" in said, said
    else:  # a statement and a bundle say when they were made
        assert (verb in {"statement", "export"}, code) == (True, before[0]), said


@SAMPLES
@given(data=st.data())
def test_any_byte_of_a_bundle(original: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Any) -> None:
    """Bytes flipped anywhere in the archive, or its end cut off."""
    raw = bytearray(original.bundle.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(2, len(raw) - 1))  # without its first two bytes it is no bundle at all
        raw[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.integers(0, 9)) == 0:
        del raw[data.draw(st.integers(2, len(raw) - 1)) :]
    path = tmp_path / "bundle.zip"
    record = Record(original.home, path, original.receipts)
    path.write_bytes(original.bundle.read_bytes())
    verb = data.draw(st.sampled_from([*sorted(set(verbs(record)) - {"statement", "verify"}), "bundle"]))

    def line() -> list[str]:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "b.zip").unlink(missing_ok=True)
        if verb == "bundle":
            return ["verify", str(path), "--public-key", KEY.public_hex]
        return verbs(Record(tmp_path / "home", path, original.receipts), path)[verb]

    expected = ran(capsys, line())
    path.write_bytes(raw)
    code, said = ran(capsys, line())
    if "/tmp/concordat-bundle-" in said:  # where it was unpacked
        assert code in {expected[0], DAMAGED}
        return
    check(expected, (code, said), verb)


def odd() -> st.SearchStrategy[Any]:
    """JSON values that do not belong."""
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 70), 1 << 70),
        st.sampled_from([1e308, -0.5, 10**400, "", "x", "²", "\ud800", "\0", "9" * 5000, [], {}, [[]], {"a": 1}]),
    )


@SAMPLES
@given(data=st.data())
def test_any_value_in_a_bundle_or_in_receipts(
    original: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Any
) -> None:
    """Another value in a line, in a signed body, in bundle.json, or in a receipt: found, or not used."""
    with zipfile.ZipFile(original.bundle) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    which = data.draw(st.sampled_from(["entries.jsonl", "body", "bundle.json", "receipts.json", "receipt"]))
    value = data.draw(odd())

    def put(table: dict[str, Any]) -> dict[str, Any]:
        return table | {data.draw(st.sampled_from(sorted(table))): value}

    if which in {"entries.jsonl", "body"}:
        lines = [json.loads(line) for line in members["entries.jsonl"].splitlines()]
        at = data.draw(st.integers(0, len(lines) - 1))
        change: Callable[[dict[str, Any]], dict[str, Any]] = put
        if which == "body":
            lines[at]["body"] = json.dumps(change(json.loads(lines[at]["body"])), separators=(",", ":"), sort_keys=True)
        else:
            lines[at] = change(lines[at])
        members["entries.jsonl"] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    elif which == "bundle.json":
        members[which] = json.dumps(put(json.loads(members[which]))).encode()
    else:
        document = json.loads(members["receipts.json"])
        row = document["receipts"][0]
        if which == "receipt":
            row["document"]["body"] = put(row["document"]["body"])
        else:
            document["receipts"][0] = put(row)
        members["receipts.json"] = json.dumps(document).encode()
    path, kept = tmp_path / "bundle.zip", tmp_path / "receipts.json"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    kept.write_bytes(members["receipts.json"])
    at = ["--site", SITE, "--home", str(original.home), "--receipts", str(kept)]
    reading = [
        ["verify", str(path), "--public-key", KEY.public_hex],
        ["verify", str(path), "--public-key", KEY.public_hex, "--json"],
        ["reconcile", "--site", SITE, "--ledger", str(path), "--receipts", str(path)],
    ]
    if which in {"receipts.json", "receipt"}:  # else these two read nothing that was changed
        reading += [["verify", *at, "--public-key", KEY.public_hex], ["reconcile", *at, "--json"]]
    for line in reading:
        code, said = ran(capsys, line)
        assert code in {0, DAMAGED}, (line, said)


@SAMPLES
@given(data=st.binary(max_size=40), at=st.integers(0, 3000), cut=st.integers(0, 3000))
def test_any_bytes_in_receipts(
    original: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, at: int, cut: int
) -> None:
    """Bytes written over the middle of a receipts file: the finding, or receipts that say the same."""
    raw = original.receipts.read_bytes()
    path = tmp_path / "receipts.json"
    path.write_bytes(raw[:at] + data + raw[at + cut :])
    for verb in ("verify", "reconcile"):
        line = [verb, "--site", SITE, "--home", str(original.home), "--receipts", str(path)]
        code, said = ran(capsys, line)
        assert code in {0, DAMAGED}, said


@pytest.mark.parametrize(
    "checkpoint", ["²:" + "0" * 64, "9" * 5000 + ":" + "0" * 64, "-1:" + "0" * 64, "1:" + "g" * 64]
)
def test_a_checkpoint_that_is_none(record: Record, capsys: pytest.CaptureFixture[str], checkpoint: str) -> None:
    """Digits of other scripts, endless ones and no hash are refused in words."""
    code, said = ran(capsys, [*verbs(record)["verify"], f"--checkpoint={checkpoint}"])
    assert code == 2
    assert "is not usable" in said


def test_files_that_are_no_text(record: Record, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A key file, a statement and a page of bytes end in words, too."""
    noise = tmp_path / "noise.html"
    noise.write_bytes(b"\xff\xfe\x00" * 50)
    assert ran(capsys, [*verbs(record)["verify"], "--public-key", str(noise)])[0] == 2
    for path in (noise, noise.rename(tmp_path / "noise.json")):
        path.write_bytes(b"\xff\xfe\x00" * 50)
        code, said = ran(capsys, ["statement", "--check", str(path), "--public-key", KEY.public_hex])
        assert code == 2, said


def test_wrong_deeds_that_the_record_truly_tells_can_still_be_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grant beyond the ceiling, signed and whole, is named by verify, and its spends are shown for inquiry."""
    from fl_shared.ledger import Ledger

    monkeypatch.setattr(Ledger, "_admit", lambda *_: None)
    with opened(f"sqlite:///{tmp_path}/ledger.sqlite", KEY) as ledger:
        story(ledger)
        for number in range(20):
            ledger.reserve("icd", ROUND, run="greedy", round=number)
    at = ["--site", SITE, "--home", str(tmp_path)]
    code, said = ran(capsys, ["verify", *at])
    assert (code, "granted beyond the ceiling" in said) == (DAMAGED, True)
    code, said = ran(capsys, ["spends", *at])
    assert (code, "greedy" in said) == (0, True)
