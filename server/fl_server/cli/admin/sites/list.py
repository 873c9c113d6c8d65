"""`fl-admin sites list`: every site and its state."""

from __future__ import annotations

import argparse

from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.show import moment, plain
from fl_shared.cli.output import print_json, table
from fl_shared.wire import control_pb2 as pb

EXAMPLES = """
fl-admin sites list
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print them."""
    with connected(arguments) as stub:
        sites = stub.ListSites(pb.ListSitesRequest()).sites
    if arguments.json:
        print_json({"sites": [plain(site) for site in sites]})
        return 0
    table(
        ["site", "state", "online", "last seen", "certificate until"],
        [
            [site.site, site.state, "yes" if site.online else "no", moment(site.last_seen_at),
             moment(site.certificate_expires_at)]
            for site in sites
        ],
    )  # fmt: skip
    return 0
