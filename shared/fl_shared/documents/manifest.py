"""What coordinator and site say to each other about a round: run spec, round manifest, receipt, refusal.

All four are plain documents: the coordinator signs manifests, the site signs receipts and refusals
(`fl_shared.identity.signing.sign_document`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_shared.adapters.safetensors import WIRES
from fl_shared.canonical import canonical_bytes, sha256_hex
from fl_shared.documents.aggregators import AGGREGATIONS, Parameters, check_quorum, read_parameters
from fl_shared.errors import ConfigError, printable, shown
from fl_shared.fields import Fields, load_toml, parse_toml
from fl_shared.names import run_id, run_name, site_id
from fl_shared.privacy.mechanism import LEAST_CLIPPING_NORM, LEAST_NOISE, LEAST_SAMPLING, MOST_NOISE, Mechanism

LORA_TARGETS = ("attention", "shared_experts", "routed_experts")
REFUSAL_CODES = (
    "budget-exhausted",
    "policy",
    "unknown-base-model",
    "unsupported-spec",
    "bad-manifest",
    "suspended",
    "failed",
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HASH = re.compile(r"[0-9a-f]{64}")
_MAX_MESSAGE = 2000


def check_digest(value: object) -> str:
    """A text of the form `sha256:<64 hex digits>`; ConfigError otherwise."""
    if not isinstance(value, str) or _DIGEST.fullmatch(value) is None:
        raise ConfigError(
            f"{shown(value)} is not a digest", fix="write sha256: and 64 hex digits, as `fl-model inspect` does"
        )
    return value


def _check_hash(value: object) -> str:
    if not isinstance(value, str) or _HASH.fullmatch(value) is None:
        raise ConfigError(f"{shown(value)} is not a hash", fix="write 64 lower-case hex digits")
    return value


def document_digest(body: dict[str, Any]) -> str:
    """`sha256:` and the SHA-256 of the document's canonical bytes."""
    return f"sha256:{sha256_hex(canonical_bytes(body))}"


@dataclass(frozen=True, slots=True)
class RunSection:
    """[run]: who takes part, how replies become one adapter, and in what form (`wire`) updates travel."""

    name: str
    base_model: str
    sites: tuple[str, ...]
    rounds: int
    quorum: int
    round_timeout_s: float
    aggregation: str
    wire: str = "float32"


@dataclass(frozen=True, slots=True)
class TaskSection:
    """[task]: what is learnt. The label set is public; its order fixes the head's rows."""

    kind: str
    labels: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class LoraSection:
    """[lora]: rank, alpha and the groups of layers that are adapted (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TrainingSection:
    """[training]: a proposal. The site's policy has the last word."""

    noise_multiplier: float
    clipping_norm: float
    sampling_probability: float
    steps_per_round: int
    learning_rate: float
    head_learning_rate: float
    momentum: float
    seed_adapter: int


