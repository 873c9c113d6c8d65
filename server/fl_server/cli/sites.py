"""`fl-admin sites`: invite, list, show, revoke."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cryptography import x509

from fl_server.cli import complete
from fl_server.cli.connection import Profile
from fl_server.cli.show import moment, plain, print_json
from fl_server.cli.verbs import add_group, add_verb, argument
from fl_shared.cli.console import table
from fl_shared.identity.fingerprints import spoken, spoken_key
from fl_shared.identity.x509 import fingerprint
from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.control_pb2_grpc import ControlStub

_DAY_S = 86_400.0


def add(groups: Any) -> None:
    """Add the group."""
    verbs = add_group(groups, "sites", "who may take part")
    invite = add_verb(
        verbs, "invite", _invite, "print a one-time enrolment token",
        more="An earlier token of the site that was not used stops counting.",
        examples="fl-admin sites invite hospital-001\nfl-admin sites invite hospital-001 --days 2 --json",
    )  # fmt: skip
    argument(invite, "site", metavar="SITE", completer=complete.sites, help="the site's name, e.g. hospital-001")
    invite.add_argument("--days", type=float, default=7.0, help="how long the token is valid, default %(default)g")
    add_verb(verbs, "list", _list, "every site and its state", examples="fl-admin sites list")
    shown = add_verb(
        verbs, "show", _show, "one site: fingerprints, certificate, base model, runs, epsilon of its newest receipt",
        more="`fl-client enroll` shows the site the same fingerprints: compare them by telephone.",
        examples="fl-admin sites show hospital-001\nfl-admin sites show hospital-001 --json",
    )  # fmt: skip
    argument(shown, "site", metavar="SITE", completer=complete.sites)
    revoke = add_verb(
        verbs, "revoke", _revoke, "shut a site out from its next request on",
        more="Its receipts and its part in committed rounds stay. Runs that name it go on while the quorum holds.",
        examples='fl-admin sites revoke hospital-001 --reason "key lost, told by telephone"',
    )  # fmt: skip
    argument(revoke, "site", metavar="SITE", completer=complete.sites)
    revoke.add_argument("--reason", default="", help="why; it stands in the admin log")


def _invite(stub: ControlStub, arguments: argparse.Namespace) -> int:
    made = stub.InviteSite(pb.InviteSiteRequest(site=arguments.site, ttl_s=arguments.days * _DAY_S))
    if arguments.json:
        print_json(plain(made))
    else:
        print(made.token)
        print(f"valid once, until {moment(made.expires_at)}; hand it to {made.site} by a safe way", file=sys.stderr)
    return 0


def _list(stub: ControlStub, arguments: argparse.Namespace) -> int:
    reply = stub.ListSites(pb.ListSitesRequest())
    if arguments.json:
        print_json({"sites": [plain(site) for site in reply.sites]})
        return 0
    table(
        ["site", "state", "online", "last seen", "certificate until"],
        [
            [each.site, each.state, "yes" if each.online else "no", moment(each.last_seen_at),
             moment(each.certificate_expires_at)]
            for each in reply.sites
        ],
    )  # fmt: skip
    return 0


def _print(site: pb.Site, as_json: bool) -> int:
    if as_json:
        print_json(plain(site))
        return 0
    rows = [
        ("site", site.site),
        ("state", f"{site.state}, {'online' if site.online else 'not online'}"),
        ("last seen", moment(site.last_seen_at)),
        ("invited", moment(site.invited_at)),
        ("enrolled", moment(site.enrolled_at)),
        ("revoked", moment(site.revoked_at)),
        ("site's certificate", spoken(site.certificate_fingerprint) if site.certificate_fingerprint else "-"),
        ("  valid until", moment(site.certificate_expires_at)),
        ("site's key", spoken_key(site.signing_key) if site.signing_key else "-"),
        ("Flower's node", f"{site.node_id or '-'}  {site.node_key_fingerprint}"),
        ("base model", site.base_model or "not announced yet"),
        ("  its layers", f"{', '.join(site.base_targets) or '-'}, told {moment(site.base_announced_at)}"),
        ("runs", ", ".join(site.runs) or "-"),
    ]
    if site.delta:
        rows.append(("epsilon", f"{site.epsilon_spent_total:.3f} spent at delta {site.delta:g}, by its newest receipt"))
    _lines(*rows)
    return 0


def _lines(*rows: tuple[str, str]) -> None:
    for name, value in rows:
        print(f"{name:<19} {value}")


def _show(stub: ControlStub, arguments: argparse.Namespace) -> int:
    site = stub.ShowSite(pb.SiteRequest(site=arguments.site))
    _print(site, arguments.json)
    if not arguments.json:
        ca = x509.load_pem_x509_certificate(Profile.find(arguments.profile).ca.read_bytes())
        _lines(
            ("coordinator's key", spoken_key(stub.Status(pb.StatusRequest()).coordinator_key)),
            ("CA certificate", spoken(fingerprint(ca))),
        )
    return 0


def _revoke(stub: ControlStub, arguments: argparse.Namespace) -> int:
    return _print(stub.RevokeSite(pb.SiteRequest(site=arguments.site, reason=arguments.reason)), arguments.json)
