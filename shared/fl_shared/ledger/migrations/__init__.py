"""Schema versions of the ledger, run by `Ledger.open`. Each file below `versions/` is one step, both ways."""

from __future__ import annotations

HEAD = "0002"
