"""A site with a real ledger, store and choke point around a small trainer, for the agent's tests."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from fl_client.agent.outgoing import Outgoing, Sealed
from fl_client.agent.releases import ReleaseStore
from fl_client.agent.rounds import Rounds, SiteFacts
from fl_client.site.config import PolicyConfig
from fl_shared.adapters.safetensors import digest, pack
from fl_shared.documents.order import RoundOrder
from fl_shared.documents.round import RoundManifest
from fl_shared.documents.spec import LORA_TARGETS, RunSpec
from fl_shared.identity.signing import SigningKey, sign_document
from fl_shared.ledger.service import Ledger
from fl_shared.privacy.mechanism import Mechanism
from helpers.specs import SpecFields, run_spec

SITE = "hospital-001"
MODEL = "sha256:" + "1" * 64

POLICY = PolicyConfig(
    min_noise_multiplier=0.8,
    max_clipping_norm=1.0,
    max_sampling_probability=0.2,
    max_steps_per_round=20,
    max_rank=16,
    targets=LORA_TARGETS,
    allow_non_private=False,
    apps=("any",),
    reply_every_s=0.0,
)


def site_spec(**fields: Unpack[SpecFields]) -> RunSpec:
    """A small spec that the policy above allows."""
    usual: dict[str, Any] = {"base_model": MODEL, "labels": ["a", "b"], "rank": 4}
    usual.update(fields)
    return run_spec(**usual)


@dataclass
class Trained:
    """What the small trainer hands back."""

    update: dict[str, Any]
    executed: Mechanism


@dataclass
class Trainer:
    """Counts its calls and answers with fresh noise, so that a second training would be seen."""

    calls: int = 0
    before: Callable[[], None] = lambda: None
    change: Callable[[Trained], Trained] = lambda trained: trained

    def __call__(self, spec: Any, mechanism: Mechanism, offset: Any, number: int, progress: Any) -> Trained:
        self.calls += 1
        self.before()
        progress(step=1)
        update = {"w": np.random.default_rng().normal(size=(4, 3)).astype(np.float32)}
        return self.change(Trained(update, mechanism))


@dataclass
class Site:
    """The trusted half below `root`, and the coordinator's key that orders its rounds."""

    root: Path
    epsilon: float = 8.0
    policy: PolicyConfig = POLICY
    trainer: Trainer = field(default_factory=Trainer)
    coordinator: SigningKey = field(default_factory=SigningKey.generate)
    key: SigningKey = field(default_factory=SigningKey.generate)

    def __post_init__(self) -> None:
        (self.root / "releases").mkdir(parents=True, exist_ok=True)
        self.open()

    def open(self) -> None:
        """Start the agent's parts, as after a crash: from what is on disk alone."""
        self.ledger = Ledger.open(f"sqlite:///{self.root}/ledger.sqlite", self.key, SITE)
        dataset = self.ledger.register_dataset("records", "f" * 64, "record", 1000, 1)
        self.ledger.set_budget(dataset, self.epsilon, 1e-5, "officer")
        trusted = self.coordinator.public_hex
        facts = SiteFacts(SITE, lambda key: key == trusted, MODEL, self.policy, dataset)
        self.facts = facts
        self.store = ReleaseStore(self.root / "releases")
        self.outgoing = Outgoing(self.key, self.ledger)
        self.rounds = Rounds(facts, ledger=self.ledger, store=self.store, outgoing=self.outgoing, train=self.trainer)
        self.rounds.recover()

    def manifest(self, number: int = 1, adapter: bytes = b"", **changes: Any) -> RoundManifest:
        """A valid manifest for this site; keywords change its fields."""
        now = time.time()
        made = RoundManifest(
            run="demo-1",
            round=number,
            site=SITE,
            spec=site_spec(),
            adapter_digest=digest(adapter),
            nonce=secrets.token_hex(8),
            issued_at=now,
            expires_at=now + 600,
        )
        return dataclasses.replace(made, **changes)

    def order(self, manifest: RoundManifest, adapter: bytes = b"", key: SigningKey | None = None) -> Sealed:
        """Sign the manifest and hand it to the agent."""
        document = sign_document(key or self.coordinator, manifest.to_dict())
        return self.rounds.handle(json.dumps(document), lambda: adapter)

    def by_digest(self, manifest: RoundManifest, **changes: Any) -> RoundOrder:
        """The order for the same round that names the spec by its digest; keywords change its fields."""
        names = {each.name for each in dataclasses.fields(RoundOrder)} - {"kind"}
        return RoundOrder(**{name: getattr(manifest, name) for name in names} | changes)

    def order_by_digest(
        self, order: RoundOrder, spec_json: str, adapter: bytes = b"", key: SigningKey | None = None
    ) -> Sealed:
        """Sign the order and hand it to the agent, with what travels beside it."""
        document = sign_document(key or self.coordinator, order.to_dict())
        return self.rounds.handle(json.dumps(document), lambda: adapter, spec_json)

    def outcomes(self) -> list[tuple[int, str]]:
        """Round and outcome of every reservation."""
        return [(spend.reservation.round, spend.outcome) for spend in self.ledger.spends()]


def body(sealed: Sealed) -> dict[str, Any]:
    """The body of the signed answer."""
    found: dict[str, Any] = json.loads(sealed.document)["body"]
    return found


def some_adapter() -> bytes:
    """The bytes of a global adapter."""
    return pack({"w": np.ones((4, 3), np.float32)})
