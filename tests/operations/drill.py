"""One federation from its start to a disaster and on: run by `test_operations.py`, in a network of its own.

    python drill.py ROOT BASE DIGEST [--alone]

A coordinator and a site, both with metrics; a run; a backup in mid-run; kill -9 of the whole coordinator, its home
deleted; restored, brought up, the run completed; both ended by SIGTERM. The site's agent is stopped (SIGSTOP) in the
run's second round while the backup is made and the coordinator killed: a loaded machine takes longer for those than
for a round. What was seen is written to ROOT/result.json, what was printed and logged lies below ROOT. `--alone`:
the process is in a network namespace that `network.enter` may set up.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "scenarios"), str(HERE.parent)]


import harness  # noqa: E402 - made importable above
from fl_server.db.copying import copy_sqlite  # noqa: E402
from fl_shared.runtime.offline import OFFLINE  # noqa: E402
from helpers.specs import site_toml, write_spec  # noqa: E402
from operations import network  # noqa: E402

SITE, RUN, ROUNDS = "hospital-001", "drill", 3
LABELS = ("lungs", "heart")
MARKERS = {"text": "PLANTEDTEXT4711", "label": "PLANTEDLABEL4712", "unit": "PLANTEDUNIT4713"}
UNITS = 2_003
RECORDS = 2 * UNITS
TRAINING, RELEASED = "training", "released update"  # what the agent logs when a round begins and when it is settled


def bare_environment(extra: object = None, version: object = None) -> dict[str, str]:
    """What a person's shell has: none of the variables that keep libraries quiet, so that the product must set them."""
    named = ("FL_", "FLWR_", "HF_", "TOKENIZERS", "DO_NOT_TRACK", "TRANSFORMERS")
    return {k: v for k, v in os.environ.items() if not k.startswith(named)} | {"OMP_NUM_THREADS": "1"}


def write_data(path: Path) -> None:
    """Two records of each patient, every text, patient and some labels marked."""
    with path.open("w", newline="", encoding="utf-8") as sink:
        writer = csv.writer(sink)
        writer.writerow(["text", "label", "patient"])
        for number in range(RECORDS):
            label = MARKERS["label"] if number % 50 == 0 else LABELS[number % 2]
            writer.writerow([f"{MARKERS['text']} cough {number}", label, f"{MARKERS['unit']}-{number // 2}"])


def processes() -> list[dict[str, Any]]:
    """Every process of the product: command and which of the quieting variables it has."""
    found = []
    for each in psutil.Process().children(recursive=True):
        try:
            words, has = each.cmdline(), each.environ()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if words and "python" in words[0]:
            lacking = sorted(name for name, value in OFFLINE.items() if has.get(name) != value)
            found.append({"command": " ".join(words)[:300], "lacking": lacking})
    return found


