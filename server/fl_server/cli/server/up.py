"""`fl-server up`: run the coordinator until SIGTERM or Ctrl-C.

It starts SuperLink, gateway, control API and launcher, starts again what dies, and says when all is ready.
"""

from __future__ import annotations

import argparse
import sys

from fl_server.cli.server.options import add_common
from fl_server.home.layout import ServerHome
from fl_shared.cli.extras import require
from fl_shared.runtime.logs import FORMATS, default_format, set_up

EXAMPLES = """
fl-server up --home /srv/concordat
fl-server up --log-format json --logs output
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    parser.add_argument(
        "--log-format", choices=FORMATS, default=default_format(),
        help="of the output; the components' logs are always JSON lines [FL_LOG_FORMAT]",
    )  # fmt: skip
    parser.add_argument(
        "--logs", choices=("files", "output"), default="files",
        help="where the components' logs go: files below logs/, or this output, for a container",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run until a signal ends it."""
    require("server")  # now, and not in the log of a child
    from fl_server.operations.supervisor import Supervisor

    set_up("supervisor", terminal=arguments.log_format, stream=sys.stdout)
    return Supervisor(ServerHome.open(arguments.home), logs_to_files=arguments.logs == "files").run()
