"""The server optimizer's state: committed with the round, found again after a crash, and never another one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fl_server.aggregation import RoundAggregate
from fl_server.artifacts.local import LocalArtifacts
from fl_server.db.models import SiteRow
from fl_server.db.store import Store
from fl_server.runs.commits import Commits
from fl_server.runs.service import Runs
from fl_server.runs.views import CommittedRound, Reply
from fl_shared.adapters.safetensors import Tensors, digest
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import RunError
from helpers.specs import run_spec

SITES = ("h-1", "h-2", "h-3")


def _spec(name: str, rounds: int = 4) -> RunSpec:
    return run_spec(sites=SITES, rounds=rounds, quorum=3, aggregation=name)


class Bench:
    """Runs in SQLite, with three enrolled sites, and the folders of their artifacts."""

    def __init__(self, root: Path) -> None:
        self.store = Store(f"sqlite:///{root / 'c.sqlite'}")
        self.store.migrate()
        with self.store.write() as session:
            for site in SITES:
                session.add(SiteRow(site=site, state="enrolled", invited_at=1.0))
        self.runs, self.artifacts = Runs(self.store), LocalArtifacts(root / "artifacts")
        self.adapters, self.scratch = root / "adapters", root / "scratch"
        self.commits = Commits(self.store, self.artifacts, self.adapters)

    def begin(self, spec: RunSpec) -> None:
        self.runs.launch(spec)
        self.runs.begin_attempt("demo", "a1")

    def files(self) -> list[Path]:
        """Every artifact, whether or not a row names it."""
        return sorted((self.adapters.parent / "artifacts").glob("*/*"))

    def state_file(self) -> Path:
        """The one artifact that is no committed round's adapter."""
        adapters = {self.artifacts.path(row.adapter_digest) for row in self.runs.show("demo").rounds}
        (path,) = {each for each in self.files() if each not in adapters}
        return path


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """The database and the folders."""
    made = Bench(tmp_path)
    yield made
    made.store.close()


def _update(number: int, site: int) -> Tensors:
    rng = np.random.default_rng([number, site])
    return {"w": rng.normal(size=(3, 4)).astype(np.float32), "head": rng.normal(size=2).astype(np.float32)}


def _aggregate(spec: RunSpec, number: int, base: bytes, state: bytes, folder: Path) -> tuple[bytes, bytes]:
    collected = RoundAggregate(spec, base, state, folder)
    for site in range(3):
        collected.add(_update(number, site))
    return collected.finish()


def _one_round(bench: Bench, spec: RunSpec) -> CommittedRound:
    """What a ServerApp does that knows nothing but what was committed."""
    number, base = bench.commits.last_adapter("demo")
    state = bench.commits.server_state("demo", number, base)
    adapter, after = _aggregate(spec, number + 1, base, state, bench.scratch)
    replies = [Reply(site, "ok") for site in SITES]
    return CommittedRound("demo", "a1", number + 1, adapter, replies, 100, 1.0, after)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_a_run_resumed_after_every_round_is_the_undisturbed_one(bench: Bench, name: str, tmp_path: Path) -> None:
    """Four rounds, each begun from what is on disk and one of them computed twice, end in the very same bytes."""
    spec = _spec(name)
    bench.begin(spec)
    for number in range(1, 5):
        done = _one_round(bench, spec)
        if number == 3:  # died after aggregating, with half the state written and the round not committed
            path = bench.artifacts.path(digest(done.state))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"half of it")
            done = _one_round(bench, spec)
        bench.commits.commit(done)
    base, state = b"", b""
    for number in range(1, 5):
        base, state = _aggregate(spec, number, base, state, tmp_path)
    assert bench.commits.last_adapter("demo") == (4, base)
    assert bench.commits.server_state("demo", 4, base) == state


def test_a_run_without_an_optimizer_has_no_state(bench: Bench) -> None:
    """Under fedavg nothing is written beside the adapter."""
    spec = _spec("fedavg")
    bench.begin(spec)
    bench.commits.commit(_one_round(bench, spec))
    (row,) = bench.runs.show("demo").rounds
    assert bench.files() == [bench.artifacts.path(row.adapter_digest)]
    assert row.state_digest == ""
    assert bench.commits.server_state("demo", *bench.commits.last_adapter("demo")) == b""
    assert bench.commits.server_state("demo", 0, b"") == b""


@pytest.mark.parametrize("earlier", [False, True])
def test_a_damaged_or_missing_state_stops_the_run(bench: Bench, earlier: bool) -> None:
    """Another state than the committed one is not used, and its absence is not taken for a first round; also where
    an earlier version has committed it.
    """
    spec = _spec("fedadam")
    bench.begin(spec)
    bench.commits.commit(_one_round(bench, spec))
    kept = bench.state_file()
    path = kept
    if earlier:
        path = bench.adapters / "demo" / "1.state.safetensors"
        path.parent.mkdir(parents=True)
        kept.rename(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RunError, match="is not the state that was committed"):
        _one_round(bench, spec)
    path.unlink()
    with pytest.raises(RunError, match=kept.name):
        _one_round(bench, spec)
    path.write_bytes(whole)
    bench.commits.commit(_one_round(bench, spec))


def test_what_a_robust_rule_keeps_on_disk_is_nowhere_near_the_artifacts(bench: Bench) -> None:
    """While a median waits for its updates, its file has no name, and the folders of committed rounds are untouched."""
    spec = _spec("median")
    bench.begin(spec)
    collected = RoundAggregate(spec, b"", b"", bench.scratch)
    collected.add(_update(1, 0))
    assert bench.files() == []
    assert not bench.adapters.exists()
    assert list(bench.scratch.iterdir()) == []
