"""`fl-server init`: make the home of a new coordinator: keys, certificates, database and server.toml.

Nothing is ever overwritten. It also writes the first admin's certificate and profile, below admin/.
"""

from __future__ import annotations

import argparse
import shlex

from fl_server.cli.connection import make_default
from fl_server.cli.server.options import add_common
from fl_server.identity.authority import Authority
from fl_server.operations.setup import initialise
from fl_shared.cli.output import command, print_json, working
from fl_shared.cli.verbs import add_quiet
from fl_shared.identity.fingerprints import grouped, grouped_key
from fl_shared.identity.signing import SigningKey
from fl_shared.wire.hosts import host_and_port

EXAMPLES = """
fl-server init --home /srv/concordat --host coordinator.example.org --listen 0.0.0.0
fl-server init --host 127.0.0.1 --gateway-port 19443 --control-port 19444 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    add_quiet(parser)
    parser.add_argument("--host", default="127.0.0.1", help="name or address that sites and admins use")
    parser.add_argument(
        "--listen", default="", help="address the gateway listens on; default: --host if that is one, else 0.0.0.0"
    )
    parser.add_argument("--gateway-port", type=int, default=9443)
    parser.add_argument("--control-port", type=int, default=9444)
    parser.add_argument("--admin", default="admin", help="name in the first admin's certificate")


def run(arguments: argparse.Namespace) -> int:
    """Make it, and print the fingerprints that sites will compare."""
    with working("making keys, certificates and the database", quiet=arguments.quiet, json=arguments.json):
        home = initialise(
            arguments.home,
            host=arguments.host,
            gateway_port=arguments.gateway_port,
            control_port=arguments.control_port,
            admin=arguments.admin,
            listen=arguments.listen,
        )
    facts = {
        "home": str(home.root),
        "gateway": f"https://{host_and_port(home.settings().host, arguments.gateway_port)}",
        "profile": str(home.admin / "admin.toml"),
        "ca_sha256": Authority.load(home.ca_key, home.ca).sha256,
        "coordinator_key": SigningKey.load(home.signing_key).public_hex,
    }
    by_itself = make_default(home)
    if arguments.json:
        print_json(facts)
        return 0
    print(f"made a coordinator at {facts['home']}")
    print(f"  gateway          {facts['gateway']}")
    print(f"  admin profile    {facts['profile']}")
    print(f"  CA               {grouped(facts['ca_sha256'])}")
    print(f"  signing key      {grouped_key(facts['coordinator_key'])}")
    if not by_itself:
        print("another coordinator's profile is found first, so name this one:")
        print(f"  export FL_ADMIN_PROFILE={shlex.quote(facts['profile'])}")
    print(f"next: {command('fl-server', 'up', '--home', facts['home'])}")
    return 0
