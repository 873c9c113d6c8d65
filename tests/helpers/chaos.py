"""A whole federation of real processes that is killed with kill -9, and what must hold afterwards.

The coordinator's database is PostgreSQL, the sites are real agents with real ledgers and the shipped tiny
model. Nothing in `Verdict` depends on time: it reads the coordinator's SQL, the sites' ledgers, the adapters
and a copy of every update that a site ever stored.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import sqlalchemy as sa

from fl_server.aggregation import RoundAggregate
from fl_server.artifacts.local import LocalArtifacts
from fl_server.rounds.liveness import carrier_pid
from fl_shared.adapters.safetensors import digest, unpack
from fl_shared.documents.spec import RunSpec
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger.service import Ledger
from fl_shared.ledger.verify import verify_ledger
from harness import Coordinator, Site, command
from helpers.postgres import PostgreSQL
from helpers.smallest import smallest_base, smallest_digest
from helpers.specs import site_toml, write_spec

PATIENCE_S = 600.0
RECORDS = 240
STEPS = 2


def until(true: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait for something to become true; AssertionError that names it otherwise."""
    deadline = time.monotonic() + patience_s
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {patience_s:.0f} s: {what}")
        time.sleep(0.3)


class Federation:
    """One coordinator on PostgreSQL and some sites, all as real processes."""

    def __init__(self, root: Path, sites: Sequence[str]) -> None:
        self.root = root
        self.database = PostgreSQL()
        self.coordinator = Coordinator(root)
        self.sites = [Site(name, root) for name in sites]
        self.kept = root / "kept"
        self._engine = sa.create_engine(self.database.url, pool_pre_ping=True)
        self._over = threading.Event()
        self._keeper = threading.Thread(target=self._keep_updates, daemon=True)

    def up(self) -> None:
        """Start everything; every site is enrolled and its agent started."""
        self.coordinator.init()
        settings = self.coordinator.home / "server.toml"
        settings.write_text(settings.read_text() + f"database = {json.dumps(self.database.url)}\n")
        self.coordinator.start(timeout=PATIENCE_S)
        for number, site in enumerate(self.sites):
            data = self.root / f"{site.id}.csv"
            with data.open("w", newline="", encoding="utf-8") as sink:
                rows = [(f"cough {number} day {day}", "AB"[day % 2]) for day in range(RECORDS)]
                csv.writer(sink).writerows([("text", "label"), *rows])
            site.enroll(self.coordinator.url, self.coordinator.invite(site.id))
            site.configure(
                site_toml(
                    site.id,
                    self.coordinator.url,
                    data={"name": "records", "path": data},
                    model={"directory": smallest_base()},
                    budget={"epsilon": 50.0},
                )
            )
            site.start()
            (self.kept / site.id).mkdir(parents=True)
        self._keeper.start()

    def close(self) -> None:
        """End everything, however it stands."""
        self._over.set()
        services = [*(site.service for site in self.sites)]
        if hasattr(self.coordinator, "service"):
            services.append(self.coordinator.service)
        for service in services:
            if service.process is not None:
                kill_tree(service.process.pid)
                service.process.wait()
        self._engine.dispose()
        self.database.close()

    def launch(self, name: str, *, rounds: int, quorum: int) -> None:
        """Launch a run with every site."""
        spec = write_spec(
            self.root / f"{name}.toml",
            name=name,
            base_model=smallest_digest(),
            sites=[site.id for site in self.sites],
            rounds=rounds,
            quorum=quorum,
            sampling_probability=0.05,
            steps_per_round=STEPS,
        )
        self.coordinator.launch(spec)

    def _keep_updates(self) -> None:
        """Link every update that a site stores, before the site deletes it as too old."""
        while not self._over.wait(0.5):
            for site in self.sites:
                for path in (site.home / "releases").glob("*.safetensors"):
                    with contextlib.suppress(OSError):
                        beside = self.kept / site.id / f"{path.stem}-{path.stat().st_ino}.safetensors"
                        if not beside.exists():
                            os.link(path, beside)

    def query(self, text: str, **values: Any) -> list[Any]:
        """Rows of the coordinator's database; waits while that is away."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                with self._engine.connect() as connection:
                    return list(connection.execute(sa.text(text), values))
            except sa.exc.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)

    def run_row(self, run: str) -> Any:
        """State, reason, attempt and committed rounds of a run."""
        return self.query(
            "SELECT state, reason, attempt, (SELECT count(*) FROM rounds WHERE rounds.run = runs.run"
            " AND state = 'committed') AS committed FROM runs WHERE run = :run",
            run=run,
        )[0]

    def components(self) -> dict[str, int]:
        """Process id of each of the coordinator's components that is ready, as `fl-server up` says."""
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((self.coordinator.home / "supervisor.json").read_text())
            return {each["name"]: int(each["pid"]) for each in state["components"] if each["state"] == "ready"}
        return {}

    def is_well(self, run: str) -> bool:
        """Whether nothing is down: every component is ready, every agent lives, the run is being carried."""
        row = self.run_row(run)
        carried = row.state == "completed" or carrier_pid(self.coordinator.home / "attempts", row.attempt) > 0
        components = self.components()
        ready = len(components) == 4 and all(psutil.pid_exists(pid) for pid in components.values())
        return carried and ready and all((site.home / "run/agent.sock").exists() for site in self.sites)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that descend from it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        every = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for each in every:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(every, timeout=10)


