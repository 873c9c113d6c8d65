"""`fl-server backup`: write keys, certificates, databases and adapters into one file of mode 0600, also while it runs.

It holds the private keys: encrypt it before it leaves the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fl_server.cli.server.options import add_common
from fl_server.home.layout import ServerHome
from fl_server.operations.backup import backup
from fl_shared.cli.output import working
from fl_shared.cli.verbs import add_quiet
from fl_shared.identity.fingerprints import grouped_key

EXAMPLES = """
fl-server backup --out /backup/coordinator.tar
fl-server backup --out - | age -r KEY > coordinator.tar.age
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    add_quiet(parser)
    parser.add_argument("--out", required=True, help="the file to write, - for standard output; nothing is overwritten")


def run(arguments: argparse.Namespace) -> int:
    """Write it, and say what is in it."""
    to_output = arguments.out == "-"
    with working("backup", quiet=arguments.quiet, json=arguments.json) as say:
        saved = backup(
            ServerHome.open(arguments.home),
            None if to_output else Path(arguments.out).expanduser().absolute(),
            lambda name: say(f"backup: {name}"),
        )
    output = sys.stderr if to_output else sys.stdout
    if arguments.json:
        print(json.dumps(saved.to_dict(), indent=2), file=output)
        return 0
    print(f"wrote {saved.files} files, {saved.bytes / 1e6:.1f} MB, to {saved.archive}", file=output)
    print(f"it holds the private keys of {grouped_key(saved.coordinator_key)}: keep it like them", file=output)
    for name in saved.damaged:
        print(f"warning: {name} is missing or not what was committed, in the home already", file=sys.stderr)
    return 0
