"""How a line of `fl-admin` names one adapter: a run and a round, or the name that it is promoted to."""

from __future__ import annotations

import argparse

from fl_server.cli.admin import complete
from fl_shared.cli.verbs import argument
from fl_shared.errors import ConfigError


def add_round(parser: argparse.ArgumentParser) -> None:
    """Add `--round`."""
    argument(
        parser, "--round", type=int, default=0, metavar="N", completer=complete.rounds,
        help="the round; the last committed one by default",
    )  # fmt: skip


def add_which(parser: argparse.ArgumentParser) -> None:
    """Add RUN, `--round` and `--released`."""
    argument(parser, "run", metavar="RUN", nargs="?", default="", completer=complete.runs)
    add_round(parser)
    argument(
        parser, "--released", default="", metavar="NAME", completer=complete.promotions,
        help="what is promoted to this name, instead of RUN",
    )  # fmt: skip


def require_one(arguments: argparse.Namespace) -> None:
    """ConfigError unless exactly one adapter is named."""
    if bool(arguments.run) == bool(arguments.released) or (arguments.released and arguments.round):
        raise ConfigError("one adapter must be named", fix="give RUN and --round N, or --released NAME alone")
