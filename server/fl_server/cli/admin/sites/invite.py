"""`fl-admin sites invite`: print a one-time enrolment token.

An earlier token of the site that was not used stops counting.
"""

from __future__ import annotations

import argparse
import sys

from fl_server.cli.admin import complete
from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.show import moment, plain
from fl_shared.cli.output import print_json
from fl_shared.cli.verbs import argument
from fl_shared.wire import control_pb2 as pb

_DAY_S = 86_400.0
EXAMPLES = """
fl-admin sites invite hospital-001
fl-admin sites invite hospital-001 --days 2 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    argument(parser, "site", metavar="SITE", completer=complete.sites, help="the site's name, e.g. hospital-001")
    parser.add_argument("--days", type=float, default=7.0, help="how long the token is valid, default %(default)g")


def run(arguments: argparse.Namespace) -> int:
    """Make a token; alone on standard output."""
    with connected(arguments) as stub:
        invitation = stub.InviteSite(pb.InviteSiteRequest(site=arguments.site, ttl_s=arguments.days * _DAY_S))
    if arguments.json:
        print_json(plain(invitation))
    else:
        print(invitation.token)
        until = moment(invitation.expires_at)
        print(f"valid once, until {until}; hand it to {invitation.site} by a safe way", file=sys.stderr)
    return 0
