"""Updates leave a site in the spec's form: encoded before they are stored, settled and signed for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fl_shared.adapters.safetensors import WIRES, digest, unpack
from fl_shared.documents.round import Receipt
from fl_shared.errors import DataError
from fl_shared.identity.signing import open_document
from helpers.sites import Site, Trained, body, site_spec


@pytest.mark.parametrize("wire", WIRES)
def test_ledger_receipt_and_store_hold_the_digest_of_the_encoded_bytes(tmp_path: Path, wire: str) -> None:
    """What is digested in ledger, receipt and store are exactly the bytes that leave; a repeat sends them again."""
    site = Site(tmp_path)
    trained: list[np.ndarray] = []

    def noted(made: Trained) -> Trained:
        trained.append(made.update["w"])
        return made

    site.trainer.change = noted
    manifest = site.manifest(spec=site_spec(wire=wire))
    sealed = site.order(manifest)
    receipt = Receipt.from_dict(open_document(json.loads(sealed.document), site.key.public_hex))
    (spend,) = site.ledger.spends()
    order = site.store.find("demo-1", 1)
    assert order is not None
    assert digest(sealed.payload) == receipt.update_digest == spend.release_digest == order.update_digest
    assert site.store.update(order) == sealed.payload
    found = unpack(sealed.payload, wire=wire)["w"]
    np.testing.assert_allclose(found, trained[0], rtol=0, atol=float(np.abs(trained[0]).max()) / 100)
    for other in set(WIRES) - {wire}:
        with pytest.raises(DataError):
            unpack(sealed.payload, wire=other)
    assert site.order(manifest).payload == sealed.payload
    assert body(site.order(manifest))["entry_id"] == receipt.entry_id
    assert site.trainer.calls == 1
