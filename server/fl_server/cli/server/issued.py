"""`fl-server issued`: list the certificates of admins and auditors."""

from __future__ import annotations

import argparse

from fl_server.cli.server.certificates import facts_of, opened
from fl_server.cli.server.options import add_common
from fl_server.cli.show import moment
from fl_shared.cli.output import print_json, table
from fl_shared.identity.fingerprints import grouped

EXAMPLES = """
fl-server issued
fl-server issued --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print them."""
    rows = opened(arguments).operators.all()
    if arguments.json:
        print_json({"certificates": [facts_of(row) for row in rows]})
        return 0
    table(
        ["role", "name", "valid until", "revoked", "fingerprint"],
        [
            [row.role, row.name, moment(row.expires_at), moment(row.revoked_at), grouped(row.fingerprint)]
            for row in rows
        ],
    )
    return 0
