"""The launcher: who carries a run is read from SQL and files, so that any launcher knows it."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_server.db.models import SiteRow
from fl_server.db.store import Store
from fl_server.flower.superlink import Flower
from fl_server.home.layout import ServerHome
from fl_server.operations.setup import initialise
from fl_server.operations.supervisor import Supervisor
from fl_server.rounds.launcher import Launcher
from fl_server.rounds.liveness import carrying
from fl_server.runs.events import Events
from fl_server.runs.service import Runs
from helpers.ports import free_port
from helpers.specs import run_spec


class Commands(Flower):
    """Stands for the `flwr` commands; the SuperLink's state is the real file."""

    up = True

    def __init__(self, home: ServerHome) -> None:
        super().__init__(home)
        self.began: list[str] = []

    def answers(self) -> bool:
        return self.up

    def start_run(self, app: Path, config: dict[str, str]) -> str:
        self.began.append(config["attempt"])
        return str(len(self.began))

    def stop_run(self, run_id: str) -> None:
        pass


class Bench:
    """A coordinator's home with a run that is pending."""

    def __init__(self, root: Path) -> None:
        self.home = initialise(
            root / "c", host="127.0.0.1", gateway_port=free_port(), control_port=free_port(), admin="admin"
        )
        self.store = Store(self.home.database_url())
        self.runs = Runs(self.store)
        self.flower = Commands(self.home)
        self.flower.configure(free_port())
        with self.store.write() as session:
            session.add(SiteRow(site="h-1", state="enrolled", invited_at=1.0))
        self.runs.launch(run_spec(sites=["h-1"], rounds=2))

    def tick(self) -> int:
        """One turn of a launcher that was just started; how many ServerApps were asked for so far."""
        Launcher(self.home, self.runs, Events(self.store), self.flower).tick()
        return len(self.flower.began)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A fresh one."""
    made = Bench(tmp_path)
    yield made
    made.store.close()


def test_a_new_launcher_leaves_a_run_alone_whose_serverapp_lives(bench: Bench) -> None:
    """kill -9 of the launcher costs nothing; the death of the ServerApp costs one restart."""
    assert bench.tick() == 1
    with carrying(bench.home.attempts, bench.flower.began[0]):
        assert [bench.tick() for _ in range(3)] == [1, 1, 1]
    assert bench.tick() == 2
    assert bench.runs.show("demo").row.attempt == bench.flower.began[1]
    assert bench.runs.show("demo").row.restarts == 1


def test_another_superlink_means_another_serverapp(bench: Bench) -> None:
    """A ServerApp of the SuperLink that was killed no longer counts; if it still lives, it is ended."""
    assert bench.tick() == 1
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with carrying(bench.home.attempts, bench.flower.began[0]):
            # This process holds the lock in the orphan's place.
            (bench.home.attempts / f"{bench.flower.began[0]}.lock").write_text(str(orphan.pid))
            assert bench.tick() == 1
            bench.flower.configure(free_port())
            assert bench.tick() == 2
        assert orphan.wait(30) == -signal.SIGKILL
    finally:
        orphan.kill()


def test_an_attempt_that_flower_never_took_is_made_again_and_is_no_restart(bench: Bench) -> None:
    """A launcher that died before `flwr run` had answered leaves an attempt that nobody carries."""
    bench.runs.begin_attempt("demo", bench.flower.started() + "0" * 16)
    assert bench.tick() == 1
    assert bench.runs.show("demo").row.restarts == 0


def test_nothing_is_started_while_the_superlink_is_away(bench: Bench) -> None:
    """A SuperLink that takes its time does not use up a run's restarts."""
    bench.flower.up = False
    assert [bench.tick() for _ in range(3)] == [0, 0, 0]
    assert bench.runs.show("demo").row.state == "pending"


def test_the_supervisor_waits_for_its_database(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After a power cut the database may come up last; nothing starts before it is there and migrated."""
    home = Bench(tmp_path).home
    later = tmp_path / "later"
    url = f"sqlite:///{later / 'c.sqlite'}"
    settings = home.settings_file
    settings.write_text(settings.read_text() + f"database = {json.dumps(url)}\n")
    caplog.set_level(logging.WARNING)
    waiting = threading.Thread(target=Supervisor(home)._migrate, daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    later.mkdir()
    waiting.join(60)
    assert not waiting.is_alive()
    assert caplog.text.count("waiting: the coordinator's database cannot be used") == 1
    assert Runs(Store(url)).all() == []
