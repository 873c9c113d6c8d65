"""Backups: consistent while rounds are committed, whole or not at all, from and into PostgreSQL."""

from __future__ import annotations

import io
import json
import stat
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fl_server.access.log import AdminLog, check
from fl_server.artifacts.local import LocalArtifacts
from fl_server.cli.server import main
from fl_server.db.models import EventRow, RoundRow, RunRow
from fl_server.db.store import Store
from fl_server.home.layout import ServerHome
from fl_server.identity.authority import Authority, Identity
from fl_server.operations.backup import MANIFEST, BadBackup, backup, restore
from fl_server.operations.setup import initialise
from fl_shared.adapters.safetensors import digest
from fl_shared.errors import ConfigError
from fl_shared.files import write_durably
from fl_shared.identity.signing import SigningKey

WHO = Identity("admin", "anna", "f" * 64, 2e9)


def commit(home: ServerHome, run: str, number: int) -> None:
    """A committed round as `Runs.commit` leaves it: file first, then its row."""
    data = f"{run} {number}".encode() * 1000
    store = Store(home.database_url())
    with store.write() as session:
        if session.get(RunRow, run) is None:
            session.add(
                RunRow(
                    run=run, state="running", spec_json="{}", spec_digest="", rounds=99, created_at=1.0, updated_at=1.0
                )
            )
            session.flush()
        write_durably(home.adapters / run / f"{number}.safetensors", data)
        session.add(
            RoundRow(run=run, round=number, state="committed", adapter_digest=digest(data), committed_at=float(number))
        )
        session.add(EventRow(run=run, at=1.0, kind="round-committed", round=number))
    store.close()


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    """A coordinator with two committed rounds and files that a backup leaves out."""
    made = initialise(tmp_path / "c", host="127.0.0.1", gateway_port=9443, control_port=9444, admin="admin")
    for number in (1, 2):
        commit(made, "demo", number)
    write_durably(made.logs / "gateway.log", b"a line")
    write_durably(made.supervisor_state, b"{}")
    return made


def rounds(url: str) -> list[int]:
    """Committed rounds of the run."""
    store = Store(url)
    try:
        with store.read() as session:
            return list(session.scalars(sa.select(RoundRow.round).order_by(RoundRow.round)))
    finally:
        store.close()


