"""The server optimizer's state: committed with the round, found again after a crash, and never another one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fl_server.aggregation import RoundAggregate
from fl_server.db.models import SiteRow
from fl_server.db.store import Store
from fl_server.runs.service import CommittedRound, Reply, Runs
from fl_shared.adapters.safetensors import Tensors
from fl_shared.documents.manifest import RunSpec
from fl_shared.errors import RunError
from helpers.specs import run_spec

SITES = ("h-1", "h-2", "h-3")


def _spec(name: str, rounds: int = 4) -> RunSpec:
    return run_spec(sites=SITES, rounds=rounds, quorum=3, aggregation=name)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    """Runs in SQLite, with three enrolled sites."""
    store = Store(f"sqlite:///{tmp_path / 'c.sqlite'}")
    store.migrate()
    with store.write() as session:
        for site in SITES:
            session.add(SiteRow(site=site, state="enrolled", invited_at=1.0))
    yield Runs(store, tmp_path / "adapters")
    store.close()


def _update(number: int, site: int) -> Tensors:
    rng = np.random.default_rng([number, site])
    return {"w": rng.normal(size=(3, 4)).astype(np.float32), "head": rng.normal(size=2).astype(np.float32)}


def _aggregate(spec: RunSpec, number: int, base: bytes, state: bytes, folder: Path) -> tuple[bytes, bytes]:
    collected = RoundAggregate(spec, base, state, folder)
    for site in range(3):
        collected.add(_update(number, site))
    return collected.finish()


def _one_round(runs: Runs, spec: RunSpec) -> CommittedRound:
    """What a ServerApp does that knows nothing but what was committed."""
    number, base = runs.last_adapter("demo")
    state = runs.server_state("demo", number, base)
    adapter, after = _aggregate(spec, number + 1, base, state, runs.adapter_folder("demo"))
    replies = [Reply(site, "ok") for site in SITES]
    return CommittedRound("demo", "a1", number + 1, adapter, replies, 100, 1.0, after)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_a_run_resumed_after_every_round_is_the_undisturbed_one(runs: Runs, name: str, tmp_path: Path) -> None:
    """Four rounds, each begun from what is on disk and one of them computed twice, end in the very same bytes."""
    spec = _spec(name)
    runs.launch(spec)
    runs.begin_attempt("demo", "a1")
    for number in range(1, 5):
        done = _one_round(runs, spec)
        if number == 3:  # died after aggregating, with the state written and the round not committed
            (runs.adapter_folder("demo") / "3.state.safetensors").write_bytes(b"half of it")
            done = _one_round(runs, spec)
        runs.commit(done)
    base, state = b"", b""
    for number in range(1, 5):
        base, state = _aggregate(spec, number, base, state, tmp_path)
    assert runs.last_adapter("demo") == (4, base)
    assert runs.server_state("demo", 4, base) == state


def test_a_run_without_an_optimizer_has_no_state(runs: Runs) -> None:
    """Under fedavg nothing is written beside the adapter."""
    spec = _spec("fedavg")
    runs.launch(spec)
    runs.begin_attempt("demo", "a1")
    runs.commit(_one_round(runs, spec))
    assert [path.name for path in runs.adapter_folder("demo").iterdir()] == ["1.safetensors"]
    assert runs.server_state("demo", *runs.last_adapter("demo")) == b""
    assert runs.server_state("demo", 0, b"") == b""


def test_a_damaged_or_missing_state_stops_the_run(runs: Runs) -> None:
    """Another state than the committed one is not used, and its absence is not taken for a first round."""
    spec = _spec("fedadam")
    runs.launch(spec)
    runs.begin_attempt("demo", "a1")
    runs.commit(_one_round(runs, spec))
    path = runs.adapter_folder("demo") / "1.state.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RunError, match="is not the state that was committed"):
        _one_round(runs, spec)
    path.unlink()
    with pytest.raises(RunError, match=r"1\.state\.safetensors"):
        _one_round(runs, spec)
    path.write_bytes(whole)
    runs.commit(_one_round(runs, spec))
