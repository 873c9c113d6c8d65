"""`fl-admin adapters promote`: promote a committed adapter to a name.

The newest promotion of a name is valid. The adapter stays where it is; earlier promotions stay known.
"""

from __future__ import annotations

import argparse

from fl_server.cli.admin import complete
from fl_server.cli.admin.adapters.which import add_round
from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.show import moment, plain
from fl_shared.cli.output import print_json
from fl_shared.cli.verbs import argument
from fl_shared.wire import control_pb2 as pb

EXAMPLES = """
fl-admin adapters promote demo --round 3 --as production
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    argument(parser, "run", metavar="RUN", completer=complete.runs)
    add_round(parser)
    argument(
        parser, "--as", dest="name", metavar="NAME", required=True, completer=complete.promotions,
        help="lower-case letters, digits, hyphens",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Promote it."""
    with connected(arguments) as stub:
        request = pb.PromoteAdapterRequest(run=arguments.run, round=arguments.round, name=arguments.name)
        promotion = stub.PromoteAdapter(request)
    if arguments.json:
        print_json(plain(promotion))
    else:
        adapter = promotion.adapter
        print(f"{promotion.name} is round {adapter.round} of {adapter.run} since {moment(promotion.promoted_at)}")
        print(adapter.digest)
    return 0
