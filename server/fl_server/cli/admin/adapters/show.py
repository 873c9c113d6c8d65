"""`fl-admin adapters show`: one adapter: where it comes from, who took part, what it is promoted to."""

from __future__ import annotations

import argparse
import json

from fl_server.cli.admin.adapters.which import add_which, require_one
from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.show import moment, plain
from fl_shared.cli.output import print_json
from fl_shared.errors import ConfigError
from fl_shared.wire import control_pb2 as pb

EXAMPLES = """
fl-admin adapters show demo --round 3
fl-admin adapters show --released production
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    add_which(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    with connected(arguments) as stub:
        require_one(arguments)
        run_name, number = arguments.run, arguments.round
        if arguments.released:
            promotions = stub.ListReleases(pb.ListReleasesRequest(name=arguments.released)).releases
            if not promotions:
                raise ConfigError(f"nothing was released as {arguments.released!r}", fix="see `fl-admin adapters list`")
            run_name, number = promotions[0].adapter.run, promotions[0].adapter.round
        adapters = {row.round: row for row in stub.ListAdapters(pb.ListAdaptersRequest(run=run_name)).adapters}
        number = number or max(adapters, default=0)
        if number not in adapters:
            raise ConfigError(
                f"run {run_name} has no committed round {number or 'yet'}", fix=f"see `fl-admin runs show {run_name}`"
            )
        view = stub.ShowRun(pb.RunRequest(run=run_name))
    history = [entry for entry in view.history if entry.round == number]
    replies = [reply for entry in history for reply in entry.replies]
    adapter = adapters[number]
    if arguments.json:
        print_json(
            plain(adapter)
            | {
                "spec": json.loads(view.spec_json),
                "spec_digest": view.spec_digest,
                "replies": [plain(reply) for reply in replies],
            }
        )
        return 0
    for name, value in (
        ("run", f"{run_name}, round {number} of {view.rounds}"),
        ("digest", adapter.digest),
        ("bytes", str(adapter.bytes)),
        ("committed", moment(adapter.committed_at)),
        ("promoted to", ", ".join(adapter.released_as) or "-"),
        ("base model", json.loads(view.spec_json)["run"]["base_model"]),
        ("spec", view.spec_digest),
        ("sites", ", ".join(reply.site for reply in replies if reply.status == "ok")),
    ):
        print(f"{name:<12} {value}")
    return 0
