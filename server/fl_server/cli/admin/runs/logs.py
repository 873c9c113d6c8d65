"""`fl-admin runs logs`: what happened in a run: one line for each event.

With --json one JSON object a line.
"""

from __future__ import annotations

import argparse

from fl_server.cli.admin import complete
from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.show import event_json, event_text
from fl_shared.cli.verbs import argument
from fl_shared.wire import control_pb2 as pb

EXAMPLES = """
fl-admin runs logs demo
fl-admin runs logs demo --site hospital-001 --json
fl-admin runs logs demo --follow
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    argument(parser, "run", metavar="RUN", completer=complete.runs)
    parser.add_argument("--follow", action="store_true", help="go on until the run has ended")
    argument(
        parser, "--site", metavar="SITE", default="", completer=complete.sites, help="only what concerns this site"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print them."""
    request = pb.WatchRunRequest(run=arguments.run, until_now=not arguments.follow, site=arguments.site)
    with connected(arguments) as stub:
        for event in stub.WatchRun(request):
            print(event_json(event) if arguments.json else event_text(event), flush=True)
    return 0
