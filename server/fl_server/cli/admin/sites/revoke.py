"""`fl-admin sites revoke`: shut a site out from its next request on.

Its receipts and its part in committed rounds stay. Runs that name it go on while the quorum holds.
"""

from __future__ import annotations

import argparse

from fl_server.cli.admin import complete
from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.admin.sites.facts import print_site
from fl_shared.cli.verbs import argument
from fl_shared.wire import control_pb2 as pb

EXAMPLES = """
fl-admin sites revoke hospital-001 --reason "key lost, told by telephone"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    argument(parser, "site", metavar="SITE", completer=complete.sites)
    parser.add_argument("--reason", default="", help="why; it is recorded in the admin log")


def run(arguments: argparse.Namespace) -> int:
    """Revoke it, and print what the coordinator then knows of it."""
    with connected(arguments) as stub:
        site = stub.RevokeSite(pb.SiteRequest(site=arguments.site, reason=arguments.reason))
    print_site(site, as_json=arguments.json)
    return 0
