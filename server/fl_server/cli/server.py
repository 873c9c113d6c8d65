"""`fl-server`: make a coordinator, run it, look at it, issue certificates, change its key, back it up."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence

from fl_server.cli import backup, keys
from fl_server.cli.connection import make_default
from fl_server.home.layout import ServerHome, default_home
from fl_server.identity.authority import Authority
from fl_server.operations.setup import initialise
from fl_shared.cli.completion import complete
from fl_shared.cli.console import command, working
from fl_shared.cli.entry import cli_main
from fl_shared.cli.extras import require
from fl_shared.cli.parsers import add_quiet, add_version, describe, path
from fl_shared.identity.fingerprints import spoken, spoken_key
from fl_shared.identity.signing import SigningKey
from fl_shared.runtime.logs import FORMATS, default_format, set_up
from fl_shared.runtime.offline import stay_offline
from fl_shared.runtime.private_files import create_privately
from fl_shared.wire.hosts import host_and_port

EXAMPLES = """examples:
  fl-server init --home ~/coordinator --host coordinator.example.org
  fl-server up --home ~/coordinator
  fl-server status --home ~/coordinator --wait 60
  fl-server status --home ~/coordinator --json
  fl-server issue --role auditor --name anna-smith --out anna/
  fl-server rotate-key --grace-days 14
  fl-server backup --out /backup/coordinator.tar
  fl-server restore /backup/coordinator.tar --home ~/coordinator2

Each verb has its own --help with examples.

$FL_SERVER_HOME stands for --home; without both it is ~/.concordat/server.
TAB completes verbs and options: eval "$(register-python-argcomplete fl-server)"

exit codes: 0 done, 1 not everything is ready (status), 2 wrong arguments or settings, or a package is missing,
  12 a signature or key does not fit, 13 the admin log cannot be written, 16 the database does not answer, 18 a run
  cannot go on, 70 a defect, 74 the operating system said no, 130 Ctrl-C, 141 the output's reader left
"""


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    made = argparse.ArgumentParser(
        prog="fl-server", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_version(made)
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--home", type=path, default=default_home(), help="the coordinator's directory")
    common.add_argument("--json", action="store_true", help="print one JSON object")
    init = verbs.add_parser("init", parents=[common], help="make keys, certificates, database and server.toml")
    describe(
        init, "make the home of a new coordinator: keys, certificates, database and server.toml",
        "fl-server init --home /srv/concordat --host coordinator.example.org --listen 0.0.0.0\n"
        "fl-server init --host 127.0.0.1 --gateway-port 19443 --control-port 19444 --json",
        "Nothing is ever overwritten. It also writes the first admin's certificate and profile, below admin/.",
    )  # fmt: skip
    add_quiet(init)
    init.add_argument("--host", default="127.0.0.1", help="name or address that sites and admins use")
    init.add_argument(
        "--listen", default="", help="address the gateway listens on; default: --host if that is one, else 0.0.0.0"
    )
    init.add_argument("--gateway-port", type=int, default=9443)
    init.add_argument("--control-port", type=int, default=9444)
    init.add_argument("--admin", default="admin", help="name in the first admin's certificate")
    up = verbs.add_parser("up", parents=[common], help="run the coordinator until SIGTERM")
    describe(
        up, "run the coordinator until SIGTERM or Ctrl-C",
        "fl-server up --home /srv/concordat\nfl-server up --log-format json --logs output",
        "It starts SuperLink, gateway, control API and launcher, starts again what dies, and says when all is ready.",
    )  # fmt: skip
    up.add_argument(
        "--log-format", choices=FORMATS, default=default_format(),
        help="of the output; the components' logs are always JSON lines [FL_LOG_FORMAT]",
    )  # fmt: skip
    up.add_argument(
        "--logs", choices=("files", "output"), default="files",
        help="where the components' logs go: files below logs/, or this output, for a container",
    )  # fmt: skip
    status = verbs.add_parser("status", parents=[common], help="exit code 0 when everything is ready, 1 otherwise")
    describe(
        status, "say whether each part of the coordinator runs, and where it listens",
        "fl-server status --home /srv/concordat\nfl-server status --wait 60 --json",
        "Exit code 0 when everything is ready, 1 otherwise.",
    )  # fmt: skip
    status.add_argument("--wait", type=float, default=0.0, metavar="S", help="wait so many seconds for it to be ready")
    keys.add_verbs(verbs, common)
    backup.add_verbs(verbs, common)
    return made


def _init(arguments: argparse.Namespace) -> int:
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
        print("another coordinator's profile is found first, so name this one:")
        print(f"  export FL_ADMIN_PROFILE={shlex.quote(facts['profile'])}")
    print(f"next: {command('fl-server', 'up', '--home', facts['home'])}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from fl_server.operations.supervisor import is_ready, read_state

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
    made = parser()
    complete(made)
    arguments = made.parse_args(argv)
    if arguments.verb == "init":
        return _init(arguments)
    if arguments.verb == "status":
        return _status(arguments)
    actions = keys.ACTIONS | backup.ACTIONS
    if arguments.verb in actions:
        return actions[arguments.verb](arguments)
    require("server")  # now, and not in the log of a child
    from fl_server.operations.supervisor import Supervisor

    set_up("supervisor", terminal=arguments.log_format, stream=sys.stdout)
    return Supervisor(ServerHome.open(arguments.home), logs_to_files=arguments.logs == "files").run()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fl-server`."""
    stay_offline()
    create_privately()
    return cli_main(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
