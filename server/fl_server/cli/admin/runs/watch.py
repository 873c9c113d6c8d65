"""`fl-admin runs watch`: follow a run to its end.

Ctrl-C leaves the run going. Exit code 18 when it does not complete. With --json one JSON object a line as it happens;
the last is the run (`state`, and no `kind`).
"""

from __future__ import annotations

import argparse

from fl_server.cli.admin import complete
from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.watch import follow
from fl_shared.cli.verbs import argument

EXAMPLES = """
fl-admin runs watch demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    argument(parser, "run", metavar="RUN", completer=complete.runs)


def run(arguments: argparse.Namespace) -> int:
    """Follow it."""
    with connected(arguments) as stub:
        return follow(stub, arguments.run, as_json=arguments.json)
