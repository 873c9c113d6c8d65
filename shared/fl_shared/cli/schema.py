"""What the two `schema` verbs share: print the JSON Schema of a file, as it ships with the file's declaration."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import resources

from fl_shared.cli.verbs import add_json


def add_document(parser: argparse.ArgumentParser, packages: Mapping[str, str]) -> None:
    """Add the argument that names one of the files; `packages`: the package that each one's schema ships with."""
    parser.add_argument("document", choices=sorted(packages), help="which file")
    add_json(parser)


def print_schema(document: str, packages: Mapping[str, str]) -> None:
    """Print it."""
    file = resources.files(packages[document]) / f"{document}.schema.json"
    print(file.read_text(encoding="utf-8"), end="")
