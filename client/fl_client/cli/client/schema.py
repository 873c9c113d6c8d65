"""`fl-client schema`: print the JSON Schema of site.toml or of a run spec, for editors and forms.

An editor completes and checks the file by it (docs/commands.md).
"""

from __future__ import annotations

import argparse
from importlib import resources

from fl_shared.cli.verbs import add_json

EXAMPLES = """
fl-client schema spec
fl-client schema site
"""
SCHEMAS = {"site": "fl_client.site", "spec": "fl_shared.documents"}
"""The documents, and the package that each one's schema ships with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    parser.add_argument("document", choices=sorted(SCHEMAS), help="which file")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the schema of a document."""
    file = resources.files(SCHEMAS[arguments.document]) / f"{arguments.document}.schema.json"
    print(file.read_text(encoding="utf-8"), end="")
    return 0
