"""`fl-admin audit verify`: check hashes, signatures, order and keys of the whole record.

Exit code 13 when something is wrong. An end that was cut off shows only against a --checkpoint: note the head that
this verb prints.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from fl_server.cli.admin.options import add_common, connected
from fl_shared.cli.output import print_json
from fl_shared.identity.fingerprints import grouped_key
from fl_shared.wire import control_pb2 as pb

if TYPE_CHECKING:
    from fl_server.access.log import Report

BROKEN = 13
EXAMPLES = """
fl-admin audit verify --public-key coordinator.pub
fl-admin audit verify --profile auditor.toml --checkpoint 120:5d41402a...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    parser.add_argument("--public-key", metavar="HEX|FILE", help="the coordinator's key as you know it")
    parser.add_argument(
        "--checkpoint", action="append", default=[], metavar="N:HASH", help="a head that you noted before"
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify and print; exit code 13 when something is wrong."""
    from fl_server.access.log import check  # SQL and all; TAB must not wait for it
    from fl_shared.audit.checkpoints import parse_checkpoint
    from fl_shared.audit.source import key_text

    with connected(arguments) as stub:
        noted = {checkpoint.entries: checkpoint.head for checkpoint in map(parse_checkpoint, arguments.checkpoint)}
        key = key_text(arguments.public_key) if arguments.public_key else None
        report = check(stub.ListAdminLog(pb.ListAdminLogRequest()), public_key=key, checkpoints=noted)
    if arguments.json:
        print_json(asdict(report) | {"intact": not report.problems})
    else:
        _print(report)
    return BROKEN if report.problems else 0


def _print(report: Report) -> None:
    for problem in report.problems:
        print(f"PROBLEM  {problem.message}")
    print(f"entries    {report.entries}, from {report.first or '-'} to {report.last or '-'}")
    print(f"head       {report.entries}:{report.head}")
    for key in report.keys:
        print(f"signed by  {grouped_key(key)}")
    if not report.pinned:
        print("note       the log itself names that key: pin it by --public-key")
    if report.open:
        print(f"note       without an outcome (broken off, or under way): {', '.join(map(str, report.open))}")
    print("INTACT" if not report.problems else f"NOT INTACT: {len(report.problems)} problems")
