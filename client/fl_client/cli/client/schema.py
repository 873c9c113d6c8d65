"""`fl-client schema`: print the JSON Schema of site.toml or of a run spec, for editors and forms.

An editor completes and checks the file by it (docs/commands.md).
"""

from __future__ import annotations

import argparse

from fl_shared.cli.schema import add_document, print_schema

EXAMPLES = """
fl-client schema spec
fl-client schema site
"""
PACKAGES = {"site": "fl_client.site", "spec": "fl_shared.documents"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_document(parser, PACKAGES)


def run(arguments: argparse.Namespace) -> int:
    """Print the schema of a document."""
    print_schema(arguments.document, PACKAGES)
    return 0
