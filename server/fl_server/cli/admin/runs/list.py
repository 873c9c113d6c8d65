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
        print_json({"runs": [run_plain(run) for run in runs]})
        return 0
    table(
        ["run", "state", "rounds", "sites", "launched", "reason"],
        [
            [run.run, run.state, f"{run.rounds_committed}/{run.rounds}", str(len(run.sites)),
             moment(run.created_at), run.reason]
            for run in runs
        ],
    )  # fmt: skip
    return 0
