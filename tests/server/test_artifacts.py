"""Artifacts on disk: under their digest, whole or not there, and found out when somebody has changed them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fl_server.artifacts.local import UNFINISHED_S, LocalArtifacts
from fl_server.artifacts.store import ArtifactDamaged, ArtifactStore
from fl_shared.adapters.safetensors import digest
from helpers.kills import killed_at_every_line

DATA = b"an adapter" * 1000


@pytest.fixture
def artifacts(tmp_path: Path) -> LocalArtifacts:
    """A store in a home."""
    return LocalArtifacts(tmp_path / "artifacts")


def _files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_what_is_put_is_got_by_its_digest_and_a_repeat_changes_nothing(artifacts: LocalArtifacts) -> None:
    """The digest is the bytes' own, files are 0600 below folders of 0700, and nothing lies beside them."""
    store: ArtifactStore = artifacts
    name = store.put(DATA)
    path = artifacts.path(name)
    before = path.stat()
    assert (name, store.has(name), store.get(name), store.put(DATA)) == (digest(DATA), True, DATA, name)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    root = path.parents[1]
    assert _files(root) == [path]
    assert stat.S_IMODE(before.st_mode) == 0o600
    assert {stat.S_IMODE(each.stat().st_mode) for each in (root, path.parent)} == {0o700}
    assert store.get(store.put(b"")) == b""


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(DATA[:-1])])
def test_a_damaged_artifact_is_named_and_replaced_by_a_put(
    artifacts: LocalArtifacts, harm: Callable[[Path], object]
) -> None:
    """Missing or cut short: an error that names the file; the same bytes put again are whole again."""
    path = artifacts.path(artifacts.put(DATA))
    harm(path)
    with pytest.raises(ArtifactDamaged, match=path.name):
        artifacts.get(digest(DATA))
    assert artifacts.get(artifacts.put(DATA)) == DATA


@pytest.mark.parametrize("name", ["", "sha256:", "../../etc/passwd", "sha256:" + "../" * 22, "sha256:" + "A" * 64])
def test_what_is_no_digest_reaches_no_file(artifacts: LocalArtifacts, name: str) -> None:
    """A row that was tampered with cannot read outside the store."""
    for ask in (artifacts.path, artifacts.get, artifacts.has):
        with pytest.raises(ArtifactDamaged, match="no artifact's digest"):
            ask(name)


def test_many_that_put_the_same_at_once_leave_one_file(artifacts: LocalArtifacts) -> None:
    """Writers beside one another, one file at the end."""
    with ThreadPoolExecutor(8) as pool:
        names = set(pool.map(artifacts.put, [DATA] * 32))
    assert names == {digest(DATA)}
    assert _files(artifacts.path(digest(DATA)).parents[1]) == [artifacts.path(digest(DATA))]


def test_it_is_on_disk_before_put_returns(artifacts: LocalArtifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before it has its name; then every folder up to the home; the folders also on a repeat."""
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    path = artifacts.path(artifacts.put(DATA))
    folders = [str(path.parent), str(path.parents[1]), str(path.parents[2])]
    assert synced[0].startswith(f"{path.parent}/.")
    assert synced[-3:] == folders
    synced.clear()
    artifacts.put(DATA)
    assert synced == folders


def test_a_writer_that_is_killed_at_any_line_leaves_the_artifact_whole_or_not_there(tmp_path: Path) -> None:
    """kill -9 before each line of a put: no file under the digest is half written, and the next put succeeds."""
    deaths = 0
    for number in killed_at_every_line(
        lambda number: LocalArtifacts(tmp_path / str(number) / "artifacts").put(DATA),
        ("fl_server/artifacts/", "fl_shared/files.py"),
        prepare=lambda number: (tmp_path / str(number)).mkdir(),
    ):
        deaths += 1
        after = LocalArtifacts(tmp_path / str(number) / "artifacts")
        if after.has(digest(DATA)):
            assert after.get(digest(DATA)) == DATA
        assert after.get(after.put(DATA)) == DATA
        whole = [path for path in _files(tmp_path / str(number)) if not path.name.startswith(".")]
        assert whole == [after.path(digest(DATA))]
    assert deaths > 20


def test_what_killed_writers_left_goes_away_after_a_day(artifacts: LocalArtifacts) -> None:
    """Not what is being written now, and never an artifact."""
    path = artifacts.path(artifacts.put(DATA))
    old, new = path.with_name(".old.1234"), path.with_name(".new.1234")
    for each, age_s in ((old, UNFINISHED_S + 60), (new, 60.0), (path, UNFINISHED_S + 60)):
        each.touch()
        os.utime(each, (path.stat().st_mtime - age_s,) * 2)
    assert artifacts.remove_unfinished() == 1
    assert sorted(_files(path.parent)) == sorted([new, path])
