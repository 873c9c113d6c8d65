"""`fl-admin`: invite sites, plan, launch and follow runs, release adapters, read the record of it all."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from fl_server.cli import adapters, audit, receipts, runs, schema, sites, status
from fl_server.cli.connection import Profile, control
from fl_server.cli.verbs import Handler
from fl_shared.cli.completion import complete
from fl_shared.cli.entry import cli_main
from fl_shared.cli.parsers import add_version

EXAMPLES = """examples:
  fl-admin sites invite hospital-001
  fl-admin runs plan hospital.toml
  fl-admin runs launch hospital.toml --watch
  fl-admin runs logs hospital-demo --follow
  fl-admin adapters promote hospital-demo --as production
  fl-admin receipts export --site hospital-001 --out receipts.json
  fl-admin audit verify

Each verb has its own --help with examples.

$FL_ADMIN_PROFILE stands for --profile; without both it is admin/admin.toml in the coordinator's home.
TAB completes verbs, options and names: eval "$(register-python-argcomplete fl-admin)"

exit codes: 0 done, 1 the certificate's role may not do this, 2 wrong arguments or settings, 11 a plan that a site
  would refuse, 12 a signature does not fit, 13 the admin log is not intact or cannot be written, 16 no coordinator
  answers, or a plan that a site has not answered, 17 the certificate is not valid (any more), 18 a run cannot do
  this, or did not complete, 70 a defect, 74 the operating system said no, 130 Ctrl-C, 141 the output's reader left
"""


def parser() -> argparse.ArgumentParser:
    """The command's parser, with one group of verbs for each kind of thing."""
    made = argparse.ArgumentParser(
        prog="fl-admin", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_version(made)
    groups = made.add_subparsers(
        dest="group", required=True, metavar="status|sites|runs|adapters|receipts|audit|schema"
    )
    for each in (status, sites, runs, adapters, receipts, audit, schema):
        each.add(groups)
    return made


def _run(argv: Sequence[str] | None) -> int:
    made = parser()
    complete(made)
    arguments = made.parse_args(argv)
    handler: Handler = arguments.handler
    if getattr(arguments, "offline", False):  # a verb that asks no coordinator
        offline: Callable[[None, argparse.Namespace], int] = arguments.handler
        return offline(None, arguments)
    with control(Profile.find(arguments.profile)) as stub:
        return handler(stub, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fl-admin`."""
    return cli_main(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
