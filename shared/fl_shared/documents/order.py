"""One site's order for one round, which names the run's spec by its digest; the spec travels beside it.

The spec travels as its canonical bytes, the same for all sites and rounds. It has no signature of its own: the signed
order's digest vouches for it. A site that reads orders of this kind says so with `ORDERS_HEADER` when it announces its
base model; the others get `documents.manifest.RoundManifest`, which holds the spec (docs/decisions/0111).
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

from fl_shared.canonical import canonical_bytes, parse_json, sha256_hex
from fl_shared.documents.manifest import RunSpec, check_digest, document_digest
from fl_shared.errors import ConfigError
from fl_shared.fields import Fields
from fl_shared.names import run_id, site_id

KIND = "round-order"
BY_DIGEST = 2
"""What a site announces that reads `RoundOrder`. 0: it has announced nothing, and reads `RoundManifest` alone."""
ORDERS_HEADER = "concordat-orders"
MAX_SPEC_BYTES = 4 << 20
_KEPT = 8
_SEND_WHOLE = "the coordinator sends the spec beside each order, as it was signed for"


@dataclass(frozen=True, slots=True)
class RoundOrder:
    """One site's order for one round, signed by the coordinator. Times in Unix seconds."""

    run: str
    round: int
    site: str
    spec_digest: str
    adapter_digest: str
    nonce: str
    issued_at: float
    expires_at: float

    @property
    def digest(self) -> str:
        """The digest of the order's body."""
        return document_digest(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        times = {"issued_at": float(self.issued_at), "expires_at": float(self.expires_at)}
        return {"kind": KIND} | asdict(self) | times

    @classmethod
    def from_dict(cls, table: Any) -> RoundOrder:
        """Read and check an order's body; ConfigError on anything else."""
        f = Fields(table, "order")
        f.choice("kind", [KIND])
        made = cls(
            run=f.named("run", run_id),
            round=f.integer("round", low=1, high=100_000),
            site=f.named("site", site_id),
            spec_digest=f.named("spec_digest", check_digest),
            adapter_digest=f.named("adapter_digest", check_digest),
            nonce=f.text("nonce"),
            issued_at=f.number("issued_at", low=0),
            expires_at=f.number("expires_at", low=0),
        )
        f.done()
        return made


@functools.lru_cache(maxsize=_KEPT)
def read_spec(spec_json: str, digest: str) -> RunSpec:
    """The spec that an order names by `digest`, from the text that came beside it; parsed once for each digest.

    Raises:
        ConfigError: there is none, it is larger than 4 MiB, has another digest, is not canonical JSON, or no spec.
    """
    if not spec_json:
        raise ConfigError("the order came without its spec", fix=_SEND_WHOLE)
    if len(spec_json) > MAX_SPEC_BYTES:
        raise ConfigError(f"the spec has {len(spec_json)} characters, more than {MAX_SPEC_BYTES}", fix=_SEND_WHOLE)
    raw = spec_json.encode("utf-8", "surrogatepass")
    if f"sha256:{sha256_hex(raw)}" != digest:
        raise ConfigError("the spec is not the one that the order names", fix=_SEND_WHOLE)
    table = parse_json(spec_json, "the order's spec", limit=MAX_SPEC_BYTES)
    spec = RunSpec.from_dict(table, where="the order's spec")
    if canonical_bytes(table) != raw:
        raise ConfigError("the spec is not in its canonical form", fix=_SEND_WHOLE)
    return spec
