"""The verbs of `fl-server` about certificates and keys: issue, issued, revoke, rotate-key."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

from fl_server.access.log import AdminLog, local_user
from fl_server.cli.show import moment
from fl_server.db.models import OperatorRow
from fl_server.db.store import Store
from fl_server.home.layout import ServerHome
from fl_server.identity.authority import Authority
from fl_server.identity.operators import OPERATOR_DAYS, OPERATOR_ROLES, Operators, write_credentials
from fl_server.identity.rotation import DAY_S, GRACE_S, rotate
from fl_shared.cli.console import table
from fl_shared.cli.parsers import describe, path
from fl_shared.identity.fingerprints import spoken, spoken_key


def add_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs to the parser of `fl-server`."""

    def verb(name: str, text: str, examples: str, more: str = "") -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = verbs.add_parser(name, parents=[common], help=text)
        describe(made, text, examples, more)
        return made

    issue = verb(
        "issue",
        "make the certificate of an admin or auditor",
        "fl-server issue --role auditor --name anna-smith --out anna/\n"
        "fl-server issue --role admin --name bo-lee --request bo.csr --out bo/ --days 90",
        "Writes certificate, CA and a profile for `fl-admin --profile`; and a key (mode 0600), unless --request names "
        "a signing request (PEM), with which the private key never leaves its owner.",
    )
    issue.add_argument("--role", choices=OPERATOR_ROLES, required=True, help="what its holder may do")
    issue.add_argument("--name", required=True, help="who holds it, e.g. anna-smith")
    issue.add_argument("--out", type=path, required=True, help="the directory to write; nothing is overwritten")
    issue.add_argument("--request", type=path, default=None, help="the holder's own certificate signing request")
    issue.add_argument("--days", type=float, default=OPERATOR_DAYS, help="validity, default %(default)s")
    verb("issued", "list the certificates of admins and auditors", "fl-server issued\nfl-server issued --json")
    revoke = verb(
        "revoke",
        "shut an admin or auditor out from the next call on",
        "fl-server revoke --role auditor --name anna-smith",
        "For a site use `fl-admin sites revoke`.",
    )
    revoke.add_argument("--role", choices=OPERATOR_ROLES, required=True)
    revoke.add_argument("--name", required=True)
    rotation = verb(
        "rotate-key",
        "change the key that signs orders",
        "fl-server rotate-key --grace-days 14\nfl-server rotate-key --grace-days 0 --json",
        "The old key vouches for the new one; sites follow by themselves and accept the old key for the grace. Nothing "
        "needs to be restarted.",
    )
    rotation.add_argument(
        "--grace-days", type=float, default=GRACE_S / DAY_S,
        help="how long orders of the old key stay good, default %(default)g; 0 when it may have been copied",
    )  # fmt: skip


@dataclass(frozen=True)
class _Opened:
    home: ServerHome
    operators: Operators
    log: AdminLog


def _opened(arguments: argparse.Namespace) -> _Opened:
    home = ServerHome.open(arguments.home)
    store = Store(home.database_url())
    store.migrate()
    return _Opened(home, Operators.of(home, store), AdminLog.of(home, store))


def _facts(row: OperatorRow) -> dict[str, Any]:
    return {
        "role": row.role,
        "name": row.name,
        "fingerprint": row.fingerprint,
        "issued_at": row.issued_at,
        "expires_at": row.expires_at,
        "revoked_at": row.revoked_at,
    }


def issue(arguments: argparse.Namespace) -> int:
    """`fl-server issue`."""
    opened = _opened(arguments)
    authority = Authority.load(opened.home.ca_key, opened.home.ca)
    told = {"role": arguments.role, "name": arguments.name, "days": float(arguments.days)}
    with opened.log.recorded(local_user(), "certificates issue", told):
        certificate = write_credentials(
            authority, opened.home.settings(), role=arguments.role, name=arguments.name, out=arguments.out,
            request=arguments.request, days=arguments.days,
        )  # fmt: skip
        row = opened.operators.record(certificate)
    profile = arguments.out / f"{row.role}.toml"
    if arguments.json:
        print(json.dumps({**_facts(row), "profile": str(profile)}))
        return 0
    print(f"{row.role} {row.name}: valid until {moment(row.expires_at)}")
    print(f"  fingerprint  {spoken(row.fingerprint)}")
    print(f"  profile      {profile}; its folder goes to {row.name} by a safe way")
    return 0


def issued(arguments: argparse.Namespace) -> int:
    """`fl-server issued`."""
    rows = _opened(arguments).operators.all()
    if arguments.json:
        print(json.dumps({"certificates": [_facts(row) for row in rows]}))
        return 0
    table(
        ["role", "name", "valid until", "revoked", "fingerprint"],
        [[row.role, row.name, moment(row.expires_at), moment(row.revoked_at), spoken(row.fingerprint)] for row in rows],
    )
    return 0


def revoke(arguments: argparse.Namespace) -> int:
    """`fl-server revoke`."""
    opened = _opened(arguments)
    told = {"role": arguments.role, "name": arguments.name}
    with opened.log.recorded(local_user(), "certificates revoke", told):
        rows = opened.operators.revoke(arguments.role, arguments.name)
    if arguments.json:
        print(json.dumps({"revoked": [_facts(row) for row in rows]}))
    else:
        print(f"revoked {len(rows)} of {arguments.role} {arguments.name}")
    return 0


def rotate_key(arguments: argparse.Namespace) -> int:
    """`fl-server rotate-key`."""
    opened = _opened(arguments)
    with opened.log.recorded(local_user(), "key rotate", {"grace_days": float(arguments.grace_days)}):
        change = rotate(opened.home, arguments.grace_days * DAY_S)
    body = change["body"]
    if arguments.json:
        print(json.dumps(change))
        return 0
    print("orders are signed by a new key from now on")
    print(f"  new key  {spoken_key(body['new_key'])}")
    print(f"  old key  {spoken_key(change['key'])}; good until {moment(body['old_until'])}")
    return 0


ACTIONS = {"issue": issue, "issued": issued, "revoke": revoke, "rotate-key": rotate_key}
