"""Back up a coordinator while it runs, and make a new home of a backup.

An archive is a tar of the home: settings, keys, certificates, artifacts, the database and the SuperLink's, and as its
last member a manifest with the SHA-256 of every other. It holds the private keys: keep it like them.

Why a copy of a running coordinator is consistent: the database is copied first, in one transaction. Whatever it
names (an artifact, a node that Flower knows) was durable before its row was, is never changed afterwards, and is
copied later. An artifact that the copied rows do not name (newer than they are, or left by a commit that was broken
off) is left out: the round that is done again brings it again. The key that signs is copied before the list of its
changes, as `identity.rotation` reads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import sqlite3
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from sqlalchemy import select

from fl_server.artifacts.local import LocalArtifacts
from fl_server.db.copying import copy_sqlite, fill, snapshot
from fl_server.db.models import ENDED, RoundRow, RunRow
from fl_server.db.store import Store
from fl_server.home.layout import ServerHome, ServerSettings
from fl_server.identity.authority import Authority
from fl_shared import __version__
from fl_shared.errors import ConfigError, RunError
from fl_shared.files import sqlite_url, sync_directory
from fl_shared.identity.signing import SigningKey

MANIFEST = "MANIFEST.json"
FORMAT = 1
IN_HOME = "home"
"""Means the SQLite file in the home where a database's address is asked for."""
_TRANSIENT = frozenset(
    {"logs", "run", "attempts", "scratch", "supervisor.json", "supervisor.lock"}
    | {"flower/home", "flower/app", "flower/aside", "flower/superlink.json"}
)  # made again at every start
_SQLITE_MAGIC = b"SQLite format 3\x00"
_BLOCK = 1 << 20
_MAX_MANIFEST_BYTES = 64 << 20

Progress = Callable[[str], None]


class BadBackup(RunError):
    """The archive is damaged, cut off, or none of ours."""

    default_code = "bad-backup"


@dataclass(frozen=True)
class Summary:
    """What an archive holds. `damaged` names artifacts of committed rounds that were missing or changed already."""

    archive: str
    home: str
    created_at: float
    version: str
    files: int
    bytes: int
    coordinator_key: str
    ca_sha256: str
    damaged: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class _Hashing:
    """A file that is read once, its SHA-256 computed on the way."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self._source.read(size)
        self._hash.update(block)
        return block

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def backup(home: ServerHome, out: Path | None, progress: Progress = lambda _: None) -> Summary:
    """Write an archive of `home` to `out` (mode 0600, never overwriting), or to standard output.

    Raises:
        ConfigError: `out` exists already or lies inside the home.
    """
    if out is not None:
        if out.exists():
            raise ConfigError(f"{out} exists already", fix="choose another --out; nothing is ever overwritten")
        if out.resolve().is_relative_to(home.root):
            raise ConfigError(f"{out} lies in the coordinator's home", fix="write it to another disk")
    made_at, stored = time.time(), LocalArtifacts(home.artifacts)
    with tempfile.TemporaryDirectory(prefix=".backup-", dir=home.root) as folder:
        copies = Path(folder)
        progress("database")
        snapshot(home.database_url(), copies / home.database.name)
        with _target(out) as sink, tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            files: dict[str, dict[str, Any]] = {}
            key = home.signing_key.relative_to(home.root).as_posix()
            first = {home.database.name: copies / home.database.name, key: home.signing_key}
            for name, path in first.items():
                progress(name)
                files[name] = _add(archive, name, path)
            rounds = _committed(copies / home.database.name)  # migrates the copy, which is in the archive already
            artifacts = {stored.path(digest) for row in rounds for digest in _digests(row)}
            for name, path in _others(home, copies, set(first), artifacts):
                progress(name)
                with contextlib.suppress(FileNotFoundError):  # a file that was there only for a while
                    files[name] = _add(archive, name, path)
            damaged = _damaged(home, rounds, {name: entry["sha256"] for name, entry in files.items()})
            summary = Summary(
                archive=str(out) if out else "-",
                home=str(home.root),
                created_at=made_at,
                version=__version__,
                files=len(files),
                bytes=sum(entry["bytes"] for entry in files.values()),
                coordinator_key=SigningKey.load(home.signing_key).public_hex,
                ca_sha256=Authority.load(home.ca_key, home.ca).sha256,
                damaged=damaged,
            )
            text = json.dumps({"format": FORMAT, **summary.to_dict(), "files": files}, indent=1).encode()
            (copies / MANIFEST).write_bytes(text)
            _add(archive, MANIFEST, copies / MANIFEST)
    return summary


@contextlib.contextmanager
def _target(out: Path | None) -> Iterator[IO[bytes]]:
    """The archive's file, there under its name only when it is whole and on disk."""
    if out is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    beside = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        os.link(beside, out)  # fails when somebody else has made it meanwhile
        sync_directory(out.parent)
    finally:
        beside.unlink(missing_ok=True)


