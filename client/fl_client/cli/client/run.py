"""`fl-client run`: run the agent and the SuperNode (the default)."""

from __future__ import annotations

import argparse
import sys

from fl_client.cli.client.options import add_site, home_of
from fl_client.site.config import SiteConfig
from fl_shared.cli.extras import require
from fl_shared.runtime.logs import FORMATS, default_format, set_up

EXAMPLES = """
fl-client --site hospital-001
fl-client run --site hospital-001 --log-format json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_site(parser)
    parser.add_argument(
        "--log-format",
        choices=FORMATS,
        default=default_format(),
        help="of the output; the log file is always JSON lines [FL_LOG_FORMAT]",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run until a signal ends it."""
    home = home_of(arguments)
    require("client")  # now, and not when a helper of the agent needs it
    from fl_client.identity.enrolment import Coordinator

    config = SiteConfig.load(home, arguments.site)
    Coordinator.load(home)
    home.make()
    set_up(
        "agent", site=arguments.site, file=home.logs / "agent.jsonl", terminal=arguments.log_format, stream=sys.stdout,
        withhold=True, rotate=True,
    )  # fmt: skip
    from fl_client.agent.main import run_agent

    return run_agent(home, config)
