"""`fl-admin status`: whether the coordinator's parts run, and the key that signs."""

from __future__ import annotations

import argparse
from typing import Any

from fl_server.cli.show import moment, plain, print_json
from fl_server.cli.verbs import add_verb
from fl_shared.identity.fingerprints import spoken_key
from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.control_pb2_grpc import ControlStub


def add(groups: Any) -> None:
    """Add the verb; it stands by itself, without a group."""
    add_verb(
        groups, "status", _status, "whether the coordinator's parts run",
        more="Exit code 1 when one is not ready.", examples="fl-admin status\nfl-admin status --json",
    )  # fmt: skip


def _status(stub: ControlStub, arguments: argparse.Namespace) -> int:
    reply = stub.Status(pb.StatusRequest())
    if arguments.json:
        print_json(plain(reply))
    else:
        print(f"concordat {reply.version}, control API since {moment(reply.started_at)}")
        print(f"signing key {spoken_key(reply.coordinator_key)}")
        print(f"{reply.sites} sites enrolled, {reply.running_runs} runs going")
        for each in reply.components:
            print(f"{each.name:<10} {each.state:<14} {each.address}")
    return 0 if all(each.state == "ready" for each in reply.components) else 1
