"""A file is replaced whole or not at all, with the rights that were asked for."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fl_shared.files import write_durably


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize(("umask", "public"), [(0o000, 0o644), (0o022, 0o644), (0o077, 0o600)])
def test_the_umask_takes_rights_and_never_gives_any(tmp_path: Path, umask: int, public: int) -> None:
    """A private file is private under any; a public one is as public as the umask lets it be, or just as asked."""
    os.umask(umask)
    write_durably(tmp_path / "private", b"1")
    write_durably(tmp_path / "public", b"1", mode=0o644)
    write_durably(tmp_path / "exact", b"1", mode=0o640, exact=True)
    write_durably(tmp_path / "new folder" / "private", b"1")
    assert [mode(tmp_path / name) for name in ("private", "public", "exact")] == [0o600, public, 0o640]
    assert mode(tmp_path / "new folder") & 0o077 == 0


def test_rights_are_those_of_the_call_and_not_of_the_file_before(tmp_path: Path) -> None:
    """A secret that replaces a public file is no public one."""
    place = tmp_path / "file"
    place.write_bytes(b"public")
    place.chmod(0o666)
    write_durably(place, b"secret")
    assert (place.read_bytes(), mode(place)) == (b"secret", 0o600)


def test_no_link_is_followed(tmp_path: Path) -> None:
    """What a link at the path names stays as it was; the path is a file then."""
    theirs, place = tmp_path / "theirs", tmp_path / "file"
    theirs.write_bytes(b"theirs")
    place.symlink_to(theirs)
    write_durably(place, b"ours")
    assert (theirs.read_bytes(), place.read_bytes(), place.is_symlink()) == (b"theirs", b"ours", False)


def test_a_disk_that_refuses_leaves_the_old_content_and_nothing_beside_it(tmp_path: Path) -> None:
    """A real process whose system lets it write no more than 1 KB."""
    place = tmp_path / "file"
    place.write_bytes(b"old")
    source = (
        "import pathlib, resource, signal, sys\n"
        "from fl_shared.files import write_durably\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "try:\n    write_durably(pathlib.Path(sys.argv[1]), bytes(1 << 20))\n"
        "except OSError as error:\n    print(error.strerror)\n"
    )
    done = subprocess.run([sys.executable, "-c", source, str(place)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("File too large\n", "")
    assert place.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_the_content_is_on_disk_before_the_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut at any moment leaves one of the two contents: fsync of the file, rename, fsync of the folder."""
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        steps.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_durably(tmp_path / "file", b"new")
    assert steps == ["content", "name", "folder"]