def _others(home: ServerHome, copies: Path, first: set[str], artifacts: set[Path]) -> Iterator[tuple[str, Path]]:
    """Name in the archive and file to read, without what is in it already and artifacts that no row names."""
    for folder, inner, names in os.walk(home.root, followlinks=True):
        parent = Path(folder).relative_to(home.root)
        inner[:] = sorted(
            name for name in inner if (parent / name).as_posix() not in _TRANSIENT and not name.startswith(".")
        )
        for file in sorted(names):
            name = (parent / file).as_posix()
            path = home.root / name
            left_out = name in _TRANSIENT or name in first or file.startswith(".")
            unnamed = path.is_relative_to(home.artifacts) and path not in artifacts
            if left_out or unnamed or file.endswith(("-wal", "-shm", "-journal")) or not path.is_file():
                continue
            if _is_sqlite(path):
                copy = copies / secrets.token_hex(8)
                copy_sqlite(path, copy)
                path = copy
            yield name, path


def _is_sqlite(path: Path) -> bool:
    with path.open("rb") as source:
        return source.read(len(_SQLITE_MAGIC)) == _SQLITE_MAGIC


def _add(archive: tarfile.TarFile, name: str, path: Path) -> dict[str, Any]:
    with path.open("rb") as source:
        info = tarfile.TarInfo(name)
        status = os.fstat(source.fileno())
        info.size, info.mtime, info.mode = status.st_size, int(status.st_mtime), 0o600
        hashing = _Hashing(source)
        archive.addfile(info, hashing)
    return {"bytes": info.size, "sha256": hashing.hexdigest()}


def _committed(database: Path) -> list[RoundRow]:
    """The committed rounds in a copy of the database."""
    store = Store(sqlite_url(database))
    try:
        store.migrate()
        with store.read() as session:
            return list(session.scalars(select(RoundRow).where(RoundRow.state == "committed")))
    finally:
        store.close()


def _digests(row: RoundRow) -> list[str]:
    return [digest for digest in (row.adapter_digest, row.state_digest) if digest]


def _damaged(home: ServerHome, rounds: list[RoundRow], hashes: dict[str, str]) -> list[str]:
    """Artifacts of committed rounds whose file is missing or is not the one that was committed.

    Rounds of earlier versions have their adapter in `adapters/`.
    """
    stored, damaged = LocalArtifacts(home.artifacts), []
    for row in rounds:
        earlier = f"adapters/{row.run}/{row.round}.safetensors"
        for digest in _digests(row):
            name = stored.path(digest).relative_to(home.root).as_posix()
            if name not in hashes and earlier in hashes:
                name = earlier
            if f"sha256:{hashes.get(name, '')}" != digest:
                damaged.append(name)
    return damaged


