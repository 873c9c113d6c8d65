"""`fl-client schema`: the JSON Schema of a site's configuration or of a run spec, for editors and forms."""

from __future__ import annotations

import argparse
from importlib import resources
from typing import Any

from fl_shared.cli.parsers import describe

SCHEMAS = {"site": "fl_client.site", "spec": "fl_shared.documents"}
"""The documents, and the package that each one's schema ships with."""


def add(verbs: Any) -> None:
    """Add the verb to the verbs of `fl-client`."""
    made: argparse.ArgumentParser = verbs.add_parser("schema", help="print the JSON Schema of site.toml or spec.toml")
    describe(
        made, "print the JSON Schema of site.toml or spec.toml", "fl-client schema site\n"
        "fl-client schema spec", "An editor completes and checks the file by it (docs/commands.md).",
    )  # fmt: skip
    made.add_argument("document", choices=sorted(SCHEMAS), help="which file")
    made.add_argument("--json", action="store_true", help="print JSON, as without it")


def show(document: str) -> int:
    """Print the schema of a document."""
    file = resources.files(SCHEMAS[document]) / f"{document}.schema.json"
    print(file.read_text(encoding="utf-8"), end="")
    return 0
