"""`fl-admin schema`: the JSON Schema of a run spec or of the coordinator's settings, for editors and forms."""

from __future__ import annotations

import argparse
from importlib import resources
from typing import Any

from fl_shared.cli.parsers import describe

SCHEMAS = {"server": "fl_server.home", "spec": "fl_shared.documents"}
"""The documents, and the package that each one's schema ships with."""


def add(groups: Any) -> None:
    """Add the verb; it stands by itself, without a group, and asks no coordinator."""
    made: argparse.ArgumentParser = groups.add_parser(
        "schema", help="print the JSON Schema of spec.toml or server.toml"
    )
    describe(
        made, "print the JSON Schema of spec.toml or server.toml", "fl-admin schema spec\n"
        "fl-admin schema server", "An editor completes and checks the file by it (docs/commands.md).",
    )  # fmt: skip
    made.add_argument("document", choices=sorted(SCHEMAS), help="which file")
    made.add_argument("--json", action="store_true", help="print JSON, as without it")
    made.set_defaults(handler=_show, offline=True)


def _show(_: object, arguments: argparse.Namespace) -> int:
    return show(arguments.document)


def show(document: str) -> int:
    """Print the schema of a document."""
    file = resources.files(SCHEMAS[document]) / f"{document}.schema.json"
    print(file.read_text(encoding="utf-8"), end="")
    return 0