def _below(pid: int, word: str) -> int:
    """The first descendant whose command line contains a word; 0 when there is none."""
    with contextlib.suppress(psutil.Error):
        for each in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(word in part for part in each.cmdline()):
                    return each.pid
    return 0


class Killer:
    """Kills components by name and starts again what only an operator would start."""

    NAMES = (
        "agent", "tunnel", "supernode", "clientapp",
        "serverapp", "superlink", "gateway", "control", "launcher", "fl-server", "postgresql",
    )  # fmt: skip

    def __init__(self, federation: Federation, run: str, chance: random.Random) -> None:
        self._federation = federation
        self._run = run
        self._chance = chance
        self.killed: dict[str, int] = dict.fromkeys(self.NAMES, 0)

    def _pid(self, name: str, site: Site) -> int:
        federation = self._federation
        agent = site.service.process.pid if site.service.process else 0
        if name == "agent":
            return agent
        if name in ("tunnel", "supernode", "clientapp"):
            word = {"tunnel": "fl_client.node.tunnel", "supernode": "flower-supernode", "clientapp": "flwr-clientapp"}
            return _below(agent, word[name])
        if name == "fl-server":
            process = federation.coordinator.service.process
            return process.pid if process else 0
        if name == "postgresql":
            return federation.database.pid
        if name == "serverapp":
            attempt = federation.run_row(self._run).attempt
            return carrier_pid(federation.coordinator.home / "attempts", attempt)
        return federation.components().get(name, 0)

    def kill(self, name: str, patience_s: float = 30.0) -> bool:
        """kill -9 of one component, at a random site if sites have it; False when none was alive for so long."""
        federation = self._federation
        site = self._chance.choice(federation.sites)
        deadline = time.monotonic() + patience_s
        while not (pid := self._pid(name, site)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        if name == "postgresql":
            federation.database.kill()
        else:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return False
        self.killed[name] += 1
        time.sleep(self._chance.uniform(0.0, 3.0))
        if name == "postgresql":
            federation.database.start()
        elif name == "agent":
            if site.service.process is not None:
                site.service.process.wait()
            (site.home / "run/agent.sock").unlink(missing_ok=True)  # so that `is_well` waits for the new one
            site.start()
        elif name == "fl-server":
            self._up_again()
        return True

    def _up_again(self) -> None:
        """`fl-server up`; it may find a port that its former children have not freed yet, and starts them again."""
        coordinator = self._federation.coordinator
        if coordinator.service.process is not None:
            coordinator.service.process.wait()
        coordinator.start(timeout=PATIENCE_S)


def bag(names: Sequence[str], chance: random.Random) -> Iterator[str]:
    """Names at random, each equally often."""
    while True:
        yield from chance.sample(list(names), len(names))


@dataclass
class Verdict:
    """What was checked, and what did not hold."""

    checks: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)

    def require(self, name: str, true: bool, problem: str) -> None:
        """Count one check; remember what failed."""
        self.checks[name] = self.checks.get(name, 0) + 1
        if not true:
            self.problems.append(f"{name}: {problem}")


