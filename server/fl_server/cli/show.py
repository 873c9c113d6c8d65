"""The coordinator's messages as JSON values and as text: runs, events, times."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from fl_shared.cli.output import print_json
from fl_shared.errors import printable
from fl_shared.wire import control_pb2 as pb

_INTEGERS = {"bytes", "number", "seq"}


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON values, every field present, 64-bit numbers as numbers."""
    table: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {name: _numbers_as_int(name, value) for name, value in table.items()}


def _numbers_as_int(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers_as_int(key, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers_as_int(name, item) for item in value]
    return int(value) if name in _INTEGERS and isinstance(value, str) else value


def run_plain(run: pb.Run) -> dict[str, Any]:
    """A run as JSON values; the spec as an object."""
    table = plain(run)
    table["spec"] = json.loads(table.pop("spec_json") or "{}")
    return table


def event_json(event: pb.Event) -> str:
    """An event as one line of JSON."""
    table = plain(event)
    table["data"] = json.loads(table.pop("data_json") or "{}")
    return json.dumps(table, sort_keys=True)


def event_text(event: pb.Event) -> str:
    """An event as one line for people."""
    where = " ".join(part for part in (f"round {event.round}" if event.round else "", event.site) if part)
    return printable(f"{moment(event.at)}  {event.kind:<16} {where:<24} {event.message}".rstrip().replace("\n", " "))


def moment(seconds: float) -> str:
    """A time of day for people, UTC; a dash for never."""
    if not seconds:
        return "-"
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def run_text(run: pb.Run) -> None:
    """A run with its history, and every site's reason for not taking part."""
    print(f"{run.run}: {run.state}, {run.rounds_committed} of {run.rounds} rounds")
    if run.reason:
        print(printable(f"  reason: {run.reason}"))
    for row in run.history:
        counted = sum(1 for reply in row.replies if reply.status == "ok")
        size = f", {row.bytes / 1e6:.1f} MB in {row.seconds:.0f} s" if row.seconds else ""
        print(f"  round {row.round}: {row.state}, {counted} of {len(row.replies)} replies{size}")
        for reply in row.replies:
            if reply.status == "ok":
                spent = f"epsilon {reply.epsilon_spent_total:.3f} spent at delta {reply.delta:g}"
                print(f"    {reply.site}: ok, {spent}")
            else:
                print(printable(f"    {reply.site}: {reply.status}: {reply.code}: {reply.message}"))


def print_run(run: pb.Run, *, as_json: bool) -> None:
    """Print a run."""
    if as_json:
        print_json(run_plain(run))
    else:
        run_text(run)
