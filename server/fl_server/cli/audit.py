"""`fl-admin audit`: who asked the coordinator for what, and whether that record is intact.

The whole log travels and is checked here: an auditor need not take the coordinator's word for it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fl_server.cli.show import plain, print_json
from fl_server.cli.verbs import add_group, add_verb
from fl_shared.cli.console import table
from fl_shared.identity.fingerprints import spoken_key
from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.control_pb2_grpc import ControlStub

if TYPE_CHECKING:
    from fl_server.access.log import Report

BROKEN = 13


def add(groups: Any) -> None:
    """Add the group."""
    verbs = add_group(groups, "audit", "the record of what admins did")
    listed = add_verb(
        verbs, "list", _list, "every action of an admin, with its outcome",
        more="With --json the entries as they are signed.",
        examples="fl-admin audit list\nfl-admin audit list --after 100 --json",
    )  # fmt: skip
    listed.add_argument("--after", type=int, default=0, metavar="N", help="only entries with a larger number")
    verify = add_verb(
        verbs, "verify", _verify, "check hashes, signatures, order and keys of the whole record",
        more="Exit code 13 when something is wrong. An end that was cut off shows only against a --checkpoint: note "
        "the head that this verb prints.",
        examples="fl-admin audit verify --public-key coordinator.pub\n"
        "fl-admin audit verify --profile auditor.toml --checkpoint 120:5d41402a...",
    )  # fmt: skip
    verify.add_argument("--public-key", metavar="HEX|FILE", help="the coordinator's key as you know it")
    verify.add_argument(
        "--checkpoint", action="append", default=[], metavar="N:HASH", help="a head that you noted before"
    )


def _list(stub: ControlStub, arguments: argparse.Namespace) -> int:
    entries = list(stub.ListAdminLog(pb.ListAdminLogRequest(after=max(0, arguments.after))))
    if arguments.json:
        from fl_shared.ledger.chain import GENESIS_HASH

        shown = [plain(each) | {"body": json.loads(each.body)} for each in entries]
        print_json({"entries": shown, "head": entries[-1].hash if entries else GENESIS_HASH})
        return 0
    table(["number", "time", "who", "action", "arguments", "outcome"], list(_rows(entries)))
    return 0


def _rows(entries: Iterable[pb.AdminLogEntry]) -> Iterable[list[str]]:
    """One row for each action, with the outcome that a later entry tells."""
    bodies = [(each, json.loads(each.body)) for each in entries]
    outcomes = {body["of"]: body for each, body in bodies if each.kind == "outcome"}
    for each, body in bodies:
        at = each.created_at[:19].replace("T", " ") + "Z"
        if each.kind in ("genesis", "key"):
            yield [str(each.seq), at, "coordinator", f"signs by {body['public_key']}", "", ""]
        if each.kind == "action":
            ended = outcomes.get(each.seq)
            told = "unknown: broken off" if ended is None else " ".join([ended["result"], ended["code"]]).strip()
            given = ", ".join(f"{name}={value}" for name, value in sorted(body["arguments"].items()))
            yield [str(each.seq), at, f"{body['role']} {body['name']}", body["action"], given, told]


def _verify(stub: ControlStub, arguments: argparse.Namespace) -> int:
    from fl_server.access.log import check  # SQL and all; TAB must not wait for it
    from fl_shared.audit.source import key_text
    from fl_shared.audit.verify import parse_checkpoint

    noted = {one.entries: one.head for one in map(parse_checkpoint, arguments.checkpoint)}
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
        print(f"signed by  {spoken_key(key)}")
    if not report.pinned:
        print("note       the log itself names that key: pin it by --public-key")
    if report.open:
        print(f"note       without an outcome (broken off, or under way): {', '.join(map(str, report.open))}")
    print("INTACT" if not report.problems else f"NOT INTACT: {len(report.problems)} problems")