@dataclass(frozen=True)  # no slots: what is computed of it is kept
class RunSpec:
    """One federated training, as an admin asks for it. `aggregation`: the aggregator's parameters, by name."""

    run: RunSection
    task: TaskSection
    lora: LoraSection
    training: TrainingSection
    aggregation: Parameters = ()

    @classmethod
    def from_toml(cls, path: Path) -> RunSpec:
        """Read and check a spec file; ConfigError names file, field, value and fix."""
        return cls.from_dict(load_toml(path), where=str(path))

    @classmethod
    def from_text(cls, text: str, *, where: str = "spec") -> RunSpec:
        """Read and check a spec's TOML text, as it comes over the wire; ConfigError as in `from_toml`."""
        return cls.from_dict(parse_toml(text, where), where=where)

    @classmethod
    def from_dict(cls, table: Any, *, where: str = "spec") -> RunSpec:
        """Read and check a spec; ConfigError names field, value and fix."""
        top = Fields(table, where)
        f = top.section("run")
        sites = f.texts("sites", high=10_000)
        for site in sites:
            try:
                site_id(site)
            except ConfigError as error:
                raise f.fail("sites", f"names {site!r}: {error.message}", error.fix) from error
        run = RunSection(
            name=f.named("name", run_name),
            base_model=f.named("base_model", check_digest),
            sites=sites,
            rounds=f.integer("rounds", low=1, high=100_000),
            quorum=f.integer("quorum", low=1, high=len(sites)),
            round_timeout_s=f.number("round_timeout_s", low=1, high=7 * 86_400, default=600.0),
            aggregation=f.choice("aggregation", AGGREGATIONS, default="fedavg"),
            wire=f.choice("wire", WIRES, default="float32"),
        )
        f.done()
        f = top.section("aggregation", optional=True)
        parameters = read_parameters(run.aggregation, f)
        try:
            check_quorum(run.aggregation, parameters, run.quorum)
        except ConfigError as error:
            raise ConfigError(f"{where} [aggregation]: {error.message}", fix=error.fix) from error
        f = top.section("task")
        task = TaskSection(
            kind=f.choice("kind", ["classification"]),
            labels=f.texts("labels", low=2, high=10_000),
            max_tokens=f.integer("max_tokens", low=1, high=131_072),
        )
        f.done()
        f = top.section("lora")
        rank = f.integer("rank", low=1, high=1024)
        lora = LoraSection(
            rank=rank,
            alpha=f.number("alpha", low=0, high=1e6, above=True, default=2.0 * rank),
            targets=f.texts("targets", high=len(LORA_TARGETS)),
        )
        for target in lora.targets:
            if target not in LORA_TARGETS:
                raise f.fail("targets", f"names {target!r}", f"choose from {', '.join(LORA_TARGETS)}")
        f.done()
        f = top.section("training")
        training = TrainingSection(
            noise_multiplier=f.number("noise_multiplier", low=LEAST_NOISE, high=MOST_NOISE),
            clipping_norm=f.number("clipping_norm", low=LEAST_CLIPPING_NORM, high=1e12),
            sampling_probability=f.number("sampling_probability", low=LEAST_SAMPLING, high=1),
            steps_per_round=f.integer("steps_per_round", low=1, high=1_000_000),
            learning_rate=f.number("learning_rate", low=0, high=1e6, above=True),
            head_learning_rate=f.number("head_learning_rate", low=0, high=1e6, above=True),
            momentum=f.number("momentum", low=0, high=1, below=True, default=0.9),
            seed_adapter=f.integer("seed_adapter", low=0, high=2**63 - 1, default=0),
        )
        f.done()
        top.done()
        return cls(run=run, task=task, lora=lora, training=training, aggregation=parameters)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back to an equal spec."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain | {"aggregation": dict(self.aggregation)}

    @functools.cached_property
    def canonical(self) -> str:
        """The canonical JSON: what the digest is of, and what travels beside an order."""
        return canonical_bytes(self.to_dict()).decode()

    @functools.cached_property
    def digest(self) -> str:
        """The digest of the canonical spec."""
        return f"sha256:{sha256_hex(self.canonical.encode())}"

    def mechanism(self, steps: int | None = None) -> Mechanism:
        """The mechanism of one round as proposed, or of `steps` steps."""
        t = self.training
        return Mechanism(
            noise_multiplier=t.noise_multiplier,
            sampling_probability=t.sampling_probability,
            steps=t.steps_per_round if steps is None else steps,
            clipping_norm=t.clipping_norm,
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class RoundManifest:
    """One site's order for one round, signed by the coordinator. `expires_at` in Unix seconds."""

    run: str
    round: int
    site: str
    spec: RunSpec
    adapter_digest: str
    nonce: str
    issued_at: float
    expires_at: float

    @property
    def spec_digest(self) -> str:
        """The digest of the spec inside."""
        return self.spec.digest

    @property
    def digest(self) -> str:
        """The digest of the manifest's body."""
        return document_digest(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "kind": "round-manifest",
            "run": self.run,
            "round": self.round,
            "site": self.site,
            "spec": self.spec.to_dict(),
            "spec_digest": self.spec_digest,
            "adapter_digest": self.adapter_digest,
            "nonce": self.nonce,
            "issued_at": float(self.issued_at),
            "expires_at": float(self.expires_at),
        }

    @classmethod
    def from_dict(cls, table: Any) -> RoundManifest:
        """Read and check a manifest's body; ConfigError on anything else."""
        f = Fields(table, "manifest")
        f.choice("kind", ["round-manifest"])
        made = cls(
            run=f.named("run", run_id),
            round=f.integer("round", low=1, high=100_000),
            site=f.named("site", site_id),
            spec=RunSpec.from_dict(f.table("spec"), where="manifest spec"),
            adapter_digest=f.named("adapter_digest", check_digest),
            nonce=f.text("nonce"),
            issued_at=f.number("issued_at", low=0),
            expires_at=f.number("expires_at", low=0),
        )
        if f.text("spec_digest") != made.spec_digest:
            raise f.fail("spec_digest", "is not the digest of the spec inside", "ask the coordinator to sign anew")
        f.done()
        return made


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a site did in one round, signed by the site. Every value in it is public or accounted for.

    Attributes:
        entry_id: the ledger entry that was written before the update left.
        ledger_head: the ledger's last hash (64 hex digits) after that entry, of `ledger_entries` entries.
        epsilon_spent_total: charged to the data set so far at `delta`, by the ledger's gate.
    """

    run: str
    round: int
    site: str
    manifest_digest: str
    spec_digest: str
    update_digest: str
    model_digest: str
    mechanism: Mechanism
    steps_executed: int
    epsilon_spent_total: float
    delta: float
    privacy_unit: str
    ledger_head: str
    ledger_entries: int
    merkle_root: str
    entry_id: str
    created_at: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        table = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        table |= {name: float(table[name]) for name in ("epsilon_spent_total", "delta", "created_at")}
        return {"kind": "receipt"} | table | {"mechanism": self.mechanism.to_dict()}

    @classmethod
    def from_dict(cls, table: Any) -> Receipt:
        """Read and check a receipt's body; ConfigError on anything else."""
        f = Fields(table, "receipt")
        f.choice("kind", ["receipt"])
        made = cls(
            run=f.named("run", run_id),
            round=f.integer("round", low=1, high=100_000),
            site=f.named("site", site_id),
            manifest_digest=f.named("manifest_digest", check_digest),
            spec_digest=f.named("spec_digest", check_digest),
            update_digest=f.named("update_digest", check_digest),
            model_digest=f.named("model_digest", check_digest),
            mechanism=Mechanism.from_dict(f.table("mechanism")),
            steps_executed=f.integer("steps_executed", low=0, high=10**9),
            epsilon_spent_total=f.number("epsilon_spent_total", low=0, high=math.inf),
            delta=f.number("delta", low=0, high=1),
            privacy_unit=f.text("privacy_unit"),
            ledger_head=f.named("ledger_head", _check_hash),
            ledger_entries=f.integer("ledger_entries", low=1, high=2**62),
            merkle_root=f.named("merkle_root", _check_hash),
            entry_id=f.text("entry_id"),
            created_at=f.number("created_at", low=0),
        )
        f.done()
        return made


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a site did not take part in a round, signed by the site."""

    run: str
    round: int
    site: str
    manifest_digest: str
    code: str
    message: str
    created_at: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the message is cut to 2000 characters, without control characters."""
        message = printable(self.message).strip()[:_MAX_MESSAGE] or self.code
        changed = {"message": message, "created_at": float(self.created_at)}
        return {"kind": "refusal"} | dataclasses.asdict(self) | changed

    @classmethod
    def from_dict(cls, table: Any) -> Refusal:
        """Read and check a refusal's body; ConfigError on anything else."""
        f = Fields(table, "refusal")
        f.choice("kind", ["refusal"])
        made = cls(
            run=f.named("run", run_id),
            round=f.integer("round", low=1, high=100_000),
            site=f.named("site", site_id),
            manifest_digest=f.named("manifest_digest", check_digest),
            code=f.choice("code", REFUSAL_CODES),
            message=f.text("message"),
            created_at=f.number("created_at", low=0),
        )
        f.done()
        return made
