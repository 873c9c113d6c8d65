"""Round orders from the agent's socket, of either kind: parsed once, trusted after their signature.

A "round-order" names the run's spec by its digest, and the spec comes beside it. A "round-manifest", which coordinators
before docs/decisions/0111 send, holds the spec. What follows from an order is the same for both: an `Assignment`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fl_shared.canonical import document_digest, parse_json
from fl_shared.documents.order import KIND, RoundOrder, read_spec
from fl_shared.documents.round import Refusal, RoundManifest
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConcordatError, RunError, SignatureError
from fl_shared.identity.signing import open_document

MAX_ORDER_BYTES = 8 << 20
_FIX = "send a document signed by the coordinator"


@dataclass(frozen=True)
class ReceivedOrder:
    """An order of which nothing is believed yet; `run` and `round` are what a refusal must name.

    Attributes:
        document: body, key and signature, if it is honest.
        digest: of the body as it came.
    """

    document: dict[str, Any]
    run: str
    round: int
    digest: str

    @classmethod
    def read(cls, order_json: str, site: str) -> ReceivedOrder:
        """Parse what came; RunError when it is too large, or there is nothing in it to sign a refusal about."""
        if len(order_json) > MAX_ORDER_BYTES:
            raise RunError("the order is too large", fix=_FIX)
        try:
            document = parse_json(order_json, "the order", limit=MAX_ORDER_BYTES)
            body = document["body"]
            order = cls(document, body["run"], body["round"], document_digest(body))
            Refusal.from_dict(Refusal(order.run, order.round, site, order.digest, "failed", "-", 0.0).to_dict())
        except (ValueError, KeyError, TypeError, AttributeError, ConcordatError) as error:
            raise RunError("the order is not a round's", fix=_FIX) from error
        return order

    @property
    def key(self) -> str:
        """The public key that it claims to be signed by."""
        return str(self.document.get("key", ""))

    def require_signed(self, accepts_key: Callable[[str], bool]) -> None:
        """SignatureError unless a key that may sign orders signed it."""
        self.require_accepted(accepts_key)
        open_document(self.document, self.key)

    def require_accepted(self, accepts_key: Callable[[str], bool]) -> None:
        """SignatureError unless the key may sign orders now: what waits in line may see it end."""
        if not accepts_key(self.key):
            raise SignatureError(f"signed by key {self.key[:16]!r}, which is not the coordinator's")


@dataclass(frozen=True)
class Assignment:
    """What a signed order asks for. `digest`: of the order's body, which receipt and refusal answer."""

    run: str
    round: int
    site: str
    spec: RunSpec
    spec_digest: str
    adapter_digest: str
    nonce: str
    issued_at: float
    expires_at: float
    digest: str

    @classmethod
    def of(cls, arrived: ReceivedOrder, spec_json: str) -> Assignment:
        """Read a signed order and its spec; ConfigError when one is not what it must be, or they do not fit."""
        body = arrived.document["body"]
        if body.get("kind") == KIND:
            order = RoundOrder.from_dict(body)
            return cls._from_document(order, read_spec(spec_json, order.spec_digest), arrived.digest)
        manifest = RoundManifest.from_dict(body)
        return cls._from_document(manifest, manifest.spec, arrived.digest)

    @classmethod
    def _from_document(cls, order: RoundOrder | RoundManifest, spec: RunSpec, digest: str) -> Assignment:
        return cls(
            run=order.run,
            round=order.round,
            site=order.site,
            spec=spec,
            spec_digest=order.spec_digest,
            adapter_digest=order.adapter_digest,
            nonce=order.nonce,
            issued_at=order.issued_at,
            expires_at=order.expires_at,
            digest=digest,
        )

    @property
    def at(self) -> dict[str, Any]:
        """Run and round, as log lines name them."""
        return {"run": self.run, "round": self.round}