def judge(federation: Federation, run: str, rounds: int) -> Verdict:
    """Hold what the coordinator and the sites have stored against the promises."""
    verdict = Verdict()
    row = federation.run_row(run)
    verdict.require("the run completed", row.state == "completed", f"it is {row.state}: {row.reason}")
    numbers = [each.round for each in federation.query(
        "SELECT round FROM rounds WHERE run = :run AND state = 'committed' ORDER BY round", run=run)]  # fmt: skip
    verdict.require("every round is committed", numbers == list(range(1, rounds + 1)), f"{numbers}")
    events = federation.query(
        "SELECT round, count(*) AS n FROM events WHERE run = :run AND kind = 'round-committed' GROUP BY round", run=run
    )
    for event in events:
        verdict.require("no round is counted twice", event.n == 1, f"round {event.round} {event.n} times")
    replies = federation.query("SELECT round, site, status FROM replies WHERE run = :run", run=run)
    counted = {(each.round, each.site) for each in replies if each.status == "ok"}
    verdict.figures["replies_counted"] = len(counted)
    verdict.figures["replies_late"] = sum(1 for each in replies if each.status == "late")
    verdict.figures["replies_missing"] = sum(1 for each in replies if each.status == "missing")
    restarts = federation.query("SELECT count(*) FROM events WHERE run = :run AND kind = 'restarted'", run=run)
    verdict.figures["serverapp_restarts"] = int(restarts[0][0])
    updates = {
        site.id: _judge_site(verdict, federation, site, run, {n for n, name in counted if name == site.id})
        for site in federation.sites
    }
    _judge_adapters(verdict, federation, run, rounds, counted, updates)
    return verdict


def _judge_site(verdict: Verdict, federation: Federation, site: Site, run: str, counted: set[int]) -> dict[int, bytes]:
    """Ledger, receipts and store of one site; the bytes that it released, by round."""
    url = f"sqlite:///{site.home / 'ledger.sqlite'}"
    report = verify_ledger(url, site.id)
    verdict.require("the ledger is intact", report.intact, f"{site.id}: {report.problems}")
    ledger = Ledger.open(url, None, site.id)
    try:
        spends = [spend for spend in ledger.spends() if spend.reservation.run == run]
        dataset = next(iter(ledger.datasets()))
        charged = ledger.epsilon("records").spent
    finally:
        ledger.close()
    by_round: dict[int, list[Any]] = {}
    for spend in spends:
        by_round.setdefault(spend.reservation.round, []).append(spend)
    for number, rows in by_round.items():
        verdict.require("no site is charged twice for a round", len(rows) == 1, f"{site.id} round {number}")
    settled = {number: rows[0].release_digest for number, rows in by_round.items() if rows[0].outcome == "settled"}
    verdict.require(
        "what was counted was charged", counted <= set(settled), f"{site.id}: {sorted(counted - set(settled))}"
    )
    verdict.figures["releases"] = verdict.figures.get("releases", 0) + len(settled)
    verdict.figures["charged_in_doubt"] = verdict.figures.get("charged_in_doubt", 0) + sum(
        1 for rows in by_round.values() if rows[0].outcome == "in-doubt"
    )
    expected = _epsilon_of(federation.root / f"oracle-{site.id}.sqlite", dataset, spends)
    verdict.require(
        "epsilon is that of one charge a round", bool(np.isclose(charged, expected, rtol=1e-9)),
        f"{site.id}: {charged} charged, {expected} by an empty ledger with the same releases",
    )  # fmt: skip
    _judge_receipts(verdict, federation, site, counted)
    _judge_log(verdict, site, run)
    kept: dict[int, bytes] = {}
    found = {digest(path.read_bytes()): path for path in (federation.kept / site.id).glob(f"{run}-*.safetensors")}
    for number, name in settled.items():
        verdict.require("what was released is what was stored", name in found, f"{site.id} round {number}")
        if name in found:
            kept[number] = found[name].read_bytes()
    return kept


