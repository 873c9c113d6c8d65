"""`fl-admin runs launch`: launch a run from a spec file.

Refused when the spec does not fit the base model that a site has announced (`sites list --json`). A site that has
announced none yet is named in a warning; it refuses by itself what does not fit.
"""

from __future__ import annotations

import argparse
import sys

from fl_server.cli.admin import complete
from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.admin.runs.spec import spec_text
from fl_server.cli.show import run_plain
from fl_server.cli.watch import follow
from fl_shared.cli.output import command, print_json
from fl_shared.cli.verbs import argument
from fl_shared.wire import control_pb2 as pb

EXAMPLES = """
fl-admin runs launch hospital.toml
fl-admin runs launch hospital.toml --watch
fl-admin runs launch hospital.toml --force
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    argument(parser, "spec", metavar="SPEC.toml", completer=complete.specs, help="the run spec (docs/architecture.md)")
    parser.add_argument("--watch", action="store_true", help="follow it to its end")
    parser.add_argument("--force", action="store_true", help="launch though the spec does not fit a site's base model")


def run(arguments: argparse.Namespace) -> int:
    """Launch it, and follow it when that is asked for."""
    with connected(arguments) as stub:
        request = pb.LaunchRunRequest(spec_toml=spec_text(arguments.spec), force=arguments.force)
        launched = stub.LaunchRun(request)
        for warning in launched.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if arguments.watch:
            return follow(stub, launched.run, as_json=arguments.json)
    if arguments.json:
        print_json(run_plain(launched))
    else:
        print(f"launched {launched.run}: {launched.rounds} rounds with {len(launched.sites)} sites")
        print(f"next: {command('fl-admin', 'runs', 'watch', launched.run)}")
    return 0
