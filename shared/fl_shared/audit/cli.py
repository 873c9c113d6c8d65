"""The command `fl-audit`: reads privacy ledgers, never writes an entry to one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata

from fl_shared import errors
from fl_shared.audit import budgets, export, forecast, plan, reconcile, roles, runs, spends, statement, verify
from fl_shared.completion import complete

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

environment: FL_CLIENT_HOME stands in for --home.
exit codes: 0 all is well, 2 wrong arguments, 11 a plan that would be refused, 12 a signature does not fit,
  13 the ledger cannot be read or trusted, or two copies diverge, 19 the engine is accused.
"""


def parser() -> argparse.ArgumentParser:
    """Return the command's parser, with one subcommand per verb."""
    made = argparse.ArgumentParser(
        prog="fl-audit",
        description="Read, check and explain the privacy ledger of a site.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--version", action="version", version=f"fl-audit (concordat-fl) {metadata.version('concordat-fl')}"
    )
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        sub = verbs.add_parser(name, help=module.HELP, description=module.__doc__)
        module.configure(sub)
        sub.set_defaults(handle=module.run)
    for entry in metadata.entry_points(group=MORE_VERBS):
        _add(verbs, entry)
    return made


def _add(verbs: argparse._SubParsersAction[argparse.ArgumentParser], entry: metadata.EntryPoint) -> None:
    """Add a verb of another package; when that package's parts are missing, the verb says what to install."""
    try:
        module = entry.load()
    except ImportError as error:
        missing = error.name or entry.module
        sub = verbs.add_parser(entry.name, help="needs the client: pip install 'concordat-fl[client]'")
        sub.add_argument("rest", nargs="*", help=argparse.SUPPRESS)

        def refuse(_: argparse.Namespace) -> int:
            raise errors.ConfigError(
                f"fl-audit {entry.name} needs {missing}, which is not installed",
                fix="install the client's parts where the engine runs: pip install 'concordat-fl[client]'",
            )

        sub.set_defaults(handle=refuse)
        return
    sub = verbs.add_parser(entry.name, help=module.HELP, description=module.__doc__)
    module.configure(sub)
    sub.set_defaults(handle=module.run)


def _main(argv: Sequence[str] | None) -> int:
    made = parser()
    complete(made)
    arguments = made.parse_args(argv)
    return int(arguments.handle(arguments))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fl-audit`; returns the exit code."""
    return errors.cli_main(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
