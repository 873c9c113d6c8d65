"""`fl-client enroll`: make the site's keys and get its certificate with a one-time token.

The keys are made here and never leave. A failed attempt can be repeated.
"""

from __future__ import annotations

import argparse
import os
import shlex

from fl_client.cli.client.options import add_common, home_of
from fl_client.site.address import server_url
from fl_client.site.config import template
from fl_shared.cli.output import command, print_json, working
from fl_shared.errors import ConfigError
from fl_shared.files import check_grpc_socket, write_durably
from fl_shared.identity.fingerprints import grouped, grouped_key

EXAMPLES = """
fl-client enroll --site hospital-001 --server https://coordinator.example:9443 --token ct1....
fl-client enroll --site hospital-001 --server https://10.0.0.5:9443 --token ct1.... --force --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    parser.add_argument(
        "--server", default=os.environ.get("FL_SERVER"), help="https://HOST:PORT of the gateway [FL_SERVER]"
    )
    parser.add_argument("--token", default=os.environ.get("FL_TOKEN"), help="from `fl-admin sites invite` [FL_TOKEN]")
    parser.add_argument("--force", action="store_true", help="replace the certificate of an enrolled site")


def run(arguments: argparse.Namespace) -> int:
    """Enrol, write a site.toml to edit, and print the fingerprints to compare."""
    home = home_of(arguments)
    for name, value in (("--server", arguments.server), ("--token", arguments.token)):
        if not value:
            raise ConfigError(f"{name} is missing", fix=f"add {name}, or set FL_{name[2:].upper()}")
    from fl_client.identity.enrolment import enrol, own_fingerprints
    from fl_client.identity.keys import publish

    fix = "choose a --home with a shorter path and no comma; nothing was made, and the token is still good"
    check_grpc_socket(home.socket, fix=fix)
    address = server_url(arguments.server)
    with working(f"asking {address} for a certificate", quiet=arguments.quiet, json=arguments.json):
        pinned = enrol(home, site=arguments.site, server=address, token=arguments.token, force=arguments.force)
    publish(home)
    template_written = not home.config.exists()
    if template_written:
        write_durably(home.config, template(arguments.site, address).encode("utf-8"))
    ours = own_fingerprints(home)
    if arguments.json:
        print_json(
            {
                "site": pinned.site,
                "server": pinned.server,
                "home": str(home.root),
                "coordinator_key": pinned.coordinator_key,
                "ca_sha256": pinned.ca_sha256,
                "signing_key": ours.signing_key,
                "certificate_fingerprint": ours.certificate,
                "template_written": template_written,
            }
        )
        return 0
    print(f"{pinned.site} is enrolled at {pinned.server}; its keys were made here and stay in {home.root}")
    print("compare by telephone with what `fl-admin sites show` prints there:")
    print(f"  coordinator's key   {grouped_key(pinned.coordinator_key)}")
    print(f"  CA certificate      {grouped(pinned.ca_sha256)}")
    print(f"  site's key          {grouped_key(ours.signing_key)}")
    print(f"  site's certificate  {grouped(ours.certificate)}")
    if arguments.force:
        print("restart the site's agent if it runs: it uses the new certificate and node key from its start")
    if template_written:
        print(f"next: edit {shlex.quote(str(home.config))}")
    where = ["--home", str(home.root)] if arguments.home else []
    print(f"then: {command('fl-client', 'check', '--site', pinned.site, *where)}")
    return 0
