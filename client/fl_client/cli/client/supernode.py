"""`fl-client supernode`: run only the untrusted half, as another user.

It needs its own directory alone.
"""

from __future__ import annotations

import argparse

from fl_shared.cli.verbs import path

EXAMPLES = """
fl-client supernode --directory /run/concordat/hospital-001/supernode
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    parser.add_argument("--directory", type=path, required=True, help="the site's supernode directory")


def run(arguments: argparse.Namespace) -> int:
    """Run until a signal ends it."""
    from fl_client.node.supernode import run_alone

    return run_alone(arguments.directory)
