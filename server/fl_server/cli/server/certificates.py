"""What `issue`, `issued`, `revoke` and `rotate-key` work on: the home, its operators, and the log that records them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from fl_server.access.log import AdminLog
from fl_server.db.models import OperatorRow
from fl_server.db.store import Store
from fl_server.home.layout import ServerHome
from fl_server.identity.operators import Operators


@dataclass(frozen=True)
class Opened:
    """An open coordinator's home."""

    home: ServerHome
    operators: Operators
    log: AdminLog


def opened(arguments: argparse.Namespace) -> Opened:
    """Open the home that the options name, with its database."""
    home = ServerHome.open(arguments.home)
    store = Store(home.database_url())
    store.migrate()
    return Opened(home, Operators.of(home, store), AdminLog.of(home, store))


def facts_of(row: OperatorRow) -> dict[str, Any]:
    """A certificate as JSON values."""
    return {
        "role": row.role,
        "name": row.name,
        "fingerprint": row.fingerprint,
        "issued_at": row.issued_at,
        "expires_at": row.expires_at,
        "revoked_at": row.revoked_at,
    }
