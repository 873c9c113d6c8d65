"""`fl-client status`: show enrolment, whether the agent runs, and what the ledger says."""

from __future__ import annotations

import argparse

from fl_client.cli.client.options import add_common, home_of
from fl_shared.cli.output import print_json

EXAMPLES = """
fl-client status --site hospital-001
fl-client status --site hospital-001 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the status."""
    home = home_of(arguments)
    from fl_client.agent.status import status_of
    from fl_shared.ledger.suspension import resume_command

    status = status_of(home, arguments.site)
    if arguments.json:
        print_json(status)
        return 0
    for name, value in status.items():
        if name == "suspended":
            for run, why in value.items():
                print(f"{name:<10} {run}: {why}; when it may go on: {resume_command(arguments.site, run)}")
            continue
        if isinstance(value, list):
            value = "; ".join(value) or "none"
        if isinstance(value, dict):
            value = ", ".join(
                f"{key} {item:g}" if isinstance(item, float) else f"{key} {item}" for key, item in value.items()
            )
        print(f"{name:<10} {value}")
    return 0
