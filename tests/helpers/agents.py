"""A real agent process of an enrolled site, without the untrusted half: the test itself calls its socket."""

from __future__ import annotations

import csv
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

from fl_client.agent.outgoing import Sealed
from fl_client.agent.status import agent_state
from fl_client.identity.enrolment import enrol
from fl_client.site.home import SiteHome
from fl_shared.adapters.safetensors import digest
from fl_shared.documents.round import RoundManifest
from fl_shared.documents.spec import RunSpec
from fl_shared.identity.signing import SigningKey, sign_document
from fl_shared.ledger.records import Spend
from fl_shared.ledger.service import Ledger
from fl_shared.wire import agent_pb2_grpc
from fl_shared.wire.agent_pb2 import Chunk, RoundHeader
from fl_shared.wire.chunks import split
from helpers import warm
from helpers.gateway import Gateway
from helpers.ports import free_port
from helpers.smallest import smallest_base
from helpers.specs import run_spec, site_toml

SITE = "hospital-001"
MARKER = "PLANTEDPATIENT4711"
LABELS = ("lungs", "heart")


def spec(model: str, *, steps: int = 2, rounds: int = 50) -> RunSpec:
    """A small spec that the policy of `RealSite` allows."""
    return run_spec(
        base_model=model, sites=[SITE], rounds=rounds, labels=LABELS, sampling_probability=0.05, steps_per_round=steps
    )


class RealSite:
    """An enrolled home with data, and the agent's processes started in it one after another."""

    def __init__(self, root: Path, gateway: Gateway, *, epsilon: float = 50.0, **sections: Mapping[str, Any]) -> None:
        self.home = SiteHome(root)
        self.gateway = gateway
        enrol(self.home, site=SITE, server=gateway.url, token=gateway.token(SITE))
        usual: dict[str, Mapping[str, Any]] = {
            "data": {"unit_column": "patient", "privacy_unit": "patient", "max_records_per_unit": 2},
            "policy": {"max_steps_per_round": 100_000},
            "budget": {"epsilon": epsilon, "approver": "officer"},
            "model": {"directory": smallest_base()},
            "supernode": {"launch": False, "tunnel_port": free_port()},
            "agent": {"stop_grace_s": 0.5},
        }
        self.home.config.write_text(site_toml(SITE, gateway.url, **(usual | sections)))
        with (root / "records.csv").open("w", newline="", encoding="utf-8") as sink:
            writer = csv.writer(sink)
            writer.writerow(["text", "label", "patient"])
            for number in range(120):
                writer.writerow([f"{MARKER} cough number {number}", LABELS[number % 2], f"{MARKER}-{number // 2}"])
        self.process: subprocess.Popen[str] | warm.Forked | None = None

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("FL_")}
        return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}

    def start(self, *, wait: bool = True, **extra: str) -> subprocess.Popen[str] | warm.Forked:
        """Start the agent and wait until its socket answers."""
        words = ["--site", SITE, "--home", str(self.home.root)]
        if any(name.startswith("PYTHON") for name in extra):
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fl_client.cli.client", *words],
                env=self.environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        else:
            self.process = warm.start("fl-client", *words, env=self.environment(**extra), together=True)
        deadline = time.monotonic() + 120
        while wait and agent_state(self.home) == "stopped":
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the agent did not start: {self.finish()}")
            time.sleep(0.1)
        return self.process

    def run(self, command: str, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command at this site to its end, as a process."""
        at = ("--site", SITE, "--home", str(self.home.root))
        return warm.run(command, *map(str, words), *at, env=self.environment(**variables))

    def kill(self) -> None:
        """kill -9, as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.finish()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask the agent to end; its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        self.finish()
        return self.process.wait()

    def finish(self) -> str:
        """Wait for the process's end and return what it printed."""
        assert self.process is not None
        return self.process.communicate(timeout=90)[0]

    def manifest(self, number: int, made_for: RunSpec, **changes: Any) -> RoundManifest:
        """A valid manifest of the pinned coordinator."""
        now = time.time()
        fields: dict[str, Any] = {
            "run": "demo-1",
            "round": number,
            "site": SITE,
            "spec": made_for,
            "adapter_digest": digest(b""),
            "nonce": secrets.token_hex(8),
            "issued_at": now,
            "expires_at": now + 600,
        }
        return RoundManifest(**{**fields, **changes})

    def order(self, manifest: RoundManifest, adapter: bytes = b"", *, key: SigningKey | None = None) -> Sealed:
        """Send a round through the socket; grpc.RpcError when the agent dies meanwhile."""
        header = RoundHeader(
            manifest_json=json.dumps(sign_document(key or self.gateway.signing, manifest.to_dict())),
            adapter_bytes=len(adapter),
            adapter_digest=digest(adapter),
        )
        with grpc.insecure_channel(f"unix:{self.home.socket}") as channel:
            sent = [Chunk(header=header), *(Chunk(data=piece) for piece in split(adapter))]
            replies = list(agent_pb2_grpc.AgentStub(channel).Round(iter(sent), timeout=120))
        data = b"".join(chunk.data for chunk in replies[1:])
        return Sealed(replies[0].reply.status, replies[0].reply.document_json, data)

    def spends(self) -> list[Spend]:
        """The ledger's reservations, read while the agent runs or not."""
        ledger = Ledger.open(f"sqlite:///{self.home.ledger}", None, SITE)
        try:
            return list(ledger.spends())
        finally:
            ledger.close()

    def epsilon(self) -> float:
        """Epsilon charged so far."""
        ledger = Ledger.open(f"sqlite:///{self.home.ledger}", None, SITE)
        try:
            return ledger.epsilon("diagnoses").spent
        finally:
            ledger.close()


def body(sealed: Sealed) -> dict[str, Any]:
    """The body of a signed answer."""
    found: dict[str, Any] = json.loads(sealed.document)["body"]
    return found