class Drill:
    """The parties and what was seen of them."""

    def __init__(self, root: Path, base: Path, digest: str) -> None:
        self.root, self.base, self.digest = root, base, digest
        self.coordinator = harness.Coordinator(root)
        self.site = harness.Site(SITE, root)
        self.ports = dict(zip(("coordinator", "site"), harness.free_ports(2), strict=True))
        self.seen: dict[str, Any] = {"scrapes": {}}

    def scrape(self, moment: str, *parties: str) -> None:
        """Keep metrics, health and readiness of these parties, or of both."""
        with httpx.Client(trust_env=False, timeout=30) as client:
            for who in parties or self.ports:
                base = f"http://127.0.0.1:{self.ports[who]}"
                for path in ("metrics", "readyz", "healthz"):
                    answer = client.get(f"{base}/{path}")
                    self.seen["scrapes"][f"{moment}/{who}/{path}"] = [answer.status_code, answer.text]

    def begin(self) -> None:
        """Everything up to a running run."""
        self.coordinator.init()
        with (self.coordinator.home / "server.toml").open("a") as sink:
            sink.write(f'\n[metrics]\nlisten = "127.0.0.1:{self.ports["coordinator"]}"\n')
        self.coordinator.start(timeout=180)
        token = self.coordinator.invite(SITE)
        self.seen["token"] = token
        self.site.enroll(self.coordinator.url, token)
        write_data(self.site.home / "records.csv")
        self.site.configure(
            site_toml(
                SITE,
                self.coordinator.url,
                data={"unit_column": "patient", "privacy_unit": "patient", "max_records_per_unit": 2},
                policy={"max_sampling_probability": 0.01},
                model={"directory": self.base},
                budget={"delta": 1e-6},
                metrics={"listen": f"127.0.0.1:{self.ports['site']}"},
            )
        )
        self.site.start()
        spec = write_spec(
            self.root / "spec.toml",
            name=RUN,
            base_model=self.digest,
            sites=[SITE],
            rounds=ROUNDS,
            round_timeout_s=120,
            labels=LABELS,
            sampling_probability=0.01,
            steps_per_round=2,
        )
        self.coordinator.launch(spec)

    def said(self, message: str, number: int) -> bool:
        """Whether the agent's log has such a line of a round of the run."""
        log = self.site.home / "logs" / "agent.jsonl"
        lines = log.read_text("utf-8").rpartition("\n")[0].splitlines() if log.exists() else []
        found = [line for line in map(json.loads, lines) if (line.get("run"), line.get("round")) == (RUN, number)]
        return any(line["message"].startswith(message) for line in found)

    def until_said(self, message: str, number: int, patience: float = 240.0) -> None:
        """Wait for such a line."""
        deadline = time.monotonic() + patience
        while not self.said(message, number):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the agent did not say in {patience:.0f} s: {message}, round {number}")
            time.sleep(0.02)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The run in its middle for as long as the block takes: the agent, in its second round, is stopped by SIGSTOP.

        That the second round has begun says that the first is committed; without the agent the last cannot be.
        """
        if self.site.service.process is None:
            raise RuntimeError("the site does not run")
        agent = psutil.Process(self.site.service.process.pid)
        self.until_said(TRAINING, 2)
        agent.suspend()
        try:
            while agent.status() != psutil.STATUS_STOPPED:
                time.sleep(0.02)
            if self.said(RELEASED, ROUNDS):
                raise RuntimeError("the agent was stopped too late: its last update is out")
            yield
        finally:
            agent.resume()

    def kill_coordinator(self) -> None:
        """kill -9 of `fl-server up`; its children end by themselves."""
        service = self.coordinator.service.process
        if service is None:
            raise RuntimeError("the coordinator does not run")
        every = [*psutil.Process(service.pid).children(recursive=True), psutil.Process(service.pid)]
        service.kill()
        service.wait()
        psutil.wait_procs(every, timeout=20)

    def disaster(self, archive: Path) -> None:
        """A backup while the run goes on; then everything of the coordinator is lost and brought back."""
        with self.held():
            self.scrape("running", "coordinator")
            copy_sqlite(self.site.home / "ledger.sqlite", self.root / "old-ledger.sqlite")
            self.seen["processes"] = processes()
            self.seen["backup"] = harness.command_json(
                "fl-server", "backup", "--home", str(self.coordinator.home), "--out", str(archive)
            )
            self.kill_coordinator()
        self.until_said(RELEASED, 2)  # with no coordinator there to take it
        self.scrape("running", "site")
        shutil.copytree(self.coordinator.home / "logs", self.root / "first-life")
        shutil.rmtree(self.coordinator.home)
        self.seen["restore"] = json.loads(
            harness.command("fl-server", "restore", str(archive), "--home", str(self.coordinator.home), "--json").stdout
        )
        self.coordinator.start(timeout=180)

    def end(self) -> None:
        """Wait for the run, ask everybody, end both halves in good order."""
        self.seen["run"] = self.coordinator.wait(RUN, timeout=240)
        self.scrape("completed")
        agent = self.site.service.process
        self.seen["agent_lived_on"] = agent is not None and agent.poll() is None
        self.seen["spends"] = self.site.audit("spends")["spends"]
        self.seen["site_exit"] = self.site.service.stop(timeout=60)
        self.seen["coordinator_exit"] = self.coordinator.service.stop(timeout=60)
        self.seen["left_over"] = processes()
        self.seen["verify"] = self.verify(self.site.home / "ledger.sqlite")
        self.seen["verify_old"] = self.verify(self.root / "old-ledger.sqlite")

    def verify(self, ledger: Path) -> list[Any]:
        """Exit code and words of `fl-audit verify` on a ledger, held against the coordinator's receipts."""
        done = harness.command(
            "fl-audit", "verify", "--site", SITE, "--home", str(self.site.home), "--ledger", f"sqlite:///{ledger}",
            "--receipts", f"sqlite:///{self.coordinator.home / 'coordinator.sqlite'}", check=False,
        )  # fmt: skip
        return [done.returncode, done.stdout + done.stderr]


def main() -> int:
    """Do it all; the result is written whatever happens."""
    root, base, digest = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    harness.environment = bare_environment
    recorder, control = None, []
    if "--alone" in sys.argv:
        recorder = network.enter(root)
        subprocess.run([sys.executable, str(HERE / "network.py")], check=True)
        time.sleep(0.2)
        control, recorder.seen = recorder.seen, []
    drill = Drill(root, base, digest)
    drill.seen["control"] = control
    try:
        drill.begin()
        drill.disaster(root / "backup.tar")
        drill.end()
    finally:
        for service in (drill.site.service, getattr(drill.coordinator, "service", None)):
            if service is not None:
                service.stop()
        drill.seen["packets"] = recorder.seen if recorder else None
        (root / "result.json").write_text(json.dumps(drill.seen, indent=1))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
