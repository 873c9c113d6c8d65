"""`fl-admin sites show`: one site: fingerprints, certificate, base model, runs, epsilon of its newest receipt.

`fl-client enroll` shows the site the same fingerprints: compare them by telephone.
"""

from __future__ import annotations

import argparse

from cryptography import x509

from fl_server.cli.admin import complete
from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.admin.sites.facts import print_lines, print_site
from fl_server.cli.connection import Profile
from fl_shared.cli.verbs import argument
from fl_shared.identity.fingerprints import grouped, grouped_key
from fl_shared.identity.x509 import fingerprint
from fl_shared.wire import control_pb2 as pb

EXAMPLES = """
fl-admin sites show hospital-001
fl-admin sites show hospital-001 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    argument(parser, "site", metavar="SITE", completer=complete.sites)


def run(arguments: argparse.Namespace) -> int:
    """Print the site, and the coordinator's own fingerprints."""
    with connected(arguments) as stub:
        site = stub.ShowSite(pb.SiteRequest(site=arguments.site))
        print_site(site, as_json=arguments.json)
        if not arguments.json:
            ca = x509.load_pem_x509_certificate(Profile.find(arguments.profile).ca.read_bytes())
            print_lines(
                ("coordinator's key", grouped_key(stub.Status(pb.StatusRequest()).coordinator_key)),
                ("CA certificate", grouped(fingerprint(ca))),
            )
    return 0
