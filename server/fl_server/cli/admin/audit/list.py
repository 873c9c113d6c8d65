"""`fl-admin audit list`: every action of an admin, with its outcome.

With --json the entries as they are signed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.show import plain
from fl_shared.cli.output import print_json, table
from fl_shared.wire import control_pb2 as pb

EXAMPLES = """
fl-admin audit list
fl-admin audit list --after 100 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    parser.add_argument("--after", type=int, default=0, metavar="N", help="only entries with a larger number")


def run(arguments: argparse.Namespace) -> int:
    """Print them."""
    with connected(arguments) as stub:
        entries = list(stub.ListAdminLog(pb.ListAdminLogRequest(after=max(0, arguments.after))))
    if arguments.json:
        from fl_shared.ledger.chain import GENESIS_HASH  # SQL and all; TAB must not wait for it

        rows = [plain(entry) | {"body": json.loads(entry.body)} for entry in entries]
        print_json({"entries": rows, "head": entries[-1].hash if entries else GENESIS_HASH})
        return 0
    table(["number", "time", "who", "action", "arguments", "outcome"], list(_rows(entries)))
    return 0


def _rows(entries: Iterable[pb.AdminLogEntry]) -> Iterable[list[str]]:
    """One row for each action, with the outcome that a later entry tells."""
    bodies = [(entry, json.loads(entry.body)) for entry in entries]
    outcomes = {body["of"]: body for entry, body in bodies if entry.kind == "outcome"}
    for entry, body in bodies:
        at = entry.created_at[:19].replace("T", " ") + "Z"
        if entry.kind in ("genesis", "key"):
            yield [str(entry.seq), at, "coordinator", f"signs by {body['public_key']}", "", ""]
        if entry.kind == "action":
            ended = outcomes.get(entry.seq)
            outcome = "unknown: broken off" if ended is None else " ".join([ended["result"], ended["code"]]).strip()
            arguments = ", ".join(f"{name}={value}" for name, value in sorted(body["arguments"].items()))
            yield [str(entry.seq), at, f"{body['role']} {body['name']}", body["action"], arguments, outcome]
