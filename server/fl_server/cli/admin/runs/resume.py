"""`fl-admin runs resume`: carry a paused, stopped or failed run on from its last committed round."""

from __future__ import annotations

import argparse

from fl_server.cli.admin import complete
from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.show import print_run
from fl_shared.cli.verbs import argument
from fl_shared.wire import control_pb2 as pb

EXAMPLES = """
fl-admin runs resume demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    argument(parser, "run", metavar="RUN", completer=complete.runs)


def run(arguments: argparse.Namespace) -> int:
    """Resume it, and print it as it is then."""
    with connected(arguments) as stub:
        print_run(stub.ResumeRun(pb.RunRequest(run=arguments.run)), as_json=arguments.json)
    return 0
