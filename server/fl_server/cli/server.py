"""`fl-server`: make a coordinator, run it, look at it, issue certificates, change its key, back it up."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fl_server import __version__
from fl_server.cli import backup, keys
from fl_server.cli.connection import make_default
from fl_server.home import ServerHome, default_home
from fl_server.pki import Authority
from fl_server.setup import initialise
from fl_server.supervisor import Supervisor, is_ready, read_state
from fl_shared.completion import complete
from fl_shared.errors import cli_main
from fl_shared.fingerprints import spoken, spoken_key
from fl_shared.hosts import host_and_port
from fl_shared.logs import FORMATS, default_format, set_up
from fl_shared.offline import stay_offline
from fl_shared.private import create_privately
from fl_shared.signing import SigningKey

EXAMPLES = """examples:
  fl-server init --home ~/coordinator --host coordinator.example.org
  fl-server up --home ~/coordinator
  fl-server status --home ~/coordinator --wait 60
  fl-server status --home ~/coordinator --json
  fl-server issue --role auditor --name anna-smith --out anna/
  fl-server rotate-key --grace-days 14
  fl-server backup --out /backup/coordinator.tar
  fl-server restore /backup/coordinator.tar --home ~/coordinator2

$FL_SERVER_HOME stands for --home; without both it is ~/.concordat/server.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fl-server", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"concordat {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--home", type=Path, default=default_home(), help="the coordinator's directory")
    common.add_argument("--json", action="store_true", help="print one JSON object")
    init = verbs.add_parser("init", parents=[common], help="make keys, certificates, database and server.toml")
    init.add_argument("--host", default="127.0.0.1", help="name or address that sites and admins use")
    init.add_argument(
        "--listen", default="", help="address the gateway listens on; default: --host if that is one, else 0.0.0.0"
    )
    init.add_argument("--gateway-port", type=int, default=9443)
    init.add_argument("--control-port", type=int, default=9444)
    init.add_argument("--admin", default="admin", help="name in the first admin's certificate")
    up = verbs.add_parser("up", parents=[common], help="run the coordinator until SIGTERM")
    up.add_argument(
        "--log-format", choices=FORMATS, default=default_format(),
        help="of the output; the components' logs are always JSON lines [FL_LOG_FORMAT]",
    )  # fmt: skip
    up.add_argument(
        "--logs", choices=("files", "output"), default="files",
        help="where the components' logs go: files below logs/, or this output, for a container",
    )  # fmt: skip
    status = verbs.add_parser("status", parents=[common], help="exit code 0 when everything is ready, 1 otherwise")
    status.add_argument("--wait", type=float, default=0.0, metavar="S", help="wait so many seconds for it to be ready")
    keys.add_verbs(verbs, common)
    backup.add_verbs(verbs, common)
    return parser


def _init(arguments: argparse.Namespace) -> int:
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
    found = make_default(home)
    if arguments.json:
        print(json.dumps(facts))
        return 0
    print(f"made a coordinator at {facts['home']}")
    print(f"  gateway          {facts['gateway']}")
    print(f"  admin profile    {facts['profile']}")
    print(f"  CA               {spoken(facts['ca_sha256'])}")
    print(f"  signing key      {spoken_key(facts['coordinator_key'])}")
    if not found:
        print("fl-admin finds another coordinator's profile first, so tell it:")
        print(f"  export FL_ADMIN_PROFILE={shlex.quote(facts['profile'])}")
    print(f"next: fl-server up --home {facts['home']}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    home, deadline = ServerHome.open(arguments.home), time.monotonic() + arguments.wait
    state = read_state(home)
    while not (ready := is_ready(state)) and time.monotonic() < deadline:
        time.sleep(0.5)
        state = read_state(home)
    if arguments.json:
        print(json.dumps({"ready": ready, **state}))
    else:
        for each in state["components"]:
            why = f"  {each['why']}" if each.get("why") else ""
            print(f"{each['name']:<10} {each['state']:<14} {each['address']}{why}")
    return 0 if ready else 1


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    complete(parser)
    arguments = parser.parse_args(argv)
    if arguments.verb == "init":
        return _init(arguments)
    if arguments.verb == "status":
        return _status(arguments)
    actions = keys.ACTIONS | backup.ACTIONS
    if arguments.verb in actions:
        return actions[arguments.verb](arguments)
    set_up("supervisor", terminal=arguments.log_format, stream=sys.stdout)
    return Supervisor(ServerHome.open(arguments.home), logs_to_files=arguments.logs == "files").run()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fl-server`."""
    stay_offline()
    create_privately()
    return cli_main(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
