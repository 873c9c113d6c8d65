"""What coordinator and site say to each other about a round: order (manifest), receipt, refusal.

All three are plain documents: the coordinator signs manifests, the site signs receipts and refusals
(`fl_shared.identity.signing.sign_document`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from fl_shared.declaration import Digested, Document
from fl_shared.documents.spec import MOST_ROUNDS, RunSpec
from fl_shared.errors import ConfigError, printable
from fl_shared.fields import Between, Choice, Digest, Hash, RunId, SiteName, Text, Time, Whole
from fl_shared.privacy.mechanism import Mechanism

REFUSAL_CODES = (
    "budget-exhausted",
    "policy",
    "unknown-base-model",
    "unsupported-spec",
    "bad-manifest",
    "suspended",
    "failed",
)
_MAX_MESSAGE = 2000
Round = Annotated[int, Whole(1, MOST_ROUNDS)]


@dataclass(frozen=True)
class RoundManifest(Digested):
    """One site's order for one round, signed by the coordinator. `expires_at` in Unix seconds."""

    WHERE: ClassVar = "manifest"

    kind: Annotated[str, Choice(["round-manifest"])] = field(default="round-manifest", kw_only=True)
    run: RunId
    round: Round
    site: SiteName
    spec: RunSpec
    adapter_digest: Digest
    nonce: Text
    issued_at: Time
    expires_at: Time

    @property
    def spec_digest(self) -> str:
        """The digest of the spec inside."""
        return self.spec.digest

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the digest of the spec beside it."""
        return super().to_dict() | {"spec_digest": self.spec_digest}

    @classmethod
    def from_dict(cls, table: Any, *, where: str = "", base: Path | None = None) -> Self:
        """Read and check a manifest's body; ConfigError on anything else, also when `spec_digest` is another."""
        stated = table.get("spec_digest") if isinstance(table, Mapping) else None
        body = {name: value for name, value in table.items() if name != "spec_digest"} if stated is not None else table
        manifest = super().from_dict(body, where=where, base=base)
        if stated is None:
            raise ConfigError(f"{where or cls.WHERE}: spec_digest is missing", fix="add spec_digest: a name")
        if stated != manifest.spec_digest:
            raise ConfigError(
                f"{where or cls.WHERE}: spec_digest is not the digest of the spec inside",
                fix="ask the coordinator to sign it again",
            )
        return manifest


@dataclass(frozen=True)
class Receipt(Document):
    """What a site did in one round, signed by the site. Every value in it is public or accounted for.

    Attributes:
        entry_id: the ledger entry that was written before the update left.
        ledger_head: the ledger's last hash (64 hex digits) after that entry, of `ledger_entries` entries.
        epsilon_spent_total: charged to the data set so far at `delta`, by the ledger's gate.
    """

    WHERE: ClassVar = "receipt"

    kind: Annotated[str, Choice(["receipt"])] = field(default="receipt", kw_only=True)
    run: RunId
    round: Round
    site: SiteName
    manifest_digest: Digest
    spec_digest: Digest
    update_digest: Digest
    model_digest: Digest
    mechanism: Mechanism
    steps_executed: Annotated[int, Whole(0, 10**9)]
    epsilon_spent_total: Annotated[float, Between(low=0)]
    delta: Annotated[float, Between(0, 1)]
    privacy_unit: Text
    ledger_head: Hash
    ledger_entries: Annotated[int, Whole(1, 2**62)]
    merkle_root: Hash
    entry_id: Text
    created_at: Time


@dataclass(frozen=True)
class Refusal(Document):
    """Why a site did not take part in a round, signed by the site."""

    WHERE: ClassVar = "refusal"

    kind: Annotated[str, Choice(["refusal"])] = field(default="refusal", kw_only=True)
    run: RunId
    round: Round
    site: SiteName
    manifest_digest: Digest
    code: Annotated[str, Choice(REFUSAL_CODES)]
    message: Text
    created_at: Time

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the message is cut to 2000 characters, without control characters."""
        return super().to_dict() | {"message": printable(self.message).strip()[:_MAX_MESSAGE] or self.code}
