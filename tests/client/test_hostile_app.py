"""A hostile ClientApp, confined as in production, with a colluding coordinator's signed orders and the agent's socket.

It asks for more than policy allows, for more than the budget holds, in other sites' names, again, and for calls
that do not exist; it looks for data, keys and the ledger. The agent's ledger, store and choke point are real.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import pytest

from fl_client.agent.service import AgentService, serve
from fl_client.node.environment import shared_source
from fl_client.node.sandbox import landlock_abi
from fl_shared.adapters.safetensors import digest
from fl_shared.canonical import canonical_bytes
from fl_shared.documents.round import RoundManifest
from fl_shared.identity.signing import SigningKey, sign_document, verify
from helpers.sandboxes import close, confinement_of, start_keeper
from helpers.sites import SITE, Site, site_spec
from helpers.specs import SpecFields

MARKER = "planted-secret-4711"
FLOOD = 24

HOSTILE = """
import json, os, sys, threading
import grpc
from fl_shared.adapters.safetensors import digest
from fl_shared.wire import agent_pb2_grpc
from fl_shared.wire.agent_pb2 import Chunk, InfoRequest, RoundHeader

socket, orders, secrets = sys.argv[1], json.load(open("orders.json")), json.loads(sys.argv[2])
report = {"answers": {}, "calls": {}, "files": {}}

def ask(text):
    header = RoundHeader(manifest_json=text, adapter_bytes=0, adapter_digest=digest(b""))
    try:
        with grpc.insecure_channel("unix:" + socket) as channel:
            stub = agent_pb2_grpc.AgentStub(channel)
            replies = list(stub.Round(iter([Chunk(header=header)]), timeout=60))
    except grpc.RpcError as error:
        return [error.code().name, error.details(), ""]
    data = b"".join(chunk.data for chunk in replies[1:])
    return [replies[0].reply.status, replies[0].reply.document_json, data.hex()]

for name, text in orders:
    report["answers"][name] = ask(text)
with grpc.insecure_channel("unix:" + socket) as channel:
    for method in ("ReadData", "Sign", "Ledger", "SetPolicy", "TopUp", "Evaluate", "Plan", "Settle"):
        try:
            channel.unary_unary("/concordat.agent.v1.Agent/" + method)(b"", timeout=20)
            report["calls"][method] = "answered"
        except grpc.RpcError as error:
            report["calls"][method] = error.code().name
    report["info"] = str(agent_pb2_grpc.AgentStub(channel).Info(InfoRequest(), timeout=20))
flood, threads = [], []
for _ in range(int(sys.argv[3])):
    threads.append(threading.Thread(target=lambda: flood.append(ask(orders[-1][1])[0])))
    threads[-1].start()
for thread in threads:
    thread.join()
report["flood"] = flood
for path in secrets + [socket]:
    for act, call in (
        ("read", lambda: open(path, "rb").read()),
        ("write", lambda: open(path, "ab").write(b"x")),
        ("delete", lambda: os.unlink(path)),
        ("replace", lambda: os.rename("orders.json", path)),
        ("link", lambda: os.link(path, "mine")),
        ("list", lambda: os.listdir(os.path.dirname(path))),
    ):
        try:
            call()
            report["files"][act + " " + path] = "done"
        except OSError as error:
            report["files"][act + " " + path] = type(error).__name__
