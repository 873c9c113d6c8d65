"""The verbs of `fl-server` for disasters: backup and restore."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fl_server.cli.show import moment
from fl_server.home.layout import ServerHome
from fl_server.operations.backup import backup, restore
from fl_shared.cli.console import command, working
from fl_shared.cli.parsers import add_quiet, describe, path
from fl_shared.identity.fingerprints import spoken_key


def add_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs to the parser of `fl-server`."""
    make = verbs.add_parser(
        "backup",
        parents=[common],
        help="write the whole coordinator into one file, also while it runs",
    )
    describe(
        make, "write keys, certificates, databases and adapters into one file of mode 0600, also while it runs",
        "fl-server backup --out /backup/coordinator.tar\nfl-server backup --out - | age -r KEY > coordinator.tar.age",
        "It holds the private keys: encrypt it before it leaves the machine.",
    )  # fmt: skip
    add_quiet(make)
    make.add_argument("--out", required=True, help="the file to write, - for standard output; nothing is overwritten")
    bring = verbs.add_parser(
        "restore",
        parents=[common],
        help="make a new home from a backup",
    )
    describe(
        bring, "make --home, which must be empty or not exist, from a backup",
        "fl-server restore /backup/coordinator.tar --home /srv/coordinator2\n"
        "fl-server restore coordinator.tar --home new --database postgresql://concordat@db/concordat",
        "`fl-server up` then carries every run on from its last committed round; sites notice a pause, no more.",
    )  # fmt: skip
    add_quiet(bring)
    bring.add_argument("archive", type=path, help="from `fl-server backup`")
    bring.add_argument(
        "--database", default=None,
        help="put the rows into this empty database instead of the one in server.toml; 'home' for SQLite in the home",
    )  # fmt: skip


def _run_backup(arguments: argparse.Namespace) -> int:
    to_output = arguments.out == "-"
    with working("backup", quiet=arguments.quiet, json=arguments.json) as say:
        made = backup(
            ServerHome.open(arguments.home),
            None if to_output else Path(arguments.out).expanduser().absolute(),
            lambda name: say(f"backup: {name}"),
        )
    told = sys.stderr if to_output else sys.stdout
    if arguments.json:
        print(json.dumps(made.to_dict()), file=told)
        return 0
    print(f"wrote {made.files} files, {made.bytes / 1e6:.1f} MB, to {made.archive}", file=told)
    print(f"it holds the private keys of {spoken_key(made.coordinator_key)}: keep it like them", file=told)
    for name in made.damaged:
        print(f"warning: {name} is missing or not what was committed, in the home already", file=sys.stderr)
    return 0


def _run_restore(arguments: argparse.Namespace) -> int:
    home = ServerHome(arguments.home.expanduser().resolve())
    with working("restore", quiet=arguments.quiet, json=arguments.json) as say:
        made = restore(arguments.archive, home, arguments.database, lambda name: say(f"restore: {name}"))
    if arguments.json:
        print(json.dumps(made))
        return 0
    print(f"{made['home']} is the coordinator of {moment(made['created_at'])}, {made['files']} files")
    for run, number in made["runs"].items():
        print(f"  run {run} goes on after round {number}")
    for name in made["damaged"]:
        print(f"warning: {name} was missing or changed when the backup was made", file=sys.stderr)
    print("next: make sure that the old one does not run, then")
    print(f"  {command('fl-server', 'up', '--home', made['home'])}")
    return 0


ACTIONS = {"backup": _run_backup, "restore": _run_restore}
