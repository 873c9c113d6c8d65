"""`fl-client resume`: take part again in a run that this site left after a failure.

The ledger records who said so.
"""

from __future__ import annotations

import argparse

from fl_client.cli.client.options import add_common, home_of
from fl_client.site.config import SiteConfig
from fl_shared.cli.output import print_json
from fl_shared.errors import ConfigError

EXAMPLES = """
fl-client resume --site hospital-001 demo --by "A. Officer" --reason "the driver was updated"
fl-client resume --site hospital-001 --ledger --by "A. Officer" --reason "restored from a backup" --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    parser.add_argument("run", nargs="?", default="", metavar="RUN", help="the run, as `fl-client status` lists it")
    parser.add_argument(
        "--ledger", action="store_true",
        help="instead of a run: go on with an old copy of the ledger, after entering what this home knows was spent",
    )  # fmt: skip
    parser.add_argument("--by", default="", metavar="NAME", help="who confirms")
    parser.add_argument("--reason", default="", metavar="TEXT", help="why it may go on: what failed, what was done")


def run(arguments: argparse.Namespace) -> int:
    """Record the operator's word."""
    home = home_of(arguments)
    from fl_client.agent.resume import accept_ledger
    from fl_client.agent.site import open_ledger
    from fl_shared.ledger.suspension import confirm_run, resume_command

    if bool(arguments.run) == arguments.ledger:
        raise ConfigError("name one run, or give --ledger", fix=resume_command(arguments.site, "RUN"))
    config = SiteConfig.load(home, arguments.site)
    if arguments.ledger:
        entered = accept_ledger(home, config, arguments.by, arguments.reason)
        done: dict[str, int | str] = {"entered": entered}
        message = f"the ledger is accepted; {entered} forgotten releases were entered again"
    else:
        ledger, _ = open_ledger(home, config)
        try:
            entry = confirm_run(ledger, arguments.run, arguments.by, arguments.reason)
        finally:
            ledger.close()
        done = {"run": arguments.run, "entry": entry.id}
        message = f"{arguments.run}: this site takes part again (ledger entry {entry.seq}); what failed stays charged"
    if arguments.json:
        print_json(done)
    else:
        print(message)
    return 0
