"""Lock files, held by real processes that are killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fl_shared.runtime.locks import LockHeld, acquire, locked, look

HOLD = (
    "import pathlib, sys; from fl_shared.runtime.locks import acquire\n"
    "acquire(pathlib.Path(sys.argv[1]), note='an agent'); print(flush=True); input()\n"
)


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def test_one_process_holds_it_and_kill_9_releases_it(tmp_path: Path) -> None:
    """Whoever comes second is told what the first one wrote; after its death the lock is free."""
    path = tmp_path / "agent.lock"
    with held(path) as process:
        with pytest.raises(LockHeld) as caught, locked(path, note="mine"):
            pytest.fail("two hold it")
        assert caught.value.note == "an agent"
        assert look(path) == ("an agent", True)
        process.kill()
        process.wait()
        assert look(path) == ("an agent", False)
    with locked(path, note="me"):
        assert path.read_text() == "me"  # nothing is left of a longer note
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_child_does_not_inherit_it(tmp_path: Path) -> None:
    """A child that outlives the block holds nothing."""
    path = tmp_path / "lock"
    with locked(path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        assert look(path)[1] is False
    finally:
        child.communicate()


def test_a_link_is_no_lock(tmp_path: Path) -> None:
    """A file elsewhere is not emptied because a link in the folder names it."""
    theirs = tmp_path / "theirs"
    theirs.write_text("kept")
    (tmp_path / "lock").symlink_to(theirs)
    with pytest.raises(OSError, match="symbolic link"):
        acquire(tmp_path / "lock")
    assert theirs.read_text() == "kept"
