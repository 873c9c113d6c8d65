"""A server optimizer and int8 updates through a real coordinator, undisturbed and resumed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fl_server.aggregation import RoundAggregate
from fl_shared.adapters.safetensors import SERVER_STATE, digest, metadata, pack, unpack
from fl_shared.documents.spec import RunSpec
from helpers.coordinators import Coordinator, committed, coordinator, until
from helpers.stand_in_agent import honest_update

SITES = ("h-1", "h-2")
ROUNDS = 3

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def one() -> Iterator[Coordinator]:
    """One coordinator with two sites."""
    with coordinator(*SITES) as made:
        yield made


def _launch(one: Coordinator, name: str) -> RunSpec:
    one.launch(name=name, sites=SITES, rounds=ROUNDS, quorum=2, aggregation="fedadam", wire="int8")
    return RunSpec.from_toml(one.root / f"{name}.toml")


def test_a_paused_and_resumed_run_ends_in_the_bytes_of_an_undisturbed_one(one: Coordinator) -> None:
    """fedadam over int8: three rounds in one go, and three with a new ServerApp in between, give equal bytes, which are
    the aggregation of the encoded updates."""
    spec = _launch(one, "whole")
    shown = one.wait("whole", "completed", "failed")
    assert shown["state"] == "completed", shown
    one.plan("h-2", **{"broken/2": "wait"})
    _launch(one, "broken")
    until(lambda: one.reached("h-2", "broken/2"), "round 2 is asked for")
    one.admin("runs", "pause", "broken")
    one.let_go("h-2")
    one.admin("runs", "resume", "broken")
    shown = one.wait("broken", "completed", "failed")
    assert shown["state"] == "completed", shown
    adapter, state = b"", b""
    for number in range(1, ROUNDS + 1):
        collected = RoundAggregate(spec, adapter, state, one.root)
        for site in SITES:
            collected.add(unpack(pack(honest_update(site, number), wire="int8"), wire="int8"))
        adapter, state = collected.finish()
        assert committed(one.home, "whole", number) == adapter
        assert committed(one.home, "broken", number) == adapter
        assert metadata(adapter)[SERVER_STATE] == digest(state)
    plain = {name: np.zeros_like(value) for name, value in honest_update("h-1", 1).items()}
    for number in range(1, ROUNDS + 1):
        for name, value in plain.items():
            value += np.mean([honest_update(site, number)[name] for site in SITES], axis=0)
    assert not np.allclose(unpack(adapter)["head"], plain["head"])
