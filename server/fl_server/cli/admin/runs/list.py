"""`fl-admin runs list`: every run, the newest first."""

from __future__ import annotations

import argparse

from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.show import moment, run_plain
from fl_shared.cli.output import print_json, table
from fl_shared.wire import control_pb2 as pb

EXAMPLES = """
fl-admin runs list
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print them."""
    with connected(arguments) as stub:
        runs = stub.ListRuns(pb.ListRunsRequest()).runs
    if arguments.json:
        print_json({"runs": [run_plain(each) for each in runs]})
        return 0
    table(
        ["run", "state", "rounds", "sites", "launched", "reason"],
        [
            [each.run, each.state, f"{each.rounds_committed}/{each.rounds}", str(len(each.sites)),
             moment(each.created_at), each.reason]
            for each in runs
        ],
    )  # fmt: skip
    return 0