def _epsilon_of(path: Path, dataset: Any, spends: Sequence[Any]) -> float:
    """Epsilon of one charge a round, by the gate of a ledger that holds nothing else."""
    ledger = Ledger.open(f"sqlite:///{path}", SigningKey.generate(), "oracle")
    try:
        made = ledger.register_dataset("records", "f" * 64, dataset.privacy_unit, dataset.units, dataset.bound_per_unit)
        ledger.set_budget(made, 1000.0, 1e-5, "nobody")
        for number in sorted({spend.reservation.round for spend in spends}):
            mechanism = next(each.reservation.mechanism for each in spends if each.reservation.round == number)
            held = ledger.reserve(made, mechanism, run="oracle", round=number, purpose="training")
            ledger.settle(held, mechanism, "sha256:" + "0" * 64)
        return ledger.epsilon(made).spent
    finally:
        ledger.close()


def _judge_receipts(verdict: Verdict, federation: Federation, site: Site, counted: set[int]) -> None:
    """`fl-audit reconcile`: a release whose reply was lost may lack a receipt, and nothing else may differ."""
    done = command(
        "fl-audit", "reconcile", "--site", site.id, "--home", str(site.home),
        "--receipts", federation.database.url, "--json", check=False,
    )  # fmt: skip
    divergences = json.loads(done.stdout)["divergences"]
    wrong = [each for each in divergences if each["kind"] != "missing" or each["round"] in counted]
    verdict.require("the coordinator's receipts agree with the ledger", not wrong, f"{site.id}: {wrong}")


def _judge_log(verdict: Verdict, site: Site, run: str) -> None:
    """By the agent's log: what is settled is fetched again and never trained again."""
    lines: list[dict[str, Any]] = []
    for path in sorted((site.home / "logs").glob("*.jsonl*"), key=lambda each: each.stat().st_mtime):
        for text in path.read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):  # kill -9 may cut a line
                lines.append(json.loads(text))
    released: set[int] = set()
    again = trained = 0
    for line in lines:
        if line.get("run") != run:
            continue
        message, number = str(line.get("message", line.get("event", ""))), int(line["round"])
        if message.startswith(("released update", "settled an update")):
            released.add(number)
        again += message.startswith("sending the stored update again")
        if message == "training":
            trained += 1
            verdict.require("nothing is trained after its release", number not in released, f"{site.id} round {number}")
    verdict.require("the agent's log tells of its rounds", trained > 0, f"{site.id}: {len(lines)} lines")
    for name, value in (("fetched_again", again), ("trainings_begun", trained)):
        verdict.figures[name] = verdict.figures.get(name, 0) + value


def _judge_adapters(
    verdict: Verdict,
    federation: Federation,
    run: str,
    rounds: int,
    counted: set[tuple[int, str]],
    updates: dict[str, dict[int, bytes]],
) -> None:
    """Every committed adapter is, byte for byte, what an undisturbed run would have made of the same updates.

    The undisturbed run is computed here: from nothing, round after round, by the coordinator's own aggregation
    of the updates that the sites stored. An average in float64 by NumPy says independently that this is right.
    """
    spec = RunSpec.from_toml(federation.root / f"{run}.toml")
    base, equal = b"", 0
    artifacts = LocalArtifacts(federation.coordinator.home / "artifacts")
    for number in range(1, rounds + 1):
        ((name,),) = federation.query(
            "SELECT adapter_digest FROM rounds WHERE run = :run AND round = :number", run=run, number=number
        )
        committed = artifacts.get(name)
        parts = [dict(unpack(updates[site][number])) for n, site in sorted(counted) if n == number]
        aggregate = RoundAggregate(spec, base, b"", federation.root)
        for part in parts:
            aggregate.add(part)
        before, (base, _) = dict(unpack(base)), aggregate.finish()
        equal += base == committed
        verdict.require("the adapter is that of an undisturbed run", base == committed, f"round {number}")
        for name, value in unpack(committed).items():
            start = before[name].astype(np.float64) if name in before else 0.0
            mean = np.mean([part[name].astype(np.float64) for part in parts], axis=0)
            near = np.abs(value - start - mean) <= 2 * np.finfo(np.float32).eps * (np.abs(start) + np.abs(mean))
            verdict.require("the adapter is the average", bool(np.all(near)), f"round {number}: {name}")
    verdict.figures["adapters_byte_equal"] = equal