def restore(
    archive: Path, home: ServerHome, database: str | None = None, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Make a new home from an archive; it is there as a whole or not at all.

    `database` replaces the address in `server.toml`; `home` means the SQLite file in the home. A database elsewhere
    must be empty.

    Raises:
        ConfigError: the home is not empty, or the database is not.
        BadBackup: a member is missing, added or changed.
    """
    if home.root.exists() and (not home.root.is_dir() or any(home.root.iterdir())):
        raise ConfigError(f"{home.root} is not empty", fix="choose another --home; nothing is ever overwritten")
    staged = ServerHome(home.root.with_name(f".{home.root.name}.{secrets.token_hex(4)}"))
    staged.root.mkdir(parents=True, mode=0o700)
    try:
        manifest = _extract(archive, staged.root, progress)
        if database is not None:
            _set_database(staged.settings_file, "" if database == IN_HOME else database)
        settings = ServerSettings.load(staged.settings_file)
        _check_sqlite(staged.root)
        facts = _going(staged.database)
        if settings.database:
            progress("database")
            fill(staged.database, settings.database)
            staged.database.unlink()
        if home.root.exists():
            home.root.rmdir()
        staged.root.rename(home.root)
    finally:
        shutil.rmtree(staged.root, ignore_errors=True)
    return {
        "home": str(home.root),
        **{name: manifest[name] for name in ("created_at", "version", "coordinator_key", "ca_sha256", "damaged")},
        "files": len(manifest["files"]),
        "runs": facts,
    }


def _extract(archive: Path, root: Path, progress: Progress) -> dict[str, Any]:
    """Write the members below `root` (mode 0600) and hold them against the manifest, which is returned."""
    extracted: dict[str, dict[str, Any]] = {}
    manifest: dict[str, Any] | None = None
    broken = "make sure that the file was copied whole, or take an older backup"
    try:
        with tarfile.open(archive, mode="r|") as source:
            for member in source:
                data = source.extractfile(member) if member.isreg() else None
                if data is None or not _is_safe(member.name) or member.name in extracted or manifest is not None:
                    raise BadBackup(f"{archive} has a member that no backup has: {member.name[:100]!r}", fix=broken)
                if member.name == MANIFEST:
                    manifest = json.loads(data.read(_MAX_MANIFEST_BYTES))
                    continue
                progress(member.name)
                extracted[member.name] = _write(data, root / member.name)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise BadBackup(f"{archive} cannot be read: {error}", fix=broken) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BadBackup(f"{archive} has no manifest of format {FORMAT} at its end", fix=broken)
    wrong = sorted(
        name
        for name in extracted.keys() | manifest["files"].keys()
        if extracted.get(name) != manifest["files"].get(name)
    )
    if wrong:
        raise BadBackup(f"{archive}: {wrong[0]!r} is not what the manifest says ({len(wrong)} in all)", fix=broken)
    return manifest


def _is_safe(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and path.as_posix() == name


def _write(data: IO[bytes], path: Path) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    hashing, size = _Hashing(data), 0
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
        while block := hashing.read(_BLOCK):
            sink.write(block)
            size += len(block)
        sink.flush()
        os.fsync(sink.fileno())
    return {"bytes": size, "sha256": hashing.hexdigest()}


def _set_database(settings: Path, url: str) -> None:
    """Write `[server] database`, or take it out for the SQLite file in the home."""
    lines = [line for line in settings.read_text("utf-8").splitlines() if not re.match(r"\s*database\s*=", line)]
    if url:
        lines.insert(lines.index("[server]") + 1, f"database = {json.dumps(url)}")
    settings.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _check_sqlite(root: Path) -> None:
    for path in sorted(root.rglob("*")):
        if path.is_file() and _is_sqlite(path):
            with contextlib.closing(sqlite3.connect(path)) as connection:
                if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                    raise BadBackup(f"{path.name} in the backup is damaged", fix="take an older backup")


def _going(database: Path) -> dict[str, int]:
    """Runs that have not ended, and their last committed round."""
    store = Store(sqlite_url(database))
    try:
        store.migrate()
        with store.read() as session:
            runs = list(session.scalars(select(RunRow.run).where(RunRow.state.not_in(ENDED))))
            rounds = session.execute(select(RoundRow.run, RoundRow.round).where(RoundRow.state == "committed")).all()
    finally:
        store.close()
    return {run: max((number for name, number in rounds if name == run), default=0) for run in runs}