def test_a_restored_home_is_the_same_coordinator(home: ServerHome, tmp_path: Path) -> None:
    """Keys, certificates, rows and adapters are the same bytes; logs and states of the old life are left out."""
    out = tmp_path / "backup.tar"
    made = backup(home, out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert made.damaged == []
    facts = restore(out, ServerHome(tmp_path / "new"))
    new = ServerHome.open(tmp_path / "new")
    assert facts["runs"] == {"demo": 2}
    assert SigningKey.load(new.signing_key).public_hex == made.coordinator_key
    assert Authority.load(new.ca_key, new.ca).sha256 == made.ca_sha256
    assert rounds(new.database_url()) == [1, 2]
    for path in home.adapters.rglob("*.safetensors"):
        assert (new.root / path.relative_to(home.root)).read_bytes() == path.read_bytes()
    assert not new.logs.exists()
    assert not new.supervisor_state.exists()
    assert {stat.S_IMODE(path.stat().st_mode) for path in new.root.rglob("*") if path.is_file()} == {0o600}
    assert [path.name for path in home.root.iterdir() if path.name.startswith(".")] == []


def test_a_backup_during_commits_holds_every_adapter_that_its_rows_name(home: ServerHome, tmp_path: Path) -> None:
    """While another thread commits rounds, each backup restores to an unbroken prefix with right adapters."""
    over = threading.Event()

    def work() -> None:
        number = 2
        while not over.is_set():
            number += 1
            commit(home, "demo", number)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        held = []
        for number in range(3):
            made = backup(home, tmp_path / f"{number}.tar")
            assert made.damaged == []
            restore(tmp_path / f"{number}.tar", ServerHome(tmp_path / f"new{number}"))
            found = rounds(ServerHome.open(tmp_path / f"new{number}").database_url())
            assert found == list(range(1, len(found) + 1))
            held.append(len(found))
    finally:
        over.set()
        worker.join()
    assert held[-1] > held[0], "nothing was committed meanwhile: the test shows nothing"


def put(home: ServerHome, number: int) -> tuple[Path, Path]:
    """A committed round as this version leaves it, with an optimizer's state; the files of both artifacts."""
    stored = LocalArtifacts(home.artifacts)
    adapter, state = (stored.put(f"{kind} {number}".encode() * 1000) for kind in ("adapter", "state"))
    store = Store(home.database_url())
    with store.write() as session:
        session.add(
            RoundRow(
                run="demo", round=number, state="committed", adapter_digest=adapter, state_digest=state,
                committed_at=float(number),
            )
        )  # fmt: skip
    store.close()
    return stored.path(adapter), stored.path(state)


def test_artifacts_that_rows_name_and_files_of_earlier_versions_are_both_kept(home: ServerHome, tmp_path: Path) -> None:
    """A home that went on under this version has both; what a broken commit left and scratch files are left out."""
    kept = put(home, 3)
    orphan = LocalArtifacts(home.artifacts)
    unnamed = orphan.path(orphan.put(b"of a commit that was broken off"))
    write_durably(home.scratch / "left", b"x")
    made = backup(home, tmp_path / "backup.tar")
    assert made.damaged == []
    restore(tmp_path / "backup.tar", ServerHome(tmp_path / "new"))
    new = ServerHome.open(tmp_path / "new")
    old = [home.adapters / "demo" / f"{number}.safetensors" for number in (1, 2)]
    for path in (*kept, *old):
        assert (new.root / path.relative_to(home.root)).read_bytes() == path.read_bytes()
    assert not (new.root / unnamed.relative_to(home.root)).exists()
    assert not new.scratch.exists()
    kept[1].write_bytes(b"other")
    old[0].unlink()
    damaged = backup(home, tmp_path / "damaged.tar").damaged
    assert kept[1].relative_to(home.root).as_posix() in damaged
    assert len(damaged) == 2


def test_a_damaged_adapter_is_named_and_the_rest_is_kept(home: ServerHome, tmp_path: Path) -> None:
    """A backup of a home that has lost an adapter already is made, and says so."""
    (home.adapters / "demo" / "1.safetensors").write_bytes(b"other")
    made = backup(home, tmp_path / "backup.tar")
    assert made.damaged == ["adapters/demo/1.safetensors"]
    assert restore(tmp_path / "backup.tar", ServerHome(tmp_path / "new"))["damaged"] == made.damaged


def test_a_database_of_a_newer_version_is_refused_with_a_fix(home: ServerHome) -> None:
    """An older coordinator says what to do instead of touching a schema that it does not know."""
    engine = sa.create_engine(home.database_url())
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'v9999'"))
    engine.dispose()
    with pytest.raises(ConfigError, match="v9999") as failure:
        Store(home.database_url()).migrate()
    assert "restore" in failure.value.fix


def _rewrite(path: Path, change: Callable[[str, bytes], list[tuple[str, bytes]]]) -> None:
    """Write the archive again, each member changed, left out or joined by others."""
    with tarfile.open(path) as source:
        members = [(each.name, source.extractfile(each).read()) for each in source]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as sink:
        for name, data in members:
            for new_name, new_data in change(name, data):
                info = tarfile.TarInfo(new_name)
                info.size = len(new_data)
                sink.addfile(info, io.BytesIO(new_data))


def _flip(name: str, data: bytes) -> list[tuple[str, bytes]]:
    return [(name, data[:-1] + bytes([data[-1] ^ 1]))] if name == "adapters/demo/1.safetensors" else [(name, data)]


def _drop(name: str, data: bytes) -> list[tuple[str, bytes]]:
    return [] if name == "tls/ca.key" else [(name, data)]


def _climb(name: str, data: bytes) -> list[tuple[str, bytes]]:
    return [("../outside", data), (name, data)] if name == "server.toml" else [(name, data)]


def _no_manifest(name: str, data: bytes) -> list[tuple[str, bytes]]:
    return [] if name == MANIFEST else [(name, data)]


def _later_format(name: str, data: bytes) -> list[tuple[str, bytes]]:
    return [(name, json.dumps(json.loads(data) | {"format": 2}).encode())] if name == MANIFEST else [(name, data)]


@pytest.mark.parametrize("change", [_flip, _drop, _climb, _no_manifest, _later_format])
def test_a_changed_archive_restores_nothing(home: ServerHome, tmp_path: Path, change: Any) -> None:
    """A flipped bit, a lost, added or climbing member, another format: refused, and nothing is left behind."""
    out = tmp_path / "backup.tar"
    backup(home, out)
    _rewrite(out, change)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadBackup, match="backup"):
        restore(out, ServerHome(tmp_path / "new"))
    assert sorted(tmp_path.iterdir()) == before


