"""A broken world: full disks, lost databases, wrong addresses. A clear error, nothing lost, nothing granted."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import sqlalchemy as sa

from fl_shared.errors import ConfigError, LedgerError
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger.verify import verify_ledger
from helpers.ledgers import ROUND, SITE, in_process, opened, with_budget
from helpers.postgres import fresh_schema


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("", "not usable"),
        ("ledger.sqlite", "not usable"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("mysql://user@host/ledger", "names 'mysql'"),
        ("postgresql+asyncpg://host/ledger", "names 'postgresql\\+asyncpg'"),
    ],
)
def test_an_address_that_cannot_hold_a_ledger(key: SigningKey, address: str, word: str) -> None:
    """Addresses of other databases, of memory, or of nothing are refused in words."""
    with pytest.raises(ConfigError, match=word):
        opened(address, key)


def test_a_place_that_cannot_be_written(key: SigningKey, tmp_path: Path) -> None:
    """A directory that does not exist, a directory as a file, and a server that is away: LedgerError."""
    for address in (
        f"sqlite:///{tmp_path}/no/such/ledger.sqlite",
        f"sqlite:///{tmp_path}",
        "postgresql://nobody@127.0.0.1:1/ledger?connect_timeout=2",
    ):
        with pytest.raises(LedgerError):
            opened(address, key)
    with pytest.raises(LedgerError, match="no ledger at"):
        opened(f"sqlite:///{tmp_path}/absent.sqlite", None)


def test_a_password_is_never_shown(key: SigningKey) -> None:
    """An error about a database does not repeat its password."""
    with pytest.raises(LedgerError) as failure:
        opened("postgresql://nobody:hunter2@127.0.0.1:1/ledger?connect_timeout=2", key)
    assert "hunter2" not in failure.value.message
    assert "hunter2" not in failure.value.fix


def test_a_full_disk_grants_nothing(key: SigningKey, tmp_path: Path) -> None:
    """When the file cannot grow, reserve fails with an error; afterwards the ledger is whole and goes on."""
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    with opened(url, key) as ledger:
        with_budget(ledger)

    def work() -> None:
        with opened(url, key) as ledger:
            ledger.reserve("icd", ROUND, run="a", round=1)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            size = max(os.path.getsize(path) for path in tmp_path.iterdir())
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            for number in range(2, 100):
                try:
                    ledger.reserve("icd", ROUND, run="a", round=number)
                except LedgerError as error:
                    os._exit(3 if "disk" in error.message else 4)
            os._exit(5)

    assert in_process(work) == 3
    with opened(url, key) as ledger:
        rounds = [held.round for held in ledger.open_reservations()]
        assert rounds == list(range(1, len(rounds) + 1))
        ledger.reserve("icd", ROUND, run="b", round=1)
    assert verify_ledger(url, SITE).problems == []


@pytest.fixture
def url(postgresql: sa.engine.URL) -> str:
    """PostgreSQL only."""
    return fresh_schema(postgresql)


def test_postgresql_going_away_in_mid_transaction(url: str, key: SigningKey, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is killed between two statements: an error, nothing granted, and the next call works."""
    from fl_shared.ledger import service

    with opened(url, key) as ledger:
        icd = with_budget(ledger)
        head = ledger.head()

        def kill(point: str) -> None:
            if point == "reserve.row":
                other = sa.create_engine(ledger._store.url, isolation_level="AUTOCOMMIT")
                with other.connect() as connection:
                    connection.execute(
                        sa.text(
                            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                            "WHERE state = 'idle in transaction' AND query LIKE '%reservations%'"
                        )
                    )
                other.dispose()

        monkeypatch.setattr(service, "fault", kill)
        with pytest.raises(LedgerError, match=r"terminat|connection|closed"):
            ledger.reserve(icd, ROUND, run="a", round=1)
        monkeypatch.undo()
        assert ledger.head() == head
        assert ledger.open_reservations() == []
        ledger.reserve(icd, ROUND, run="a", round=1)
