"""kill -9 in mid-run, and everything that was promised still holds; `tests/benchmarks/chaos.py` is the long form."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.chaos import Federation, Killer, judge, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

RUN, ROUNDS = "survivor", 3
KILLS = ("serverapp", "agent", "postgresql", "superlink")


@pytest.fixture
def federation() -> Iterator[Federation]:
    """A running coordinator on PostgreSQL and two running sites, in a folder with a short path for sockets."""
    root = Path(tempfile.mkdtemp(prefix="ch-"))
    made = Federation(root, ["hospital-001", "hospital-002"])
    try:
        made.up()
        yield made
    finally:
        made.close()
        shutil.rmtree(root, ignore_errors=True)


def test_a_run_outlives_its_processes(federation: Federation) -> None:
    """ServerApp, agent, PostgreSQL and SuperLink die in one run, which completes by itself.

    No round is counted twice, no site charged twice; what was released is fetched again, not trained again; and
    every adapter is, byte for byte, that of an undisturbed run with the same updates.
    """
    federation.launch(RUN, rounds=ROUNDS, quorum=2)
    killer = Killer(federation, RUN, random.Random(5))
    for number, name in enumerate(KILLS):
        until(lambda: federation.run_row(RUN).committed >= number // 2, f"the run has come to kill {number}")  # noqa: B023 - used at once
        assert killer.kill(name, patience_s=120.0), name
    until(lambda: federation.run_row(RUN).state in ("completed", "failed"), "the run has ended")
    verdict = judge(federation, RUN, ROUNDS)
    assert verdict.problems == []
    assert verdict.figures["adapters_byte_equal"] == ROUNDS
    assert verdict.figures["serverapp_restarts"] >= 2
    assert killer.killed == dict.fromkeys(Killer.NAMES, 0) | dict.fromkeys(KILLS, 1)
