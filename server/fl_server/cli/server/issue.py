"""`fl-server issue`: make the certificate of an admin or auditor.

Writes certificate, CA and a profile for `fl-admin --profile`; and a key (mode 0600), unless --request names a signing
request (PEM), with which the private key never leaves its owner.
"""

from __future__ import annotations

import argparse

from fl_server.access.log import local_user
from fl_server.cli.server.certificates import facts_of, opened
from fl_server.cli.server.options import add_common
from fl_server.cli.show import moment
from fl_server.identity.authority import Authority
from fl_server.identity.operators import OPERATOR_DAYS, OPERATOR_ROLES, write_credentials
from fl_shared.cli.output import print_json
from fl_shared.cli.verbs import path
from fl_shared.identity.fingerprints import grouped

EXAMPLES = """
fl-server issue --role auditor --name anna-smith --out anna/
fl-server issue --role admin --name bo-lee --request bo.csr --out bo/ --days 90
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    parser.add_argument("--role", choices=OPERATOR_ROLES, required=True, help="what its holder may do")
    parser.add_argument("--name", required=True, help="who holds it, e.g. anna-smith")
    parser.add_argument("--out", type=path, required=True, help="the directory to write; nothing is overwritten")
    parser.add_argument("--request", type=path, default=None, help="the holder's own certificate signing request")
    parser.add_argument("--days", type=float, default=OPERATOR_DAYS, help="validity, default %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Issue it, and record that."""
    at = opened(arguments)
    authority = Authority.load(at.home.ca_key, at.home.ca)
    logged = {"role": arguments.role, "name": arguments.name, "days": float(arguments.days)}
    with at.log.recorded(local_user(), "certificates issue", logged):
        certificate = write_credentials(
            authority, at.home.settings(), role=arguments.role, name=arguments.name, out=arguments.out,
            request=arguments.request, days=arguments.days,
        )  # fmt: skip
        row = at.operators.record(certificate)
    profile = arguments.out / f"{row.role}.toml"
    if arguments.json:
        print_json({**facts_of(row), "profile": str(profile)})
        return 0
    print(f"{row.role} {row.name}: valid until {moment(row.expires_at)}")
    print(f"  fingerprint  {grouped(row.fingerprint)}")
    print(f"  profile      {profile}; its folder goes to {row.name} by a safe way")
    return 0
