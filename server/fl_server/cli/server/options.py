"""What the verbs of `fl-server` have in common: `--home` and `--json`."""

from __future__ import annotations

import argparse

from fl_server.home.layout import default_home
from fl_shared.cli.verbs import add_json, path


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add `--home` and `--json`."""
    parser.add_argument(
        "--home", type=path, default=default_home(), help="the coordinator's directory [FL_SERVER_HOME]"
    )
    add_json(parser)
