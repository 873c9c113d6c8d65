"""An auditor who may only read, beside an agent that writes: he sees every entry, or is told that he cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_shared.audit.cli import main
from fl_shared.errors import LedgerError
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import Ledger
from fl_shared.ledger.verify import verify_ledger
from helpers.ledgers import ROUND, SITE, opened, with_budget

KEY = SigningKey.generate()
AUDITOR = 61007
WRITER = """
import sys
from pathlib import Path
from fl_shared.ledger import Ledger
from fl_shared.privacy.mechanism import Mechanism
from fl_shared.identity.signing import SigningKey
home = Path(sys.argv[1])
step = Mechanism(noise_multiplier=1.0, sampling_probability=0.1, steps=1, clipping_norm=1.0)
with Ledger.open(f"sqlite:///{home}/ledger.sqlite", SigningKey.load(home / "signing.pem"), "hospital-001") as ledger:
    for number, _ in enumerate(sys.stdin, 1):
        ledger.settle(ledger.reserve("icd", step, run="demo", round=number), step, f"sha256:{number}")
        print(number, flush=True)
"""


class Agent:
    """A process that keeps the ledger open, as a site's agent does, and charges a round when it is told to."""

    def __init__(self, home: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def charge(self, rounds: int) -> None:
        """Charge so many rounds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        for _ in range(rounds):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            assert self._process.stdout.readline()

    def kill(self) -> None:
        """Die as in a power cut: the log stays where it is."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)


@pytest.fixture
def home() -> Iterator[Path]:
    """A site's home that others may enter and read, as a careless operator leaves it, with a budget in its ledger."""
    top = Path(tempfile.mkdtemp(prefix="reading-"))
    top.chmod(0o755)
    made = top / "home"
    made.mkdir(mode=0o755)
    KEY.save(made / "signing.pem")
    with opened(f"sqlite:///{made}/ledger.sqlite", KEY) as ledger:
        with_budget(ledger, epsilon=100.0)
    (made / "ledger.sqlite").chmod(0o644)  # made for its owner alone; SQLite's log gets the same mode
    yield made
    made.chmod(0o755)
    shutil.rmtree(top)


@pytest.fixture
def agent(home: Path) -> Iterator[Agent]:
    """The site's agent."""
    made = Agent(home)
    yield made
    made.kill()


def as_auditor(*line: str) -> tuple[int, str]:
    """Run a verb as another user without any right but what the files' modes give; exit code and all that is said.

    In a forked process, because the interpreter itself may lie where that user cannot go. Where the tests are not
    root, the user stays the same and only the files' modes stand in the way.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            for number in (1, 2):
                os.dup2(write, number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(AUDITOR)
                os.setuid(AUDITOR)
            code = main(line)
        except BaseException:  # noqa: BLE001  # the parent shows it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as source:
        said = source.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def seen(home: Path, ledger: Path | None = None) -> tuple[int, str]:
    """How many rounds the auditor finds by `spends` and `verify`; -1 and the words when he is refused."""
    at = ["--site", SITE, "--home", str(home), *(["--ledger", f"sqlite:///{ledger}"] if ledger else [])]
    main(["verify", *at])  # what is imported late is imported here, where it can be read
    code, said = as_auditor("spends", *at, "--json")
    if code:
        return -1, said
    rounds = len(json.loads(said)["spends"])
    code, said = as_auditor("verify", *at, "--json")
    report = json.loads(said)
    assert (code, report["intact"], report["reservations"]) == (0, True, rounds), said
    return rounds, ""


def beside(home: Path) -> set[str]:
    return {path.name for path in home.iterdir()}


@pytest.mark.parametrize("mode", [0o755, 0o555, 0o777])
def test_a_running_agent_is_read_to_its_last_entry(home: Path, agent: Agent, mode: int) -> None:
    """All that the agent charged, whether the auditor might write in the directory or not; nothing is left there."""
    agent.charge(3)
    home.chmod(mode)
    before = beside(home)
    assert {"ledger.sqlite-wal", "ledger.sqlite-shm"} <= before
    assert seen(home) == (3, "")
    agent.charge(2)
    assert seen(home) == (5, "")
    assert beside(home) == before
    agent.charge(1)  # and the agent can go on


@pytest.mark.parametrize("mode", [0o755, 0o555, 0o777])
@pytest.mark.parametrize("shared_memory", [True, False])
def test_what_a_killed_agent_left_in_its_log(home: Path, agent: Agent, mode: int, shared_memory: bool) -> None:
    """The log alone, or with its shared memory, in a directory that may be written or not: every entry is seen."""
    agent.charge(3)
    agent.kill()
    if not shared_memory:
        (home / "ledger.sqlite-shm").unlink()
    home.chmod(mode)
    before = {path.name: path.read_bytes() for path in home.iterdir() if path.name != "ledger.sqlite-shm"}
    assert seen(home) == (3, "")
    after = {path.name: path.read_bytes() for path in home.iterdir() if path.name != "ledger.sqlite-shm"}
    assert after == before


@pytest.mark.parametrize("mode", [0o755, 0o555, 0o777])
def test_a_ledger_at_rest(home: Path, mode: int) -> None:
    """Nobody has it open: it is read as it lies, and no file appears beside it."""
    with opened(f"sqlite:///{home}/ledger.sqlite", KEY) as ledger:
        ledger.settle(ledger.reserve("icd", ROUND, run="demo", round=1), ROUND, "sha256:a")
    home.chmod(mode)
    before = beside(home)
    assert seen(home) == (1, "")
    assert beside(home) == before


@pytest.mark.parametrize("part", ["ledger.sqlite", "ledger.sqlite-wal"])
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")
def test_a_part_that_may_not_be_read_is_named(home: Path, agent: Agent, part: str) -> None:
    """Without the right to read the log the last entries cannot be seen, and that is an error."""
    agent.charge(3)
    (home / part).chmod(0o600)
    code, said = seen(home)
    assert code == -1
    assert f"{part}" in said
    assert "cannot be read by this user" in said


def test_a_log_that_lies_elsewhere_is_missed_by_name(home: Path, agent: Agent) -> None:
    """Through a symbolic link the log is found; through a hard link it is not, and that is said while it is in use."""
    agent.charge(3)
    other = home.parent / "other"
    other.mkdir()
    (other / "soft.sqlite").symlink_to(home / "ledger.sqlite")
    assert seen(home, other / "soft.sqlite") == (3, "")
    os.link(home / "ledger.sqlite", other / "hard.sqlite")
    code, said = as_auditor("spends", "--site", SITE, "--ledger", f"sqlite:///{other}/hard.sqlite")
    assert (code, "is not beside it" in said) == (13, True), said


def test_a_name_with_the_letters_of_an_address(home: Path) -> None:
    """Blanks, number signs and letters beyond ASCII in a path mean themselves."""
    odd = home / "a b#c Größe"
    odd.mkdir()
    shutil.copy(home / "ledger.sqlite", odd / "ledger.sqlite")
    assert main(["budgets", "--site", SITE, "--home", str(odd)]) == 0


def test_a_file_written_to_while_it_is_read_as_it_lay(home: Path) -> None:
    """A page that moved between two reads is an error, not a figure."""
    with Ledger.open(f"sqlite:///{home}/ledger.sqlite", None, SITE) as ledger:
        with sqlite3.connect(home / "ledger.sqlite") as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
        connection.close()
        with pytest.raises(LedgerError, match="written to while"):
            ledger.head()


def test_verification_beside_an_agent_that_writes_all_the_time(home: Path) -> None:
    """Whatever is appended between two of its reads, an intact ledger is never accused."""
    go = home.parent / "stop"
    child = os.fork()
    if child == 0:
        with opened(f"sqlite:///{home}/ledger.sqlite", KEY) as ledger:
            number = 0
            while not go.exists():
                number += 1
                ledger.void(ledger.reserve("icd", ROUND, run="busy", round=number), "never read")
        os._exit(0)
    try:
        sizes: list[int] = []
        over = time.monotonic() + 120  # on a busy machine the other process has to come to its turn first
        while len(sizes) < 15 or (sizes[-1] == sizes[0] and time.monotonic() < over):
            report = verify_ledger(f"sqlite:///{home}/ledger.sqlite", SITE, public_key=KEY.public_hex)
            assert report.problems == []
            sizes.append(report.entries)
    finally:
        go.touch()
        os.waitpid(child, 0)
    assert sizes[-1] > sizes[0]
