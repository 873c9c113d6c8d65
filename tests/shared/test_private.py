"""Files of one user alone."""

from __future__ import annotations

import os
import socket
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from fl_shared.errors import ConfigError
from fl_shared.files import check_grpc_socket, check_socket, socket_address, sqlite_url
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger.service import Ledger
from fl_shared.runtime.private_files import close_to_others, create_file, open_to_others

STRANGE = ["plain", "a b", "Klinik Süd", "100%", "per%20cent", "what?", "a#b", "it's", 'say "x"', "a@b:c", "日本"]


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """The worst umask that a shell can hand over."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_ledger_and_what_sqlite_puts_beside_it_are_private_whatever_the_umask(tmp_path: Path) -> None:
    """Database, -wal and -shm."""
    ledger = Ledger.open(sqlite_url(tmp_path / "ledger.sqlite"), SigningKey.generate(), "hospital-001")
    dataset = ledger.register_dataset("records", "f" * 64, "record", 1000, 1)
    ledger.set_budget(dataset, 8.0, 1e-5, "officer")
    found = {path.name: mode(path) for path in tmp_path.iterdir()}
    ledger.close()
    assert found == dict.fromkeys(("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"), 0o600)


def test_everything_below_is_closed_and_no_link_is_followed(tmp_path: Path) -> None:
    """Files, directories, sockets and pipes; what a link names stays as it was, and so does an owner's own right."""
    home, outside = tmp_path / "home", tmp_path / "outside"
    outside.mkdir(mode=0o755)
    (outside / "theirs").write_text("x")
    (home / "deep" / "er").mkdir(parents=True)
    (home / "deep" / "file").write_text("x")
    (home / "script").write_text("x")
    (home / "script").chmod(0o755)
    (home / "private").touch(mode=0o600)
    (home / "link").symlink_to(outside / "theirs")
    (home / "deep" / "linked").symlink_to(outside)
    (home / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(home / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "s"))
        expected = {home, home / "deep", home / "deep" / "er", home / "deep" / "file", home / "script", home / "pipe"}
        expected |= {home / "s"}
        assert set(open_to_others(home)) == expected
        assert set(close_to_others(home)) == expected
    assert open_to_others(home) == []
    assert close_to_others(home) == []
    assert mode(home / "script") == 0o700
    assert mode(outside) == 0o755
    assert mode(outside / "theirs") == 0o666


def test_a_created_file_keeps_what_is_there(tmp_path: Path) -> None:
    """Only a missing file is made."""
    (tmp_path / "there").write_text("kept")
    create_file(tmp_path / "there")
    create_file(tmp_path / "new")
    assert (tmp_path / "there").read_text() == "kept"
    assert mode(tmp_path / "new") == 0o600


@pytest.mark.parametrize("name", STRANGE)
def test_a_path_of_any_kind_survives_an_address(tmp_path: Path, name: str) -> None:
    """SQLAlchemy opens the very file; nothing in a socket's address needs a quote."""
    place = tmp_path / name / "ledger.sqlite"
    place.parent.mkdir()
    assert make_url(sqlite_url(place)).database == str(place)
    ledger = Ledger.open(sqlite_url(place), SigningKey.generate(), "hospital-001")
    ledger.close()
    assert sqlite3.connect(place).execute("SELECT count(*) FROM sqlite_master").fetchone() > (0,)
    assert not set(socket_address(place)) & set(" \"'\\?#")


def test_a_socket_path_that_grpc_would_cut_in_two_is_refused() -> None:
    """A comma separates addresses there, also when it is written as %2C."""
    check_socket(Path("/srv/Klinik, Nord/s"), fix="")
    with pytest.raises(ConfigError, match="comma"):
        check_grpc_socket(Path("/srv/Klinik, Nord/s"), fix="another")
    check_grpc_socket(Path("/srv/Klinik; Nord = 1/s"), fix="")


def test_what_code_of_others_left_is_not_walked(tmp_path: Path) -> None:
    """As deep as it likes: an agent starts all the same, and closes what is its own."""
    foreign = tmp_path / "supernode" / "work"
    foreign.mkdir(parents=True)
    tmp_path.chmod(0o700)
    (tmp_path / "mine").touch(0o644)
    (tmp_path / "mine").chmod(0o644)
    here = os.open(foreign, os.O_RDONLY)
    for _ in range(2000):
        os.mkdir("d", 0o777, dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    try:
        foreign.chmod(0o755)
        (tmp_path / "supernode").chmod(0o700)
        assert set(close_to_others(tmp_path, foreign)) == {foreign, tmp_path / "mine"}
        assert open_to_others(tmp_path, foreign) == []
        assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600
        assert foreign.stat().st_mode & 0o777 == 0o700
    finally:
        subprocess.run(["rm", "-rf", str(foreign)], check=True)


def test_a_socket_path_is_measured_in_bytes() -> None:
    """sun_path takes 107; an umlaut takes two."""
    check_socket(Path("/" + "x" * 106), fix="")
    for path in ("/" + "x" * 107, "/" + "ü" * 54):
        with pytest.raises(ConfigError, match="at most 107") as caught:
            check_socket(Path(path), fix="a shorter one")
        assert caught.value.fix == "a shorter one"
