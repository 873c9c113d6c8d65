"""`fl-admin status`: whether the coordinator's parts run.

Exit code 1 when one is not ready.
"""

from __future__ import annotations

import argparse

from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.show import moment, plain
from fl_shared.cli.output import print_json
from fl_shared.identity.fingerprints import grouped_key
from fl_shared.wire import control_pb2 as pb

EXAMPLES = """
fl-admin status
fl-admin status --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the parts' states, and the key that signs."""
    with connected(arguments) as stub:
        reply = stub.Status(pb.StatusRequest())
    if arguments.json:
        print_json(plain(reply))
    else:
        print(f"concordat {reply.version}, control API since {moment(reply.started_at)}")
        print(f"signing key {grouped_key(reply.coordinator_key)}")
        print(f"{reply.sites} sites enrolled, {reply.running_runs} runs going")
        for component in reply.components:
            print(f"{component.name:<10} {component.state:<14} {component.address}")
    return 0 if all(component.state == "ready" for component in reply.components) else 1
