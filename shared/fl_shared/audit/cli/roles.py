"""`fl-audit roles`: rights for the agent and for a read-only auditor on a ledger in PostgreSQL.

Prints the SQL; with --apply it is run, as the owner of the schema. The roles must exist (CREATE ROLE ... LOGIN).
"""

from __future__ import annotations

import argparse

from fl_shared.cli.output import print_json
from fl_shared.cli.verbs import add_json
from fl_shared.errors import ConfigError
from fl_shared.ledger.roles import grant, grant_statements

EXAMPLES = """
fl-audit roles --writer agent --auditor auditor
fl-audit roles --writer agent --auditor auditor --apply postgresql://owner@db/ledger
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    parser.add_argument("--writer", metavar="ROLE", help="the agent's role: SELECT and INSERT")
    parser.add_argument("--auditor", metavar="ROLE", help="the auditor's role: SELECT")
    parser.add_argument("--schema", metavar="NAME", default="public", help="for the printed SQL (default: public)")
    parser.add_argument("--apply", metavar="URL", help="run it on this ledger, as its owner")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print or apply the grants."""
    if not arguments.writer and not arguments.auditor:
        raise ConfigError("no role is named", fix="give --auditor ROLE, --writer ROLE or both")
    who = {"writer": arguments.writer, "auditor": arguments.auditor}
    statements = grant(arguments.apply, **who) if arguments.apply else grant_statements(schema=arguments.schema, **who)
    if arguments.json:
        print_json({"applied": bool(arguments.apply), "statements": statements})
    else:
        for statement in statements:
            print(f"{statement};")
    return 0