def test_an_archive_that_was_cut_off_restores_nothing(home: ServerHome, tmp_path: Path) -> None:
    """Half a file is refused at whatever place it ends."""
    out = tmp_path / "backup.tar"
    backup(home, out)
    whole = out.read_bytes()
    for share in (0.3, 0.7, 0.95):
        out.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(BadBackup):
            restore(out, ServerHome(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(home: ServerHome, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An existing archive, a home that is not empty and a database with rows are refused with a fix."""
    out = tmp_path / "backup.tar"
    assert main(["backup", "--home", str(home.root), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["damaged"] == []
    assert main(["backup", "--home", str(home.root), "--out", str(out)]) == 2
    assert main(["backup", "--home", str(home.root), "--out", str(home.root / "b.tar")]) == 2
    assert main(["restore", str(out), "--home", str(home.root)]) == 2
    assert main(["restore", str(out), "--home", str(tmp_path / "new"), "--database", home.database_url()]) == 2
    assert capsys.readouterr().err.count("fix: ") == 4
    assert not (tmp_path / "new").exists()


def test_a_coordinator_moves_into_postgresql_and_back(
    home: ServerHome, tmp_path: Path, postgresql: sa.engine.URL
) -> None:
    """Restored into PostgreSQL, backed up from there, restored into SQLite: rows, admin log and numbers go on."""
    from helpers.postgres import fresh_schema

    store = Store(home.database_url())
    log = AdminLog.of(home, store)
    with log.recorded(WHO, "LaunchRun", {"run": "demo"}):
        pass
    store.close()
    url = fresh_schema(postgresql)
    backup(home, tmp_path / "1.tar")
    restore(tmp_path / "1.tar", ServerHome(tmp_path / "pg"), database=url)
    moved = ServerHome.open(tmp_path / "pg")
    assert moved.database_url() == url
    assert not moved.database.exists()
    commit(moved, "demo", 3)  # the events' numbers go on after the largest
    store = Store(url)
    with AdminLog.of(moved, store).recorded(WHO, "StopRun", {"run": "demo"}):
        pass
    store.close()
    with pytest.raises(ConfigError, match="has rows"):
        restore(tmp_path / "1.tar", ServerHome(tmp_path / "again"), database=url)
    backup(moved, tmp_path / "2.tar")
    facts = restore(tmp_path / "2.tar", ServerHome(tmp_path / "back"), database="home")
    back = ServerHome.open(tmp_path / "back")
    assert facts["runs"] == {"demo": 3}
    assert back.database_url() == f"sqlite:///{back.database}"
    assert rounds(back.database_url()) == [1, 2, 3]
    store = Store(back.database_url())
    report = check(AdminLog.of(back, store).entries())
    assert (report.entries, report.problems) == (5, [])
    store.close()
