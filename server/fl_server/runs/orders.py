"""Orders to the sites of a run: all of a round's signed and stored in one transaction, and known again in a receipt.

A site that has announced it (`SiteRow.orders`) gets a `RoundOrder`, which names the spec by its digest, and the spec
beside it; every other site gets a `RoundManifest`, which holds the spec (docs/decisions/0111). Of a `RoundOrder` the
document is not stored: the row, the run's `spec_digest` and the key make it again, signature included.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import insert

from fl_server.db.models import ManifestRow
from fl_server.db.store import Store
from fl_shared.canonical import document_digest
from fl_shared.documents.order import BY_DIGEST, RoundOrder
from fl_shared.documents.round import RoundManifest
from fl_shared.documents.spec import RunSpec
from fl_shared.identity.signing import SigningKey, sign_document


@dataclass(frozen=True)
class Issued:
    """A signed order as it is sent.

    Attributes:
        document: JSON text.
        digest: of the order's body, which a receipt names.
        spec_json: what travels beside it; "" when the order holds the spec.
    """

    document: str
    digest: str
    spec_json: str = ""


class Orders:
    """The orders of one coordinator."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def issue(
        self, spec: RunSpec, round: int, sites: Mapping[str, int], adapter_digest: str, key: SigningKey, ttl_s: float
    ) -> dict[str, Issued]:
        """Sign and store the orders of a round, by site; `sites`: each site and the orders that it reads."""
        issued, rows = {}, []
        for site, reads in sites.items():
            order = _made(spec, round, site, adapter_digest, ttl_s, by_digest=reads >= BY_DIGEST)
            document = sign_document(key, order.to_dict())
            text = json.dumps(document, sort_keys=True)
            beside = spec.canonical if isinstance(order, RoundOrder) else ""
            issued[site] = Issued(text, document_digest(document["body"]), beside)
            rows.append(
                {
                    "digest": issued[site].digest,
                    "run": order.run,
                    "round": round,
                    "site": site,
                    "adapter_digest": adapter_digest,
                    "document_json": "" if beside else text,
                    "nonce": order.nonce,
                    "issued_at": order.issued_at,
                    "expires_at": order.expires_at,
                }
            )
        with self._store.write() as session:
            session.execute(insert(ManifestRow), rows)
        return issued

    def issued(self, order_digest: str, run: str, round: int, site: str, adapter_digest: str) -> bool:
        """Whether this order, of either kind, was signed for exactly this run, round, site and adapter."""
        with self._store.read() as session:
            row = session.get(ManifestRow, order_digest)
        return row is not None and (row.run, row.round, row.site, row.adapter_digest) == (
            run, round, site, adapter_digest,
        )  # fmt: skip


def _made(
    spec: RunSpec, round: int, site: str, adapter_digest: str, ttl_s: float, *, by_digest: bool
) -> RoundOrder | RoundManifest:
    now = time.time()
    run, nonce, until = spec.run.name, secrets.token_hex(16), now + ttl_s
    if by_digest:
        return RoundOrder(run, round, site, spec.digest, adapter_digest, nonce, now, until)
    return RoundManifest(run, round, site, spec, adapter_digest, nonce, now, until)
