"""One site's order for one round, which names the run's spec by its digest; the spec travels beside it.

The spec travels as its canonical bytes, the same for all sites and rounds. It has no signature of its own: the signed
order's digest vouches for it. A site that reads orders of this kind says so with `ORDERS_HEADER` when it announces its
base model; the others get `documents.round.RoundManifest`, which holds the spec (docs/decisions/0111).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from fl_shared.canonical import canonical_bytes, parse_json, sha256_hex
from fl_shared.declaration import Digested
from fl_shared.documents.round import Round
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConfigError
from fl_shared.fields import Choice, Digest, RunId, SiteName, Text, Time

KIND = "round-order"
BY_DIGEST = 2
"""What a site announces that reads `RoundOrder`. 0: it has announced nothing, and reads `RoundManifest` alone."""
ORDERS_HEADER = "concordat-orders"
MAX_SPEC_BYTES = 4 << 20
_KEPT = 8
_SEND_WHOLE = "the coordinator sends the spec beside each order, as it was signed for"


@dataclass(frozen=True)
class RoundOrder(Digested):
    """One site's order for one round, signed by the coordinator. Times in Unix seconds."""

    WHERE: ClassVar = "order"

    kind: Annotated[str, Choice([KIND])] = field(default=KIND, kw_only=True)
    run: RunId
    round: Round
    site: SiteName
    spec_digest: Digest
    adapter_digest: Digest
    nonce: Text
    issued_at: Time
    expires_at: Time


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
