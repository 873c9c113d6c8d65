"""`fl-client check`: dry run: packages, config, data, model, policy, budget, server; each a pass or the fix.

Nothing is written and nothing is spent. Exit code 2 when a line fails.
"""

from __future__ import annotations

import argparse

from fl_client.cli.client.options import add_common, home_of
from fl_shared.cli.output import print_json, working
from fl_shared.cli.verbs import path

EXAMPLES = """
fl-client check --site hospital-001
fl-client check --site hospital-001 --spec spec.toml --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    parser.add_argument(
        "--spec", type=path, default=None, help="a run's spec: also say whether this site could take part in it"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print each check as it ends."""
    home = home_of(arguments)
    from fl_client.agent.check import run_checks
    from fl_shared.documents.spec import RunSpec

    spec = RunSpec.from_toml(arguments.spec) if arguments.spec else None
    results = []
    checks = run_checks(home, arguments.site, spec)
    while True:
        with working("checking", quiet=arguments.quiet, json=arguments.json):
            result = next(checks, None)
        if result is None:
            break
        results.append(result)
        if not arguments.json:
            print(f"{'PASS' if result.ok else 'FAIL'}  {result.name:<11} {result.message}", flush=True)
            if result.fix:
                print(f"      {'fix:':<11} {result.fix}", flush=True)
    ok = all(result.ok for result in results)
    if arguments.json:
        print_json({"site": arguments.site, "ok": ok, "checks": [result.to_dict() for result in results]})
    return 0 if ok else 2
