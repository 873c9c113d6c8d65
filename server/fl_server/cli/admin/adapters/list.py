"""`fl-admin adapters list`: the adapters of a run, or without one what is promoted to which name."""

from __future__ import annotations

import argparse

from fl_server.cli.admin import complete
from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.show import moment, plain
from fl_shared.cli.output import print_json, table
from fl_shared.cli.verbs import argument
from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.control_pb2_grpc import ControlStub

EXAMPLES = """
fl-admin adapters list
fl-admin adapters list demo
fl-admin adapters list --history
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    argument(parser, "run", metavar="RUN", nargs="?", default="", completer=complete.runs)
    parser.add_argument("--history", action="store_true", help="also promotions that another one has followed")


def run(arguments: argparse.Namespace) -> int:
    """Print them."""
    with connected(arguments) as stub:
        if arguments.run:
            return _list_run(stub, arguments)
        promotions = stub.ListReleases(pb.ListReleasesRequest(history=arguments.history)).releases
    if arguments.json:
        print_json({"releases": [plain(promotion) for promotion in promotions]})
        return 0
    table(
        ["name", "run", "round", "promoted", "by", "current", "digest"],
        [
            [promotion.name, promotion.adapter.run, str(promotion.adapter.round), moment(promotion.promoted_at),
             promotion.promoted_by, "yes" if promotion.current else "no", promotion.adapter.digest]
            for promotion in promotions
        ],
    )  # fmt: skip
    return 0


def _list_run(stub: ControlStub, arguments: argparse.Namespace) -> int:
    adapters = stub.ListAdapters(pb.ListAdaptersRequest(run=arguments.run)).adapters
    if arguments.json:
        print_json({"adapters": [plain(adapter) for adapter in adapters]})
        return 0
    table(
        ["round", "bytes", "committed", "promoted to", "digest"],
        [[str(a.round), str(a.bytes), moment(a.committed_at), ", ".join(a.released_as), a.digest] for a in adapters],
    )
    return 0
