"""The command `fl-audit`: reads privacy ledgers, never writes an entry to one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from fl_shared.audit import budgets, export, forecast, plan, reconcile, roles, runs, spends, statement, verify
from fl_shared.cli.completion import complete
from fl_shared.cli.entry import cli_main
from fl_shared.cli.extras import missing_package
from fl_shared.cli.parsers import add_version, describe

VERBS = {
    "budgets": budgets,
    "spends": spends,
    "runs": runs,
    "forecast": forecast,
    "plan": plan,
    "verify": verify,
    "reconcile": reconcile,
    "export": export,
    "statement": statement,
    "roles": roles,
}

MORE_VERBS = "concordat.audit_verbs"
"""Entry points of other packages: a module with HELP, `configure` and `run`. The auditor's install has none of them."""

EPILOG = """examples:
  fl-audit budgets   --site hospital-001
  fl-audit spends    --site hospital-001 --run demo --json
  fl-audit runs      --site hospital-001 --csv > runs.csv
  fl-audit plan      --site hospital-001 --spec next.toml
  fl-audit forecast  --site hospital-001 --rounds 20 --out burn-down.svg
  fl-audit verify    --site hospital-001 --public-key KEY --receipts receipts.json
  fl-audit reconcile --site hospital-001 --receipts receipts.json
  fl-audit export    --site hospital-001 --receipts receipts.json --out hospital-001.zip
  fl-audit verify    hospital-001.zip --public-key KEY
  fl-audit statement --site hospital-001 --out statements
  fl-audit canaries  --site hospital-001 --spec run.toml

Each verb has its own --help with examples.

environment: FL_CLIENT_HOME stands in for --home.
TAB completes verbs, options and sites: eval "$(register-python-argcomplete fl-audit)"
exit codes: 0 all is well, 2 wrong arguments or a missing package, 11 a plan that would be refused, 12 a signature does
  not fit, 13 the ledger cannot be read or trusted, or two copies diverge, 14 model, 19 the engine is accused,
  70 a defect, 74 the operating system said no, 130 Ctrl-C, 141 the output's reader left
"""


def parser() -> argparse.ArgumentParser:
    """Return the command's parser, with one subcommand per verb."""
    made = argparse.ArgumentParser(
        prog="fl-audit",
        description="Read, check and explain the privacy ledger of a site.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(made)
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        _add(verbs, name, module)
    for entry in metadata.entry_points(group=MORE_VERBS):
        try:
            _add(verbs, entry.name, entry.load())
        except ImportError as error:
            _add_missing(verbs, entry.name, error)
    return made


def _add(verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, module: Any) -> None:
    """Add the verb of a module with HELP, `configure`, `run`, and EXAMPLES unless `configure` gives them."""
    sub = verbs.add_parser(name, help=module.HELP)
    summary = str(module.__doc__).partition("\n\n")
    about = summary[0].partition(": ")[2]
    describe(sub, " ".join(about.split()), module.EXAMPLES, " ".join(summary[2].split()))
    module.configure(sub)
    sub.set_defaults(handle=module.run)


def _add_missing(verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, error: ImportError) -> None:
    """Add a verb whose packages are missing: it says what to install, whatever its arguments are."""
    sub = verbs.add_parser(name, help="needs the extra 'client'", prefix_chars="\0")
    sub.add_argument("rest", nargs="*", help=argparse.SUPPRESS)

    def refuse(_: argparse.Namespace) -> int:
        raise missing_package(error, "fl_client") or error

    sub.set_defaults(handle=refuse)


def _main(argv: Sequence[str] | None) -> int:
    made = parser()
    complete(made)
    arguments = made.parse_args(argv)
    return int(arguments.handle(arguments))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fl-audit`; returns the exit code."""
    return cli_main(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
