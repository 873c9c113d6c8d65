"""`fl-server revoke`: shut an admin or auditor out from the next call on.

For a site use `fl-admin sites revoke`.
"""

from __future__ import annotations

import argparse

from fl_server.access.log import local_user
from fl_server.cli.server.certificates import facts_of, opened
from fl_server.cli.server.options import add_common
from fl_server.identity.operators import OPERATOR_ROLES
from fl_shared.cli.output import print_json

EXAMPLES = """
fl-server revoke --role auditor --name anna-smith
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    parser.add_argument("--role", choices=OPERATOR_ROLES, required=True)
    parser.add_argument("--name", required=True)


def run(arguments: argparse.Namespace) -> int:
    """Revoke them, and record that."""
    at = opened(arguments)
    logged = {"role": arguments.role, "name": arguments.name}
    with at.log.recorded(local_user(), "certificates revoke", logged):
        rows = at.operators.revoke(arguments.role, arguments.name)
    if arguments.json:
        print_json({"revoked": [facts_of(row) for row in rows]})
    else:
        print(f"revoked {len(rows)} of {arguments.role} {arguments.name}")
    return 0
