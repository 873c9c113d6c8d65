"""Checkpoints of a ledger from elsewhere: heads that somebody noted, and what receipts pin."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fl_shared.errors import ConfigError
from fl_shared.ledger import receipts
from fl_shared.ledger.verify import Checkpoint


def pins(stored: Sequence[receipts.StoredReceipt]) -> list[Checkpoint]:
    """Return what receipts say of the ledger, without asking who signed them: a wrong one is named either way."""
    pinned = []
    for receipt in stored:
        claims = receipt.claims
        size, head, root = (claims.get(name) for name in ("ledger_entries", "ledger_head", "merkle_root"))
        if type(size) is int and isinstance(head, str) and isinstance(root, str):
            source = f"receipt for run {claims.get('run')}, round {claims.get('round')}"
            pinned.append(Checkpoint(size, head, root, source))
    return pinned


def parse_checkpoint(text: str) -> Checkpoint:
    """Return the checkpoint in `entries:hash`; raises ConfigError for anything else."""
    count, _, digest = text.partition(":")
    if not re.fullmatch(r"[0-9]{1,18}", count) or not re.fullmatch(r"[0-9A-Fa-f]{64}", digest):
        raise ConfigError(f"checkpoint {text!r} is not usable", fix="write ENTRIES:HASH, e.g. from a receipt")
    return Checkpoint(int(count), digest.lower(), source=f"checkpoint {count}")
