"""`fl-server status`: say whether each part of the coordinator runs, and where it listens.

Exit code 0 when everything is ready, 1 otherwise.
"""

from __future__ import annotations

import argparse
import time

from fl_server.cli.server.options import add_common
from fl_server.home.layout import ServerHome
from fl_shared.cli.output import print_json

EXAMPLES = """
fl-server status --home /srv/concordat
fl-server status --wait 60 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    parser.add_argument("--wait", type=float, default=0.0, metavar="S", help="wait so many seconds for it to be ready")


def run(arguments: argparse.Namespace) -> int:
    """Print the parts' states."""
    from fl_server.operations.supervisor import is_ready, read_state

    home, deadline = ServerHome.open(arguments.home), time.monotonic() + arguments.wait
    state = read_state(home)
    while not (ready := is_ready(state)) and time.monotonic() < deadline:
        time.sleep(0.5)
        state = read_state(home)
    if arguments.json:
        print_json({"ready": ready, **state})
    else:
        for component in state["components"]:
            why = f"  {component['why']}" if component.get("why") else ""
            print(f"{component['name']:<10} {component['state']:<14} {component['address']}{why}")
    return 0 if ready else 1
