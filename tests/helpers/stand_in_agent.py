"""A site's trusted half without a model: real signed receipts, updates from numpy, misbehaviour on demand.

One process serves the sockets of several sites: `python stand_in_agent.py DIRECTORY SITE...`. Each site's
folder holds its `signing.pem` and `plan.json`, which names for each round what the site does; a round that
is not named is answered honestly. A round is computed once and answered from the store afterwards, as the
real agent does; `computed.log` counts, `orders.log` tells what was asked. Who is told to `wait` answers when
the file `go` is there.
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from fl_shared.adapters.safetensors import digest, pack
from fl_shared.canonical import sha256_hex
from fl_shared.documents.round import Receipt, Refusal, RoundManifest
from fl_shared.identity.signing import SigningKey, sign_document
from fl_shared.wire.agent_pb2 import Chunk, ReplyHeader
from fl_shared.wire.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server
from fl_shared.wire.chunks import split

SHAPES = {"layer.lora_A": (4, 8), "layer.lora_B": (8, 4), "head": (8,)}


def honest_update(site: str, round_number: int) -> dict[str, NDArray[np.float32]]:
    """The update of a site in a round: a function of both alone, so that a test can predict every mean."""
    seed = int(sha256_hex(f"{site}/{round_number}".encode())[:8], 16)
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def _spoil(update: dict[str, NDArray[np.float32]], how: str) -> dict[str, NDArray[np.float32]]:
    if how == "nan":
        update["head"][3] = np.nan
    if how == "huge":
        update["head"][3] = 3e38
    if how == "shapes":
        update["head"] = np.zeros(9, np.float32)
    if how == "names":
        update["another"] = update.pop("head")
    return update


class StandIn(AgentServicer):  # type: ignore[misc]  # generated code has no types
    """One site's agent."""

    def __init__(self, folder: Path, site: str) -> None:
        self._folder = folder
        self._site = site
        self._key = SigningKey.load(folder / "signing.pem")
        self._stored: dict[tuple[str, int], tuple[str, str, bytes]] = {}
        self._lock = threading.Lock()

    def Round(self, request_iterator: Iterator[Chunk], context: grpc.ServicerContext) -> Iterator[Chunk]:
        """Answer as the plan says."""
        header = next(request_iterator).header
        base = b"".join(chunk.data for chunk in request_iterator)
        manifest = RoundManifest.from_dict(json.loads(header.manifest_json)["body"])
        with (self._folder / "orders.log").open("a") as log:
            log.write(f"{manifest.run}/{manifest.round}\n")
        how = self._plan(manifest)
        if how.startswith("sleep:"):
            time.sleep(float(how.removeprefix("sleep:")))
            how = "ok"
        if how == "wait":
            while not (self._folder / "go").exists() and context.is_active():
                time.sleep(0.1)
            how = "ok"
        if how == "crash":
            context.abort(grpc.StatusCode.INTERNAL, "")
        with self._lock:
            if how == "replay":
                answer = self._stored[manifest.run, manifest.round - 1]
            elif (stored := self._stored.get((manifest.run, manifest.round))) is not None:
                answer = stored
            else:
                answer = self._compute(manifest, base, how)
                if how in ("ok", "replay"):
                    self._stored[manifest.run, manifest.round] = answer
        status, document, update = answer
        yield Chunk(
            reply=ReplyHeader(
                status=status, document_json=document, adapter_bytes=len(update), adapter_digest=digest(update)
            )
        )
        for piece in split(update):
            yield Chunk(data=piece)

    def _plan(self, manifest: RoundManifest) -> str:
        try:
            table: dict[str, Any] = json.loads((self._folder / "plan.json").read_text())
        except FileNotFoundError:
            return "ok"
        return str(table.get(f"{manifest.run}/{manifest.round}", "ok"))

    def _compute(self, manifest: RoundManifest, base: bytes, how: str) -> tuple[str, str, bytes]:
        if how == "refuse":
            body = Refusal(
                run=manifest.run,
                round=manifest.round,
                site=self._site,
                manifest_digest=manifest.digest,
                code="budget-exhausted",
                message="epsilon 7.9 of 8 is spent",
                created_at=time.time(),
            ).to_dict()
            return "refused", json.dumps(sign_document(self._key, body)), b""
        with (self._folder / "computed.log").open("a") as log:
            log.write(f"{manifest.run}/{manifest.round} {digest(base)}\n")
        if how == "garbage":
            update = secrets.token_bytes(500)
        else:
            update = pack(_spoil(honest_update(self._site, manifest.round), how), wire=manifest.spec.run.wire)
        body = self._receipt(manifest, digest(b"other" if how == "wrong-digest" else update))
        key = SigningKey.generate() if how == "wrong-signature" else self._key
        return "ok", json.dumps(sign_document(key, body)), update

    def _receipt(self, manifest: RoundManifest, update_digest: str) -> dict[str, Any]:
        return Receipt(
            run=manifest.run,
            round=manifest.round,
            site=self._site,
            manifest_digest=manifest.digest,
            spec_digest=manifest.spec_digest,
            update_digest=update_digest,
            model_digest=manifest.spec.run.base_model,
            mechanism=manifest.spec.mechanism(),
            steps_executed=manifest.spec.training.steps_per_round,
            epsilon_spent_total=0.25 * manifest.round,
            delta=1e-5,
            privacy_unit="record",
            ledger_head="0" * 64,
            ledger_entries=manifest.round,
            merkle_root="1" * 64,
            entry_id=f"e{manifest.round}",
            created_at=time.time(),
        ).to_dict()


def serve(folder: Path, site: str) -> Callable[[], object]:
    """Serve one site's socket; what stops it."""
    (folder / "agent.sock").unlink(missing_ok=True)
    server = grpc.server(ThreadPoolExecutor(4))
    add_AgentServicer_to_server(StandIn(folder, site), server)
    server.add_insecure_port(f"unix:{folder / 'agent.sock'}")
    server.start()
    return lambda: server.stop(0).wait()


def main() -> None:
    """Serve until killed."""
    root = Path(sys.argv[1])
    stops = [serve(root / site, site) for site in sys.argv[2:]]
    print("ready", flush=True)
    sys.stdin.read()
    for stop in stops:
        stop()


if __name__ == "__main__":
    main()
