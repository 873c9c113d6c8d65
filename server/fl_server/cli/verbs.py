"""How the verbs of `fl-admin` are declared: each with examples in its help, names that TAB completes, and a handler."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from fl_shared.cli.completion import completed_by
from fl_shared.cli.parsers import describe, path
from fl_shared.wire.control_pb2_grpc import ControlStub

Handler = Callable[[ControlStub, argparse.Namespace], int]
Completer = Callable[..., Any]


def common() -> argparse.ArgumentParser:
    """The options that every verb has."""
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument(
        "--profile", type=path, default=None, metavar="FILE", help="the admin profile, admin.toml [FL_ADMIN_PROFILE]"
    )
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def add_verb(
    verbs: Any, name: str, handler: Handler, summary: str, *, examples: str, more: str = ""
) -> argparse.ArgumentParser:
    """Add one verb; `examples` are lines as a person types them, without the prompt."""
    made: argparse.ArgumentParser = verbs.add_parser(name, parents=[common()], help=summary)
    describe(made, summary, examples, more)
    made.set_defaults(handler=handler)
    return made


def add_group(groups: Any, name: str, summary: str) -> Any:
    """Add a group of verbs; what it returns is the `verbs` of `add_verb`."""
    made = groups.add_parser(name, help=summary, description=f"{summary[:1].upper()}{summary[1:]}.")
    return made.add_subparsers(dest="verb", required=True, metavar="VERB")


def argument(parser: argparse.ArgumentParser, *names: str, completer: Completer | None = None, **options: Any) -> None:
    """Add an argument whose values TAB completes."""
    made = parser.add_argument(*names, **options)
    if completer is not None:
        completed_by(made, completer)
