"""How `fl-audit` prints: a table for people, JSON or CSV for programs."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fl_shared.cli import console


def add_format(parser: argparse.ArgumentParser, *, with_csv: bool = True) -> None:
    """Add `--json` (and `--csv`)."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print one JSON object")
    if with_csv:
        group.add_argument("--csv", action="store_true", help="print comma-separated values")


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    print(text.encode("utf-8", "backslashreplace").decode())  # half a surrogate pair, in evidence from elsewhere


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with a header line; nested tables become `outer.inner` columns."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": item for inner, item in _flat(value).items()}
        elif isinstance(value, str) and value[:1] in {"=", "+", "-", "@", "\t", "\r"}:
            found[name] = f"'{value}"  # a spreadsheet would run it as a formula
        else:
            found[name] = value
    return found


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = ()) -> None:
    """Print a table; columns named in `left` are words, the others numbers."""
    console.table(columns, rows, title=title, right=[column for column in columns if column not in left])