json.dump(report, open("report.json", "w"))
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site whose budget holds a few rounds, and whose agent listens below `tmp_path`."""
    made = Site(tmp_path / "home", epsilon=8.0)
    yield made
    made.ledger.close()


def orders(site: Site) -> list[tuple[str, str]]:
    """What a hostile coordinator signs for its hostile app, and what the app makes up by itself."""

    def signed(manifest: RoundManifest, key: SigningKey | None = None) -> dict[str, Any]:
        return sign_document(key or site.coordinator, manifest.to_dict())

    def greedy(**fields: Unpack[SpecFields]) -> RoundManifest:
        return site.manifest(run="greedy", spec=site_spec(**fields))

    honest = site.manifest()
    mild = signed(honest)
    mild["body"]["spec"]["training"]["noise_multiplier"] = 0.01
    made = [
        ("less noise", signed(greedy(noise_multiplier=0.1))),
        ("no noise", signed(greedy(noise_multiplier=0.001))),
        ("larger clip", signed(greedy(clipping_norm=100.0))),
        ("every record", signed(greedy(sampling_probability=0.9))),
        ("more steps", signed(greedy(steps_per_round=21))),
        ("another site's", signed(dataclasses.replace(honest, site="hospital-002"))),
        ("expired", signed(dataclasses.replace(honest, issued_at=1.0, expires_at=2.0))),
        ("the app's own key", signed(honest, SigningKey.generate())),
        ("changed after signing", mild),
        ("honest", signed(honest)),
        ("replayed", signed(honest)),
        ("the same round for another adapter", signed(dataclasses.replace(honest, adapter_digest=digest(b"x")))),
        ("a nonce again", signed(site.manifest(2, nonce=honest.nonce))),
    ]
    spec = site_spec(rounds=400)
    made += [(f"round {number}", signed(site.manifest(number, run="endless", spec=spec))) for number in range(1, 40)]
    return [(name, json.dumps(document)) for name, document in made] + [("nonsense", '{"body": {"run": ')]


@pytest.mark.skipif(landlock_abi() < 6, reason="this kernel's Landlock does not cover network and signals")
def test_a_hostile_app_gets_no_more_than_policy_and_budget_allow(site: Site, tmp_path: Path) -> None:
    """Every refusal by name, one release for each allowed round, a ledger within its ceiling, and nothing private."""
    node, listening = tmp_path / "home" / "supernode", tmp_path / "run" / "agent.sock"
    node.mkdir()
    listening.parent.mkdir()
    secrets = [tmp_path / "home" / name for name in ("ledger.sqlite", "signing.pem", "patients.csv", "site.toml")]
    site.key.save(secrets[1])
    for path in secrets[2:]:
        path.write_text(MARKER)
    server = serve(AgentService(SITE, site.rounds), listening)
    command = [sys.executable, "-c", HOSTILE, str(listening)]
    command += [json.dumps([str(path) for path in secrets]), str(FLOOD)]
    made = confinement_of(node, command, agent=listening, connect_ports=[], bind_ports=[], mode="require")
    (Path(made.directory) / "orders.json").write_text(json.dumps(orders(site)))
    made.environment.setdefault("PYTHONPATH", str(shared_source() or ""))
    keeper = start_keeper(made)
    try:
        assert keeper.wait(240) == 0, Path(made.log).read_text()
    finally:
        close(keeper)
    report = json.loads((Path(made.directory) / "report.json").read_text())
    _require_refusals(site, report)
    _require_budget(site, report)
    assert set(report["calls"].values()) == {"UNIMPLEMENTED"}
    assert "done" not in report["files"].values(), report["files"]
    assert len(report["files"]) == 6 * (len(secrets) + 1)
    assert (secrets[2].read_text(), secrets[3].read_text()) == (MARKER, MARKER)
    # A flood takes the agent's few places and no more; afterwards it answers.
    assert len(report["flood"]) == FLOOD
    assert set(report["flood"]) <= {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
    assert site.order(site.manifest()).status == "ok"
    # Refusals hold the words of policy and ledger, never a file's content, a path or a record.
    told = json.dumps(report)
    assert MARKER not in told.replace(json.dumps(report["files"]), "")
    assert all(str(tmp_path) not in answer[1] for answer in report["answers"].values())
    server.stop(0).wait()


def _require_refusals(site: Site, report: dict[str, Any]) -> None:
    def refused(name: str) -> tuple[str, str]:
        status, document, data = report["answers"][name]
        assert (status, data) == ("refused", ""), (name, document)
        signed = json.loads(document)
        verify(site.key.public_hex, canonical_bytes(signed["body"]), signed["signature"])
        return signed["body"]["code"], signed["body"]["message"]

    assert refused("less noise") == ("policy", "noise_multiplier 0.1 < 0.8")
    assert refused("no noise")[0] == "policy"
    assert refused("larger clip") == ("policy", "clipping_norm 100 > 1")
    assert refused("every record") == ("policy", "sampling_probability 0.9 > 0.2")
    assert refused("more steps") == ("policy", "steps_per_round 21 > 20")
    for name in (
        "another site's", "expired", "the app's own key", "changed after signing",
        "the same round for another adapter", "a nonce again",
    ):  # fmt: skip
        assert refused(name)[0] == "bad-manifest", name
    assert report["answers"]["nonsense"][0] == "INVALID_ARGUMENT"
    assert report["answers"]["honest"][0] == "ok"
    assert report["answers"]["replayed"][2] == report["answers"]["honest"][2]


def _require_budget(site: Site, report: dict[str, Any]) -> None:
    statuses = [report["answers"][f"round {number}"][0] for number in range(1, 40)]
    granted = statuses.count("ok")
    assert 1 <= granted < 39
    assert statuses == ["ok"] * granted + ["refused"] * (39 - granted)
    last = json.loads(report["answers"]["round 39"][1])["body"]
    assert last["code"] == "budget-exhausted"
    assert site.trainer.calls == 1 + granted
    assert [outcome for _, outcome in site.outcomes()].count("settled") == 1 + granted
    position = site.ledger.epsilon("records")
    assert position.spent <= position.epsilon
