"""`fl-server restore`: make --home, which must be empty or not exist, from a backup.

`fl-server up` then carries every run on from its last committed round; sites notice a pause, no more.
"""

from __future__ import annotations

import argparse
import sys

from fl_server.cli.server.options import add_common
from fl_server.cli.show import moment
from fl_server.home.layout import ServerHome
from fl_server.operations.backup import restore
from fl_shared.cli.output import command, print_json, working
from fl_shared.cli.verbs import add_quiet, path

EXAMPLES = """
fl-server restore /backup/coordinator.tar --home /srv/coordinator2
fl-server restore coordinator.tar --home new --database postgresql://concordat@db/concordat
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    add_quiet(parser)
    parser.add_argument("archive", type=path, help="from `fl-server backup`")
    parser.add_argument(
        "--database", default=None,
        help="put the rows into this empty database instead of the one in server.toml; 'home' for SQLite in the home",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Restore it, and say where every run goes on."""
    home = ServerHome(arguments.home.expanduser().resolve())
    with working("restore", quiet=arguments.quiet, json=arguments.json) as say:
        restored = restore(arguments.archive, home, arguments.database, lambda name: say(f"restore: {name}"))
    if arguments.json:
        print_json(restored)
        return 0
    print(f"{restored['home']} is the coordinator of {moment(restored['created_at'])}, {restored['files']} files")
    for run_name, number in restored["runs"].items():
        print(f"  run {run_name} goes on after round {number}")
    for name in restored["damaged"]:
        print(f"warning: {name} was missing or changed when the backup was made", file=sys.stderr)
    print("next: make sure that the old one does not run, then")
    print(f"  {command('fl-server', 'up', '--home', restored['home'])}")
    return 0
